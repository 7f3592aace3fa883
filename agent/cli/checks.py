"""What `reeve doctor` looks at. Each check is a function that returns a `Finding`; none changes anything."""

from __future__ import annotations

import dataclasses
import enum
import errno
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.cli import tls_files
from agent.cli.settings import Connection
from agent.errors import AgentError
from hypervisor.errors import ToolstackError

BROKER_SECONDS = 3.0
AGENT_SECONDS = 5.0
NR_USERFAULTFD = 323  # x86-64 system call numbers (asm/unistd_64.h)
NO_SECCOMP_CURE = (
    "a kernel with CONFIG_SECCOMP_FILTER, or a container that lets seccomp(2) pass; "
    "sandbox = required makes no domain without it"
)


class Status(enum.StrEnum):
    OK = "ok"
    WARN = "warn"  # something this host can do without
    MISSING = "missing"  # needed


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """:ivar cure: what to do about it; empty when it is ok."""

    check: str
    status: Status
    detail: str
    cure: str = ""


def python_version() -> Finding:
    """Packaging refuses an older Python; a newer one may lack wheels of the pinned unicorn."""
    return Finding("python", Status.OK, f"{platform.python_version()} ({sys.executable})")


def machine() -> Finding:
    kind = platform.machine()
    text = f"{platform.system()} {platform.release()} {kind}"
    if platform.system() != "Linux" or kind != "x86_64":
        return Finding("machine", Status.MISSING, text, "use Linux on x86-64")
    return Finding("machine", Status.OK, text)


def unicorn_version() -> Finding:
    try:
        text = importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        return Finding("unicorn", Status.MISSING, "not installed", "pip install unicorn")
    return Finding("unicorn", Status.OK, text)


def engine() -> Finding:
    """The engine's own check of the private offsets it uses."""
    try:
        selfcheck = importlib.import_module("hypervisor.engines.unicorn").selfcheck
    except (ImportError, AttributeError) as exc:
        return Finding("engine", Status.MISSING, f"no self-check: {exc}", "install the package again")
    try:
        verdict = selfcheck()
    except Exception as exc:  # whatever it is, it is the finding
        return Finding("engine", Status.MISSING, _line(exc), "install the unicorn version that setup.cfg pins")
    if verdict.layout is None:
        cure = "guests run on the slower public path: install the unicorn version that setup.cfg pins"
        return Finding("engine", Status.WARN, _line(verdict.reason), cure)
    return Finding("engine", Status.OK, _line(verdict.reason or "the fast path is usable"))


def memfd() -> Finding:
    try:
        os.close(os.memfd_create("reeve-doctor", os.MFD_CLOEXEC))
    except (AttributeError, OSError) as exc:
        return Finding("memfd", Status.MISSING, _line(exc), "use Linux 3.17 or newer; guest memory lives in memfds")
    return Finding("memfd", Status.OK, "guest memory can be allocated")


def seccomp() -> Finding:
    """What domain processes get here; the host process may live under other rules (see `host_process`)."""
    report = _sandbox()
    if isinstance(report, Finding):
        return report
    if report.seccomp:
        return Finding("seccomp", Status.OK, "domain processes can be held to a list of system calls")
    why = next((line for line in report.missing if line.startswith("seccomp")), "seccomp filters cannot be set")
    return Finding("seccomp", Status.WARN, _line(why), NO_SECCOMP_CURE)


def landlock() -> Finding:
    report = _sandbox()
    if isinstance(report, Finding):
        return dataclasses.replace(report, check="landlock")
    if report.landlock:
        return Finding("landlock", Status.OK, f"version {report.landlock}: domain processes can be cut off from files")
    cure = "not needed beside seccomp; a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in its lsm= list"
    return Finding("landlock", Status.WARN, "not in this kernel: seccomp alone guards files", cure)


def _sandbox() -> Any:
    """The host process's own probe, or the finding that there is none."""
    try:
        return importlib.import_module("hypervisor.host.sandbox").probe()
    except (ImportError, AttributeError, OSError) as exc:
        return Finding("seccomp", Status.WARN, f"cannot be asked: {_line(exc)}", "install the package again")


