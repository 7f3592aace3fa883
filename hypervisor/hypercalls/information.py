"""xen_version, console_io, and the calls a guest may make but may not have."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.cpuid import XEN_VERSION
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import Continuation, Handler, hypercall
from hypervisor.memory.layout import M2P_VIRT_START

CAPABILITIES = b"xen-3.0-x86_64 "
CAPABILITIES_32 = b"xen-3.0-x86_32p "
"""Besides, where the engine can run 32-bit guests."""
EXTRA_VERSION = b".0-reeve"
MAX_CONSOLE_WRITE = 4096
_FEATURES = (
    1 << abi.XENFEAT_mmu_pt_update_preserve_ad
    | 1 << abi.XENFEAT_highmem_assist
    | 1 << abi.XENFEAT_gnttab_map_avail_bits
)


def _fixed(text: bytes, size: int) -> bytes:
    return text[: size - 1].ljust(size, b"\0")


_ANSWERS = {
    abi.XENVER_extraversion: _fixed(EXTRA_VERSION, 16),
    abi.XENVER_compile_info: _fixed(b"python", 64) + _fixed(b"reeve", 16) + _fixed(b"", 32) + _fixed(b"", 32),
    abi.XENVER_changeset: _fixed(b"unavailable", 64),
    abi.XENVER_platform_parameters: struct.pack("<Q", M2P_VIRT_START),
    abi.XENVER_commandline: _fixed(b"", 1024),
}


@hypercall(abi.HYPERVISOR_xen_version)
def xen_version(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    command &= 0xFFFF_FFFF
    if command == abi.XENVER_version:
        return XEN_VERSION
    if command == abi.XENVER_pagesize:
        return 4096
    if command == abi.XENVER_get_features:
        submap = domain.guest.read_u32(argument)
        if submap >= abi.XENFEAT_NR_SUBMAPS:
            raise XenError(errno.EINVAL, f"feature submap {submap}")
        domain.guest.write_u32(argument + 4, _FEATURES)
        return 0
    if command == abi.XENVER_capabilities:
        runs_32_bit = domain.engine.runs_32_bit
        domain.guest.write(argument, _fixed(CAPABILITIES + (CAPABILITIES_32 if runs_32_bit else b""), 1024))
        return 0
    if command == abi.XENVER_guest_handle:
        domain.guest.write(argument, _handle(domain.config.uuid))
        return 0
    answer = _ANSWERS.get(command)
    if answer is None:
        raise XenError(errno.ENOSYS if command != abi.XENVER_build_id else errno.ENODATA, f"xen_version {command}")
    domain.guest.write(argument, answer)
    return 0


def _handle(uuid: str) -> bytes:
    return bytes.fromhex(uuid.replace("-", "")).ljust(16, b"\0")[:16]


@hypercall(abi.HYPERVISOR_console_io)
def console_io(domain: Domain, command: int, count: int, buffer: int, _4: int, _5: int, _6: int) -> int:
    count &= 0xFFFF_FFFF
    say = domain.console
    if command == abi.CONSOLEIO_write and say is not None:
        while count:
            part = min(count, MAX_CONSOLE_WRITE)
            say(domain.guest.read(buffer, part))
            buffer += part
            count -= part
            if count and domain.preempt:
                raise Continuation(command, count, buffer)
        return 0
    raise XenError(errno.EPERM, f"console_io {command}: not for guests")


def _refuse(number: int, code: int) -> None:
    def handler(_domain: Domain, _1: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
        raise XenError(code, f"hypercall {number} is privileged")

    refused: Handler = handler
    hypercall(number)(refused)


for _number in (abi.HYPERVISOR_platform_op, abi.HYPERVISOR_sysctl, abi.HYPERVISOR_domctl, abi.HYPERVISOR_kexec_op):
    _refuse(_number, errno.EPERM)
