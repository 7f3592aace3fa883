"""What a domain process gives up before guest code runs, a driver process before it sees a guest's ring, and a mover
process before it hears from the network.

Three lines, one behind the other:

1. descriptors, core dumps, file sizes and capabilities (``setrlimit``, ``capset``), no new privileges;
2. Landlock with an empty rule set: no path can be opened, no TCP port bound or reached, and, where
   the kernel knows scopes, no abstract socket connected and no process outside signalled;
3. a seccomp filter that lets through only what the Python and engine threads need on descriptors that are
   already open. Everything else fails with EPERM; another architecture's calls kill the process.

Sources: linux/seccomp.h, linux/filter.h, linux/landlock.h, linux/capability.h.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import platform
import resource
import struct
from collections.abc import Iterable
from typing import Any

from hypervisor.errors import HostFailure
from hypervisor.host import seccomp, seccomp_guard

LOG = logging.getLogger(__name__)

_PR_SET_NO_NEW_PRIVS = 38
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SYS_CAPSET = 126
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_CAPABILITY_VERSION_3 = 0x2008_0522

# Access rights that each Landlock ABI knows (linux/landlock.h): the number of file-system bits by version.
_LANDLOCK_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_LANDLOCK_NET_BITS = 2
_LANDLOCK_SCOPE_BITS = 2

MAX_OPEN_FILES = 2560
"""A domain process has two for each port that a driver binds, up to 16 links of 64."""
MAX_FILE_SIZE = 4 << 20
NO_LIMIT = resource.RLIM_INFINITY


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Which lines hold. :ivar missing: one plain reason for each that does not."""

    seccomp: bool
    landlock: int
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.seccomp

    def to_json(self) -> dict[str, Any]:
        return {"seccomp": self.seccomp, "landlock": self.landlock, "missing": list(self.missing)}


def restrict(*, max_file_size: int = MAX_FILE_SIZE, max_open_files: int = MAX_OPEN_FILES) -> Report:
    """Lines 1 and 2, for the calling thread and those it starts: call it before the first one, after the last file.

    :param max_file_size: bytes to which a file may be written, or `NO_LIMIT`.
    :raises HostFailure: the kernel is none of this century.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _limits(max_file_size, max_open_files)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise HostFailure(f"the kernel refuses no_new_privs: {os.strerror(ctypes.get_errno())}")
    missing = list(_drop_capabilities(libc))
    landlock = _landlock(libc)
    if not landlock:
        missing.append("Landlock is not in this kernel: seccomp alone guards files")
    return Report(False, landlock, tuple(missing))


def lock_down(report: Report, *, required: bool, profile: seccomp.Profile = seccomp.DOMAIN) -> Report:
    """Line 3, for all threads of this process; after `restrict`.

    :param profile: what the filter lets through for this kind of process.
    :param required: without seccomp refuse to go on.
    :raises HostFailure: seccomp is required and missing.
    """
    reason = seccomp.install(ctypes.CDLL(None, use_errno=True), profile)
    missing = report.missing
    if reason:
        if required:
            raise HostFailure(f"no seccomp ({reason}): run on a kernel with seccomp filters, or set sandbox=auto")
        missing = (*missing, f"seccomp: {reason}")
    for line in missing:
        LOG.warning("sandbox: %s", line)
    return Report(not reason, report.landlock, missing)


def probe() -> Report:
    """What a domain process would reach on this machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    reason = seccomp.unavailable(libc)
    missing = []
    if version < 1:
        missing.append("Landlock is not in this kernel: seccomp alone guards files")
    if reason:
        missing.append(f"seccomp: {reason}: domain processes keep the rights of the host process's user")
    elif reason_of_guard := seccomp_guard.unavailable(libc):
        missing.append(f"{reason_of_guard}: a driver process sees all memory of its guest")
    return Report(not reason, max(0, version), tuple(missing))


def close_other_fds(keep: Iterable[int]) -> None:
    """Close every descriptor but those in `keep`."""
    start = 0
    for fd in sorted(set(keep)):
        if start < fd:  # an empty range that begins at 0 would close everything
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, max(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _limits(max_file_size: int, max_open_files: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if max_file_size != NO_LIMIT:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max_open_files, hard), min(max_open_files, hard)))
    # RLIMIT_NPROC counts the user's processes on the whole machine and would stop threads as well:
    # that no process is made is the filter's work (clone without CLONE_THREAD).


def _drop_capabilities(libc: ctypes.CDLL) -> Iterable[str]:
    if os.geteuid() == 0:
        for capability in range(64):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    if libc.syscall(_SYS_CAPSET, header, bytes(24)) != 0:
        yield f"capabilities could not be dropped: {os.strerror(ctypes.get_errno())}"


def _landlock(libc: ctypes.CDLL) -> int:
    """The Landlock version that is in force afterwards, 0 for none."""
    version = int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION))
    if version < 1 or platform.machine() != "x86_64":
        return 0
    bits = _LANDLOCK_FS_BITS.get(version, max(_LANDLOCK_FS_BITS.values()))
    attribute = struct.pack("Q", (1 << bits) - 1)
    if version >= 4:
        attribute += struct.pack("Q", (1 << _LANDLOCK_NET_BITS) - 1)
    if version >= 6:
        attribute += struct.pack("Q", (1 << _LANDLOCK_SCOPE_BITS) - 1)
    ruleset = libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attribute, len(attribute), 0)
    if ruleset < 0:
        return 0
    try:
        return version if libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)
