"""The FIFO event ABI: up to 2^17 ports, queues of 16 priorities per vCPU (xen/common/event_fifo.c, event_channel.h).

A port's event word and a vCPU's control block lie in pages of the guest's own,
which it may fill with anything. What a queue's end is, which queue a port was
put on last and where the pages are is kept here; the guest's words are only
ever read for their flags, and a link that the guest follows is only written.
So a guest that scribbles there loses its own events and nothing else.

The run loop has all of a domain's vCPUs in one thread: none of them runs while
this code does. So a word does not change between looking and writing, and the
retries with BUSY of Xen's `evtchn_fifo_set_link` have nothing to retry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.state import Vcpu
from hypervisor.errors import XenError
from hypervisor.evtchn.core import EventChannels
from hypervisor.memory.frames import WRITABLE
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SHIFT, PAGE_SIZE

LOG = logging.getLogger(__name__)

PENDING, MASKED = 1 << abi.EVTCHN_FIFO_PENDING, 1 << abi.EVTCHN_FIFO_MASKED
LINKED, BUSY = 1 << abi.EVTCHN_FIFO_LINKED, 1 << abi.EVTCHN_FIFO_BUSY
LINK_MASK = abi.EVTCHN_FIFO_LINK_MASK
QUEUES = abi.EVTCHN_FIFO_MAX_QUEUES
DEFAULT_PRIORITY = abi.EVTCHN_FIFO_PRIORITY_DEFAULT

WORDS_SHIFT = PAGE_SHIFT - 2
WORDS_PER_PAGE = 1 << WORDS_SHIFT
MAX_ARRAY_PAGES = abi.EVTCHN_FIFO_NR_CHANNELS // WORDS_PER_PAGE

_READY = abi.EVTCHN_FIFO_CONTROL_BLOCK_READY
_HEAD = abi.EVTCHN_FIFO_CONTROL_BLOCK_HEAD
_UPCALL_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_NO_BLOCK = -1


class Frames(Protocol):
    """What of the domain's page tables this module needs."""

    def owned_index(self, mfn: int) -> int: ...
    def get_type(self, index: int, kind: int) -> None: ...
    def put_type(self, index: int) -> None: ...


