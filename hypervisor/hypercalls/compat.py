"""Hypercalls of 32-bit guests: ``int $0x82``, and which of them need their arguments translated.

The calls whose structures have one form for all guests go to the handlers of `REGISTRY` as they are; the others
have a handler here or in the `compat_*` modules, which translates and calls the same core (hypercall-defs.c, column
pv32, tells one from the other).
"""

from __future__ import annotations

import collections
import struct
from typing import cast

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.traps32 import Traps32
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls import compat_cpu, compat_grants, compat_memory, compat_mmu, compat_vcpu
from hypervisor.hypercalls import dispatch as _dispatch  # noqa: F401  fills the table of the common handlers
from hypervisor.hypercalls.compat_registry import COMPAT, compat, guest_of, native
from hypervisor.hypercalls.registry import TABLE_SIZE, ContextLoaded, Continuation, Handler

CALL_LENGTH = 2
_ENTRY = struct.Struct("<8I")
_ARGUMENTS = (x86.RBX, x86.RCX, x86.RDX, x86.RSI, x86.RDI)
_FORBIDDEN = {abi.HYPERVISOR_multicall: errno.EINVAL}

SAME = (
    abi.HYPERVISOR_mmu_update,
    abi.HYPERVISOR_fpu_taskswitch,
    abi.HYPERVISOR_platform_op,
    abi.HYPERVISOR_set_debugreg,
    abi.HYPERVISOR_get_debugreg,
    abi.HYPERVISOR_event_channel_op_compat,
    abi.HYPERVISOR_console_io,
    abi.HYPERVISOR_event_channel_op,
    abi.HYPERVISOR_sysctl,
    abi.HYPERVISOR_domctl,
    abi.HYPERVISOR_kexec_op,
)
"""Calls with one form for all guests, and those no guest may make."""

FAMILIES = (compat_cpu, compat_grants, compat_memory, compat_mmu, compat_vcpu)
"""The modules that fill the table."""


def compat_table() -> list[Handler | None]:
    """Handlers by number for 32-bit guests."""
    table: list[Handler | None] = [COMPAT.get(number) for number in range(TABLE_SIZE)]
    for number in SAME:
        table[number] = native(number)
    return table


class Dispatcher32:
    """Hypercalls of one 32-bit domain; see `Dispatcher`."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._table = compat_table()
        self.counts: collections.Counter[int] = collections.Counter()
        cast(Traps32, domain.traps).hypercall = self.call

    def hypercall(self) -> None:
        """A `syscall` instruction of the guest kernel: not the way to call for 32-bit guests."""
        self._domain.traps.user_syscall()

    def call(self) -> None:
        """Handle ``int $0x82``: EAX number and result; EBX, ECX, EDX, ESI, EDI arguments."""
        domain = self._domain
        regs = domain.engine.regs
        gpr = regs.gpr
        number = gpr[x86.RAX] & x86.MASK32
        if number == abi.HYPERVISOR_iret:
            domain.traps.iret()
            return
        self.counts[number if number < TABLE_SIZE else -1] += 1
        handler = self._table[number] if number < TABLE_SIZE else None
        try:
            if handler is None:
                raise XenError(errno.ENOSYS, f"hypercall {number}")
            with guest_of(domain).translating():
                result = _call(handler, domain, [gpr[register] & x86.MASK32 for register in _ARGUMENTS])
        except XenError as exc:
            result = -exc.errno
        except Continuation as exc:
            for register, value in zip(_ARGUMENTS, exc.arguments, strict=False):
                gpr[register] = value & x86.MASK32
            regs.rip = (regs.rip - CALL_LENGTH) & x86.MASK32
            return
        except ContextLoaded:
            return
        gpr[x86.RAX] = result & x86.MASK32


_TABLE: list[Handler | None] = []


@compat(abi.HYPERVISOR_multicall)
def multicall(domain: Domain, calls: int, count: int, _3: int, _4: int, _5: int, _6: int) -> int:
    """See `hypervisor.hypercalls.multicall`."""
    if not _TABLE:
        _TABLE.extend(compat_table())
    guest = guest_of(domain)
    for number in range(count):
        if number and domain.preempt:
            raise Continuation(calls, count - number)
        operation, _, *arguments = _ENTRY.unpack(guest.read(calls, _ENTRY.size))
        try:
            with guest.translating():
                result = _one(domain, operation, arguments)
        except XenError as exc:
            result = -exc.errno
        except Continuation as exc:
            values = [value & x86.MASK32 for value in exc.arguments]
            guest.write(calls + 8, struct.pack(f"<{len(values)}I", *values))
            raise Continuation(calls, count - number) from exc
        guest.write_u32(calls + 4, result)
        calls += _ENTRY.size
        if domain.shutdown_code is not None:
            break
    return 0


def _call(handler: Handler, domain: Domain, arguments: list[int]) -> int:
    first, second, third, fourth, fifth = arguments
    return handler(domain, first, second, third, fourth, fifth, 0)


def _one(domain: Domain, operation: int, arguments: list[int]) -> int:
    if operation == abi.HYPERVISOR_iret:
        domain.traps.iret()
        if not domain.traps.state.kernel_mode:
            raise ContextLoaded
        return int(domain.engine.regs.gpr[x86.RAX])
    handler = _TABLE[operation] if operation < TABLE_SIZE and operation not in _FORBIDDEN else None
    if handler is None:
        raise XenError(_FORBIDDEN.get(operation, errno.ENOSYS), f"hypercall {operation} in a multicall")
    return _call(handler, domain, arguments[:5])
