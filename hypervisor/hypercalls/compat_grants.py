"""grant_table_op of 32-bit guests (xen/common/compat/grant_table.c)."""

from __future__ import annotations

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.compat_registry import compat, guest_of, native
from hypervisor.hypercalls.registry import Continuation
from hypervisor.hypercalls.xlat import Pair, narrow_words

CHUNK = 128
"""Operations translated at a time."""
MAX_LISTED_FRAMES = 4096

_SETUP = Pair("gnttab_setup_table")
_ARRAYS = {
    abi.GNTTABOP_copy: Pair("gnttab_copy"),
    abi.GNTTABOP_transfer: Pair("gnttab_transfer"),
    abi.GNTTABOP_get_status_frames: Pair("gnttab_get_status_frames"),
}


@compat(abi.HYPERVISOR_grant_table_op)
def grant_table_op(domain: Domain, command: int, argument: int, count: int, _4: int, _5: int, _6: int) -> int:
    if count >> 31:
        raise XenError(errno.EINVAL, f"{count} grant operations")
    if command == abi.GNTTABOP_setup_table:
        return _setup_table(domain, argument, count)
    pair = _ARRAYS.get(command)
    if pair is not None:
        return _array(domain, command, pair, argument, count)
    return native(abi.HYPERVISOR_grant_table_op)(domain, command, argument, count, 0, 0, 0)


def _setup_table(domain: Domain, argument: int, count: int) -> int:
    """Its list of frames is one of 4-byte numbers."""
    if count != 1:
        raise XenError(errno.EINVAL, f"setup_table on {count} items")
    guest = guest_of(domain)
    setup = _SETUP.read(guest, argument)
    theirs, frames = int(setup.frame_list), int(setup.nr_frames)
    if frames <= MAX_LISTED_FRAMES:
        setup.frame_list = guest.put(bytes(8 * frames))
    ours = int(setup.frame_list)
    at = guest.put(bytes(setup))
    result = native(abi.HYPERVISOR_grant_table_op)(domain, abi.GNTTABOP_setup_table, at, 1, 0, 0, 0)
    answer = type(setup).from_buffer_copy(guest.read(at, _SETUP.native_size))
    if answer.status == abi.GNTST_okay:
        guest.write(theirs, narrow_words(guest.read(ours, 8 * frames)))
    answer.frame_list = theirs
    guest.write(argument, _SETUP.narrow(bytes(answer)))
    return result


def _array(domain: Domain, command: int, pair: Pair, argument: int, count: int) -> int:
    guest = guest_of(domain)
    handler = native(abi.HYPERVISOR_grant_table_op)
    result = 0
    while count:
        part = min(count, CHUNK)
        with guest.translating():
            data = b"".join(bytes(pair.read(guest, argument + number * pair.size)) for number in range(part))
            at = guest.put(data)
            done, again = part, None
            try:
                result = handler(domain, command, at, part, 0, 0, 0)
            except Continuation as exc:
                done, again = (exc.arguments[1] - at) // pair.native_size, exc
            for number in range(done):
                changed = guest.read(at + number * pair.native_size, pair.native_size)
                guest.write(argument + number * pair.size, pair.narrow(changed))
        argument += done * pair.size
        count -= done
        if again is not None or (count and domain.preempt):
            raise Continuation(command, argument, count)
        if result:
            break
    return result