class Fifo:
    """See `hypervisor.evtchn.core.Abi`.

    :param vcpus: all that the domain can have.
    :param wake: called with (vCPU number, port) when an event may be deliverable or a port went pending.
    """

    name = "fifo"
    max_ports = abi.EVTCHN_FIFO_NR_CHANNELS
    priorities = True

    __slots__ = (
        "_blocks",
        "_bytes",
        "_frames",
        "_last",
        "_pages",
        "_priority",
        "_tails",
        "_vcpus",
        "_waiting",
        "_wake",
        "_words",
    )

    def __init__(
        self, memory: DomainMemory, frames: Frames, vcpus: Sequence[Vcpu], wake: Callable[[int, int], None]
    ) -> None:
        self._bytes = memory.bytes
        self._words = memory.dwords
        self._frames = frames
        self._vcpus = vcpus
        self._wake = wake
        self._blocks = [_NO_BLOCK] * len(vcpus)  # byte offset of each vCPU's control block
        self._pages: list[int] = []  # frame indexes of the event array
        self._tails = [0] * (len(vcpus) * QUEUES)  # last port of each queue, 0: empty
        self._priority: dict[int, int] = {}  # of ports that have not the default one
        self._last: dict[int, int] = {}  # the queue a port was put on last
        self._waiting: set[int] = set()  # pending ports whose page of the array is missing

    # -- the guest's pages

    def _take(self, mfn: int) -> int:
        index = self._frames.owned_index(mfn)
        self._frames.get_type(index, WRITABLE)
        return index

    def map_block(self, vcpu: int, mfn: int, offset: int) -> None:
        """Give a vCPU its control block, once.

        :param offset: of the block in the page; the caller checked that it fits and is aligned.
        :raises XenError: EINVAL it has one, or the frame is not one of the domain's that can be written.
        """
        if self._blocks[vcpu] != _NO_BLOCK:
            raise XenError(errno.EINVAL, f"vCPU {vcpu} has a control block")
        self._blocks[vcpu] = (self._take(mfn) << PAGE_SHIFT) + offset

    def add_page(self, mfn: int) -> list[int]:
        """Append a page to the event array.

        :returns: ports with a word in it whose event has waited for that.
        :raises XenError: ENOSPC the array is complete, EINVAL for the frame.
        """
        page = len(self._pages)
        if page >= MAX_ARRAY_PAGES:
            raise XenError(errno.ENOSPC, "the event array is complete")
        self._pages.append(self._take(mfn))
        ready = sorted(port for port in self._waiting if port >> WORDS_SHIFT == page)
        self._waiting.difference_update(ready)
        return ready

    def release(self) -> None:
        for index in self.held_frames():
            self._frames.put_type(index)
        self._blocks = [_NO_BLOCK] * len(self._blocks)
        self._pages = []

    def held_frames(self) -> list[int]:
        """Indexes of the frames held as writable, one for each use."""
        return [at >> PAGE_SHIFT for at in self._blocks if at != _NO_BLOCK] + self._pages

    def _word(self, port: int) -> int:
        """Where the port's word is, in `_words`; -1 while its page is missing."""
        page = port >> WORDS_SHIFT
        if page >= len(self._pages):
            return -1
        return (self._pages[page] << WORDS_SHIFT) + (port & WORDS_PER_PAGE - 1)

    # -- events

    def opened(self, port: int) -> None:
        self._priority.pop(port, None)

    def set_priority(self, port: int, priority: int) -> None:
        """For events to come: a linked one stays on its queue."""
        if not 0 <= priority <= abi.EVTCHN_FIFO_PRIORITY_MIN:
            raise XenError(errno.EINVAL, f"event priority {priority}")
        self._priority[port] = priority

    def set_pending(self, port: int, vcpu: int) -> None:
        at = self._word(port)
        if at < 0:
            self._waiting.add(port)
            return
        block = self._blocks[vcpu]
        if block == _NO_BLOCK:
            LOG.debug("port %d: vCPU %d has no control block, the event is lost", port, vcpu)
            return
        word = self._words[at]
        if word & (MASKED | LINKED):
            self._words[at] = word | PENDING
            called = False
        else:
            self._words[at] = word | PENDING | LINKED
            called = self._enqueue(port, vcpu, block)
        if called or not word & PENDING:
            self._wake(vcpu, port)

    def _enqueue(self, port: int, vcpu: int, block: int) -> bool:
        """Put a port on its queue; True when the vCPU is called because of it."""
        tails = self._tails
        priority = self._priority.get(port, DEFAULT_PRIORITY)
        queue = vcpu * QUEUES + priority
        last = self._last.get(port, 0)
        if tails[last] == port:
            # The guest took it off: that queue is empty, and must not be continued from here.
            tails[last] = 0
        if last != queue:
            self._last[port] = queue
        tail = tails[queue]
        tails[queue] = port
        if tail and self._link(tail, port):
            return False
        self._words[(block + _HEAD >> 2) + priority] = port
        return self._call(vcpu, block, 1 << priority)

    def _link(self, tail: int, port: int) -> bool:
        """Let a queue's last port point to the next one; False when the guest has taken it off."""
        at = self._word(tail)
        word = self._words[at]
        if not word & LINKED:
            return False
        self._words[at] = word & ~(BUSY | LINK_MASK) | port
        return True

    def _call(self, vcpu: int, block: int, bit: int) -> bool:
        ready = self._words[block + _READY >> 2]
        if ready & bit:
            return False
        self._words[block + _READY >> 2] = ready | bit
        self._bytes[self._vcpus[vcpu].state.vcpu_info + _UPCALL_PENDING] = 1
        return True

    def unmask(self, port: int, vcpu: int) -> None:
        at = self._word(port)
        if at >= 0:
            self._words[at] &= ~MASKED
            if self._words[at] & PENDING:
                self.set_pending(port, vcpu)

    def clear(self, port: int) -> None:
        """Not pending any more; the guest unlinks it when it comes to it."""
        self._waiting.discard(port)
        at = self._word(port)
        if at >= 0:
            self._words[at] &= ~PENDING & 0xFFFF_FFFF

    def is_pending(self, port: int) -> bool:
        at = self._word(port)
        return at >= 0 and bool(self._words[at] & PENDING)

    def is_busy(self, port: int) -> bool:
        at = self._word(port)
        return at >= 0 and bool(self._words[at] & LINKED)

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """What the guest's memory and its frame table do not tell."""
        return {
            "name": self.name,
            "blocks": list(self._blocks),
            "pages": list(self._pages),
            "tails": list(self._tails),
            "priority": [list(item) for item in sorted(self._priority.items())],
            "last": [list(item) for item in sorted(self._last.items())],
            "waiting": sorted(self._waiting),
        }

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what `save` gave; the frame table, restored apart, has the uses of the pages already.

        :raises ValueError: it is not of a domain like this.
        """
        size, ports = len(self._bytes), len(data["pages"]) << WORDS_SHIFT
        fits = (
            len(data["blocks"]) == len(self._blocks)
            and len(data["tails"]) == len(self._tails)
            and all(at == _NO_BLOCK or 0 <= at <= size - abi.SIZEOF_EVTCHN_FIFO_CONTROL_BLOCK for at in data["blocks"])
            and all(0 <= index < size >> PAGE_SHIFT for index in data["pages"])
            and all(0 <= port < ports or not port for port in data["tails"])
            and all(0 <= priority < QUEUES for _, priority in data["priority"])
            and all(0 <= queue < len(self._tails) for _, queue in data["last"])
        )
        if not fits:
            raise ValueError("the FIFO event state is of a domain with other vCPUs or other memory")
        self._blocks = list(data["blocks"])
        self._pages = list(data["pages"])
        self._tails = list(data["tails"])
        self._priority = dict(data["priority"])
        self._last = dict(data["last"])
        self._waiting = set(data["waiting"])


class FifoControl:
    """How a domain comes to the FIFO ABI: the operations that only it has.

    :param make: an empty FIFO ABI for the domain.
    """

    __slots__ = ("_channels", "_make")

    def __init__(self, channels: EventChannels, make: Callable[[], Fifo]) -> None:
        self._channels = channels
        self._make = make

    def init_control(self, vcpu: int, mfn: int, offset: int, max_vcpus: int) -> None:
        """Give a vCPU its control block; the first one switches the domain to FIFO.

        :raises XenError: ENOENT no such vCPU, EINVAL the block does not fit the page, is not aligned to 8 bytes,
            is the vCPU's second or lies in a frame that the domain cannot write.
        """
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        if offset > PAGE_SIZE - abi.SIZEOF_EVTCHN_FIFO_CONTROL_BLOCK or offset & 7:
            raise XenError(errno.EINVAL, f"control block at offset {offset}")
        events = self._channels.events
        if isinstance(events, Fifo):
            events.map_block(vcpu, mfn, offset)
            return
        fifo = self._make()
        fifo.map_block(vcpu, mfn, offset)
        self._channels.switch(fifo)

    def expand_array(self, mfn: int) -> None:
        """:raises XenError: EOPNOTSUPP before `init_control`, ENOSPC, EINVAL for the frame."""
        events = self._channels.events
        if not isinstance(events, Fifo):
            raise XenError(errno.EOPNOTSUPP, "no control block yet")
        self._channels.pend_all(events.add_page(mfn))

    def held_frames(self) -> list[int]:
        """Frames that are in use as writable for the event ABI, for a recount."""
        events = self._channels.events
        return events.held_frames() if isinstance(events, Fifo) else []

    def restore(self, data: dict[str, Any]) -> None:
        """The domain's event channels from what `EventChannels.save` gave."""
        fifo = None
        if data["abi"]["name"] == Fifo.name:
            fifo = self._make()
            fifo.restore(data["abi"])
        self._channels.restore(data, fifo)
