"""multicall: a list of hypercalls in one (xen/common/multicall.c)."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import REGISTRY, ContextLoaded, Continuation, hypercall

_ENTRY = struct.Struct("<8Q")
_FORBIDDEN = {abi.HYPERVISOR_multicall: errno.EINVAL}


@hypercall(abi.HYPERVISOR_multicall)
def multicall(domain: Domain, calls: int, count: int, _3: int, _4: int, _5: int, _6: int) -> int:
    count &= 0xFFFF_FFFF
    table = REGISTRY.table
    for number in range(count):
        if number and domain.preempt:
            raise Continuation(calls, count - number)
        operation, _, *arguments = _ENTRY.unpack(domain.guest.read(calls, _ENTRY.size))
        handler = table[operation] if operation < len(table) and operation not in _FORBIDDEN else None
        try:
            if operation == abi.HYPERVISOR_iret:
                result = _iret(domain)
            elif handler is None:
                raise XenError(_FORBIDDEN.get(operation, errno.ENOSYS), f"hypercall {operation} in a multicall")
            else:
                result = handler(domain, *arguments)
        except XenError as exc:
            result = -exc.errno
        except Continuation as exc:
            domain.guest.write(calls + 16, struct.pack(f"<{len(exc.arguments)}Q", *exc.arguments))
            raise Continuation(calls, count - number) from exc
        domain.guest.write_u64(calls + 8, result & (1 << 64) - 1)
        calls += _ENTRY.size
        if domain.shutdown_code is not None:
            break
    return 0


def _iret(domain: Domain) -> int:
    """An iret ends the list when it leaves the kernel: the rest would run with a user program's rights (XSA-213)."""
    domain.traps.iret()
    if not domain.traps.state.kernel_mode:
        raise ContextLoaded
    return int(domain.engine.regs.gpr[x86.RAX])
