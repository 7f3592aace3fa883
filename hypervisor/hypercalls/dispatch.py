"""From the trapped `syscall` to a handler and back to RAX."""

from __future__ import annotations

import collections

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls import (  # noqa: F401  the families register themselves
    cpu,
    events,
    grants,
    information,
    memory,
    mmu,
    multicall,
    scheduling,
)
from hypervisor.hypercalls.registry import REGISTRY, ContextLoaded, Continuation

SYSCALL_LENGTH = 2


class Dispatcher:
    """Hypercalls of one domain.

    :ivar counts: calls by number, for `stats`.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._table = REGISTRY.table
        self.counts: collections.Counter[int] = collections.Counter()

    def hypercall(self) -> None:
        """Handle the call in the registers: RAX number and result; RDI, RSI, RDX, R10, R8, R9 arguments."""
        domain = self._domain
        regs = domain.engine.regs
        gpr = regs.gpr
        if regs.cs != abi.FLAT_KERNEL_CS64:
            # `syscall` and the return from it load Xen's flat selectors, whatever the guest had.
            domain.engine.load_flat64(abi.FLAT_KERNEL_CS64, abi.FLAT_KERNEL_SS64)
        number = gpr[x86.RAX]
        if number == abi.HYPERVISOR_iret:
            domain.traps.iret()
            return
        self.counts[number if number < len(self._table) else -1] += 1
        try:
            handler = self._table[number] if number < len(self._table) else None
            if handler is None:
                raise XenError(errno.ENOSYS, f"hypercall {number}")
            result = handler(domain, gpr[x86.RDI], gpr[x86.RSI], gpr[x86.RDX], gpr[x86.R10], gpr[x86.R8], gpr[x86.R9])
        except XenError as exc:
            result = -exc.errno
        except Continuation as exc:
            # Run the same `syscall` again with the new arguments: events and pauses come in between.
            for register, value in zip((x86.RDI, x86.RSI, x86.RDX, x86.R10), exc.arguments, strict=False):
                gpr[register] = value & x86.MASK64
            regs.rip = (regs.rip - SYSCALL_LENGTH) & x86.MASK64
            return
        except ContextLoaded:
            return
        gpr[x86.RAX] = result & x86.MASK64