def userfaultfd() -> Finding:
    import ctypes

    cure = "not needed yet (live migration); sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd"
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return Finding("userfaultfd", Status.OK, "/dev/userfaultfd")
    libc = ctypes.CDLL(None, use_errno=True)
    for flags, what in ((os.O_CLOEXEC, "with kernel faults"), (os.O_CLOEXEC | 1, "user faults only")):
        fd = libc.syscall(NR_USERFAULTFD, flags)
        if fd >= 0:
            os.close(fd)
            return Finding("userfaultfd", Status.OK, what)
    return Finding("userfaultfd", Status.WARN, os.strerror(ctypes.get_errno()), cure)


def kvm() -> Finding:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding("kvm", Status.OK, "/dev/kvm can be opened")
    why = "no access to /dev/kvm" if os.path.exists("/dev/kvm") else "no /dev/kvm"
    return Finding("kvm", Status.WARN, why, "not needed: guests run by translation. For later use join group kvm")


def xen() -> Finding:
    xl = shutil.which("xl")
    if os.path.isdir("/proc/xen") and xl:
        return Finding("xen", Status.OK, f"a Xen dom0 with {xl}")
    why = "no /proc/xen" if not os.path.isdir("/proc/xen") else "no xl"
    return Finding("xen", Status.WARN, f"{why}: this is no Xen dom0", "not needed by the embedded driver")


def tool(name: str, package: str, use: str = "`reeve image build` may need it") -> Callable[[], Finding]:
    """A check for a program that something can do without: `use` says what cannot."""

    def check() -> Finding:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
        if found:
            return Finding(name, Status.OK, found)
        return Finding(name, Status.WARN, "not found", f"{use}: apt-get install {package}")

    return check


def loader(connection: Connection) -> Finding:
    """GRUB for Xen PV guests, which boots a domain from its own disk."""
    paths = [connection.loader(name) for name in ("pv-grub", "pv-grub-i386")]
    lacking = [path for path in paths if not os.access(path, os.R_OK)]
    if lacking:
        cure = "domains that boot from their disk need it: apt-get install grub-xen-host, or set [images] grub_x86_64"
        return Finding("grub-xen-host", Status.WARN, f"{', '.join(lacking)} not found", cure)
    return Finding("grub-xen-host", Status.OK, ", ".join(paths))


