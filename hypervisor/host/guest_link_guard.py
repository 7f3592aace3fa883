"""Which of a guest's frames a driver process may map: the supervisor of its filter (`hypervisor.host.seccomp_guard`).

A slot goes through these stages; each step needs the one before::

    granted    pinned by the run loop: one mmap of this page, with this access, at this address may be made
    mapped     the mmap was let through
    unmapped   an munmap of the whole slot was let through, in the thread that had mapped it
    settled    the same thread asked for something after it: so the munmap is behind it

The grant is given back only when nothing was mapped or all is settled, or when no process is left
under the filter. What is let through is not yet done: hence the threads. An munmap of a whole mapping cannot fail.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import mmap
import os
import select
import threading

from hypervisor.devices.link_window import PAGE, SLOTS, STRIDE
from hypervisor.host import seccomp_guard
from hypervisor.host.seccomp_guard import MMAP, MUNMAP, Call

_PROT_READ, _PROT_WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_SHARED_FIXED = mmap.MAP_SHARED | 0x10


class Stage(enum.Enum):
    GRANTED = enum.auto()
    MAPPED = enum.auto()
    UNMAPPED = enum.auto()
    SETTLED = enum.auto()


@dataclasses.dataclass(slots=True)
class _Slot:
    page: int
    readonly: bool
    stage: Stage = Stage.GRANTED
    thread: int = 0


class Guard:
    """:param memory: descriptor in the driver process, writable; `memory_ro` the other.

    :param window: address of slot 0 there.

    `answer` is for the channel thread, `grant` and `forget` for the run loop's.
    """

    def __init__(self, listener: int, memory: int, memory_ro: int, window: int) -> None:
        self.listener = listener
        self._memory = memory
        self._memory_ro = memory_ro
        self._window = window
        self._lock = threading.Lock()
        self._slots: dict[int, _Slot] = {}
        self._unsettled: dict[int, list[_Slot]] = {}  # by thread

    def close(self) -> None:
        """Calls that wait return with ENOSYS."""
        os.close(self.listener)

    # -- the run loop

    def grant(self, slot: int, page: int, *, readonly: bool) -> None:
        with self._lock:
            self._slots[slot] = _Slot(page, readonly)

    def forget(self, slot: int) -> bool:
        """The grant is to be given back; False: it may be mapped still."""
        with self._lock:
            if self._slots[slot].stage not in (Stage.GRANTED, Stage.SETTLED):
                return False
            del self._slots[slot]
            return True

    # -- the channel thread

    def is_over(self) -> bool:
        """No process is left under the filter."""
        poll = select.poll()
        poll.register(self.listener, 0)
        return bool(poll.poll(0))

    def answer(self) -> None:
        """Take and decide one call, if one waits. :raises OSError: the listener is none."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        if not poll.poll(0):
            return
        call = seccomp_guard.receive(self.listener)
        if call is None:
            return
        # Decided, noted and let go under the lock: a slot is not forgotten in between.
        with self._lock:
            self._settle(call.thread)
            decision = self._map(call) if call.number == MMAP else self._unmap(call)
            if decision is None:
                seccomp_guard.go_on(self.listener, call)
            else:
                seccomp_guard.finish(self.listener, call, decision)

    def _settle(self, thread: int) -> None:
        for slot in self._unsettled.pop(thread, ()):
            slot.stage = Stage.SETTLED

    def _slot_at(self, address: int) -> _Slot | None:
        number, rest = divmod(address - self._window, STRIDE)
        return self._slots.get(number) if not rest and 0 <= number < SLOTS else None

    def _map(self, call: Call) -> int | None:
        """None: go on; else the errno."""
        address, length, prot, flags, fd, offset = call.arguments
        slot = self._slot_at(address)
        if slot is None or slot.stage is not Stage.GRANTED or not call.thread:
            return errno.EPERM
        wanted = (
            (PAGE, _PROT_READ, self._memory_ro) if slot.readonly else (PAGE, _PROT_READ | _PROT_WRITE, self._memory)
        )
        if (length, prot, fd) != wanted or flags != _SHARED_FIXED or offset != slot.page * PAGE:
            return errno.EPERM
        slot.stage, slot.thread = Stage.MAPPED, call.thread
        return None

    def _unmap(self, call: Call) -> int | None:
        if call.number != MUNMAP:
            return errno.EPERM
        address, length, *_ = call.arguments
        if address == self._window and length == 0:
            return 0  # asked for only to settle what came before
        slot = self._slot_at(address)
        if slot is None or length != PAGE:
            return errno.EPERM
        if slot.stage is Stage.GRANTED:
            return None  # a reservation: nothing of the guest is there
        if slot.stage is not Stage.MAPPED or slot.thread != call.thread:
            return errno.EPERM
        slot.stage = Stage.UNMAPPED
        self._unsettled.setdefault(call.thread, []).append(slot)
        return None