def state_dir(connection: Connection) -> Finding:
    """It, or the nearest folder above it that exists, is ours to write and closed to others."""
    path = Path(connection.state_dir)
    if path.exists():
        status = path.stat()
        if not os.access(path, os.W_OK | os.X_OK):
            return Finding("state_dir", Status.MISSING, f"{path} is not writable", f"chown {_user()} {path}")
        if status.st_mode & 0o022:
            return Finding("state_dir", Status.WARN, f"{path} can be written by others", f"chmod go-w {path}")
        return Finding("state_dir", Status.OK, f"{path} (mode {status.st_mode & 0o777:o})")
    parent = next(folder for folder in path.parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        cure = f"install -d -m 700 -o {_user()} {path}"
        return Finding("state_dir", Status.MISSING, f"{path} is not there and {parent} is not writable", cure)
    return Finding("state_dir", Status.OK, f"{path} will be made")


def host_process(connection: Connection) -> Finding:
    """The driver answers, and how fast."""
    began = time.monotonic()
    try:
        toolstack = connection.toolstack()
        try:
            info = toolstack.host_info()
        finally:
            toolstack.close()
    except (ToolstackError, AgentError) as exc:
        cure = "start reeve-hypervisor" if connection.driver == "embedded" else "check the driver's settings"
        return Finding("host_process", Status.WARN, f"driver {connection.driver}: {_line(exc)}", cure)
    took = (time.monotonic() - began) * 1000
    text = f"driver {info.driver} answers in {took:.0f} ms: {info.domains} domains, {info.memory_free_mib} MiB free"
    if dict(info.detail).get("seccomp") == "no":
        return Finding("host_process", Status.WARN, f"{text}; its domains run without seccomp", NO_SECCOMP_CURE)
    return Finding("host_process", Status.OK, text)


def migration(connection: Connection) -> Finding:
    """What other hosts must prove and be proved; as the host process was told."""
    try:
        toolstack = connection.toolstack()
        try:
            files = dict(toolstack.host_info().detail).get("migration", "").split("\n")
        finally:
            toolstack.close()
    except (ToolstackError, AgentError):
        return Finding("migration", Status.WARN, "not asked: no host process", "see host_process")
    if len(files) != 3:
        cure = "not needed on a host by itself; else set migration_ca, migration_certificate and migration_key"
        return Finding("migration", Status.WARN, "no certificate configured: domains cannot move from or to here", cure)
    try:
        days = tls_files.days_left(*files)
    except tls_files.Unusable as exc:
        return Finding("migration", Status.WARN, _line(exc), "correct it: no domain can move from or to here")
    text = f"{files[1]} is valid for {days:.0f} days"
    if days < tls_files.SOON_DAYS:
        return Finding("migration", Status.WARN, text, "renew it: afterwards no domain can move from or to here")
    return Finding("migration", Status.OK, text)


def broker(connection: Connection) -> Finding:
    """The broker takes a connection."""
    from agent.rpc import connection as rpc
    from agent.rpc.tls import explain

    url = connection.broker_url
    if not url:
        return Finding("broker", Status.WARN, "none configured", "set the broker's URL in the agent's configuration")
    shown = rpc.redact(url)
    try:
        if rpc.is_filesystem(url):
            return _folder_broker(url, shown)
        with rpc.connect(url, tls=connection.broker_tls) as opened:
            opened.ensure_connection(max_retries=1, timeout=BROKER_SECONDS)
    except Exception as exc:  # kombu's errors differ by transport
        return Finding("broker", Status.WARN, f"{shown}: {explain(exc)}", "start the broker, or correct its URL")
    if connection.broker_tls.insecure:
        return Finding("broker", Status.WARN, f"{shown} answers, who it is is not checked", "take out tls_insecure")
    return Finding("broker", Status.OK, f"{shown} takes connections")


def _folder_broker(url: str, shown: str) -> Finding:
    from urllib.parse import unquote, urlsplit

    path = Path(unquote(urlsplit(url).path))
    if not path.exists():
        return Finding("broker", Status.WARN, f"{path} is not there yet", "start reeve-agent: it makes the folder")
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding("broker", Status.WARN, f"{path} is not writable", f"run as the owner of {path}")
    return Finding("broker", Status.OK, shown)


def agent(connection: Connection, broker_finding: Finding) -> Finding:
    """The agent answers an instruction that changes nothing."""
    if broker_finding.status is not Status.OK:
        return Finding("agent", Status.WARN, "not asked: no broker", "see broker")
    from agent.rpc.client import Client

    began = time.monotonic()
    try:
        with Client(
            connection.broker_url,
            connection.host,
            tls=connection.broker_tls,
            signer=connection.signer,
            quorum=connection.broker_quorum,
        ) as client:
            reply = client.call("list", {}, timeout=AGENT_SECONDS)
    except (AgentError, OSError) as exc:
        return Finding("agent", Status.WARN, _line(exc), "start reeve-agent")
    if not reply.ok:
        return Finding("agent", Status.WARN, f"answers with an error: {reply.error}", "look at the agent's log")
    return Finding("agent", Status.OK, f"{connection.host} answers in {(time.monotonic() - began) * 1000:.0f} ms")


def disk(connection: Connection) -> Finding:
    path = Path(connection.state_dir)
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free >> 20
    if free < 1024:
        return Finding("disk", Status.WARN, f"{free} MiB free at {place}", "images need some 100 MiB each: free some")
    return Finding("disk", Status.OK, f"{free} MiB free at {place}")


HOST_CHECKS: tuple[Callable[[], Finding], ...] = (
    python_version,
    machine,
    unicorn_version,
    engine,
    memfd,
    seccomp,
    landlock,
    userfaultfd,
    kvm,
    xen,
    tool("dpkg-deb", "dpkg"),
    tool("apt-get", "apt"),
    tool("cpio", "cpio"),
    tool("busybox", "busybox-static"),
    tool("qemu-storage-daemon", "qemu-system-common", "qcow2 disks need it"),
    tool("qemu-img", "qemu-utils", "making and checking qcow2 images needs it"),
    tool("slirp4netns", "slirp4netns", "user networks need it to reach the outside"),
)


def run_all(connection: Connection) -> list[Finding]:
    """Every check, in the order they are shown."""
    findings = [check() for check in HOST_CHECKS]
    findings += [loader(connection), state_dir(connection), disk(connection), host_process(connection)]
    findings.append(migration(connection))
    asked = broker(connection)
    return [*findings, asked, agent(connection, asked)]


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _line(value: object) -> str:
    if isinstance(value, OSError) and value.errno:
        value = f"{errno.errorcode.get(value.errno, value.errno)} {value.strerror}"
    return " ".join(str(value).split()) or type(value).__name__
