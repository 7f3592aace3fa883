"""From the guest to the switch: one transmit ring (public/io/netif.h).

What is broken in itself (indices, chains, extras) breaks the device, as in Linux's netback;
what may be an honest front end's mistake costs the frame: NETIF_RSP_ERROR.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

from hypervisor import abi
from hypervisor.devices.driver import Copy, DeviceBroken, EventPort, GuestLink, Loop
from hypervisor.devices.net import headers, offload
from hypervisor.devices.net.message import (
    DATA_VALID,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    MAX_FRAME,
    MIN_FRAME,
    NEEDS_CSUM,
    NO_OFFLOAD,
    Header,
)
from hypervisor.devices.net.outbox import RETRY_SECONDS, Outbox
from hypervisor.devices.net.rings import RSP_OKAY, Extra, TxRequest, TxRing

PAGE = 4096
MAX_SLOTS = abi.XEN_NETIF_NR_SLOTS_MIN
FATAL_SLOTS = 20
"""A chain longer than this is an attack (netback's fatal_skb_slots); between the two it is only dropped."""
BATCH_FRAMES = 64
BATCHES = 8
"""So many batches before the other devices of this process have their turn."""

_GSO = {abi.XEN_NETIF_GSO_TYPE_TCPV4: GSO_TCPV4, abi.XEN_NETIF_GSO_TYPE_TCPV6: GSO_TCPV6}
_MULTICAST = (abi.XEN_NETIF_EXTRA_TYPE_MCAST_ADD, abi.XEN_NETIF_EXTRA_TYPE_MCAST_DEL)


@dataclasses.dataclass(slots=True)
class Outgoing:
    """One frame's place in the ring.

    :ivar index: of its first request. :ivar requests: copies of them; `extras` lie behind the first.
    :ivar at: its bytes in the link's buffer. :ivar status: its answer; None while it is to be sent.
    :ivar copies: how many copies it takes.
    """

    index: int
    requests: list[TxRequest]
    extras: int = 0
    gso_type: int = GSO_NONE
    gso_size: int = 0
    at: int = 0
    status: int | None = None
    copies: int = 0

    @property
    def slots(self) -> int:
        return len(self.requests) + self.extras

    @property
    def size(self) -> int:
        """The first request tells that of the whole frame."""
        return self.requests[0].size

    @property
    def flags(self) -> int:
        return self.requests[0].flags


@dataclasses.dataclass(slots=True)
class TransmitCounters:
    bytes: int = 0
    packets: int = 0
    dropped: int = 0


class Transmitter:
    """:param multicast: told of addresses that the guest adds (True) or removes.

    Nothing is taken from the ring while the outbox is full: the guest waits, nothing is lost.
    """

    def __init__(
        self,
        link: GuestLink,
        loop: Loop,
        ring: TxRing,
        event: EventPort,
        outbox: Outbox,
        multicast: Callable[[bytes, bool], None],
        guard: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self.counters = TransmitCounters()
        self._link = link
        self._loop = loop
        self._ring = ring
        self.event = event
        self._outbox = outbox
        self._multicast = multicast
        self._work = guard(self.work)
        self._waiting: deque[tuple[Outgoing, bytes, bytes]] = deque()
        self._cancel: Callable[[], None] | None = None
        self._closed = False
        self._seen = 0

    def close(self) -> None:
        """What waits for the switch is given up: its requests stay in the ring."""
        self._closed = True
        if self._cancel is not None:
            self._cancel()
        self._ring.close()

    def work(self) -> None:
        """Serve what is in the ring. :raises DeviceBroken, LinkClosed."""
        self._cancel = None
        if self._closed or not self._flush():
            return
        for _ in range(BATCHES):
            batch = self._collect()
            if batch:
                self._serve(batch)
                if self._waiting:
                    return
            elif not self._ring.ask(self._seen + 1):
                return
        self._loop.call_soon(self._work)

    def _collect(self) -> list[Outgoing]:
        """Take whole frames as long as they fit into the buffer."""
        room, left = len(self._link.buffer), self._ring.waiting()
        self._seen = left
        batch: list[Outgoing] = []
        while left and len(batch) < BATCH_FRAMES:
            frame = self._read(left)
            if frame is None or (frame.status is None and frame.size > room):
                break
            if frame.status is None:
                frame.at = len(self._link.buffer) - room
                room -= frame.size
            self._ring.take(frame.slots)
            left -= frame.slots
            batch.append(frame)
        return batch

    def _read(self, left: int) -> Outgoing | None:
        """The frame at the head of the ring; None if its end is not there yet. :raises DeviceBroken."""
        ring = self._ring
        if not left:
            return None
        first = ring.peek(0)
        done = ring.old and first.size == 0
        frame = Outgoing(ring.cons, [first])
        if first.flags & abi.NETTXF_extra_info and not self._read_extras(frame, left, done):
            return None
        flags = first.flags
        while flags & abi.NETTXF_more_data:
            if frame.slots >= FATAL_SLOTS + frame.extras:
                raise DeviceBroken(f"a frame of more than {FATAL_SLOTS} requests")
            if frame.slots >= left:
                return None
            request = ring.peek(frame.slots)
            frame.requests.append(request)
            flags = request.flags
        if done:
            frame.status = RSP_OKAY
        elif frame.status is None and (not MIN_FRAME <= frame.size <= MAX_FRAME or len(frame.requests) > MAX_SLOTS):
            frame.status = abi.NETIF_RSP_ERROR
        return frame

    def _read_extras(self, frame: Outgoing, left: int, done: bool) -> bool:
        """False: their end is not there yet."""
        while True:
            if frame.slots >= left:
                return False
            extra = self._ring.peek_extra(frame.slots)
            frame.extras += 1
            if not 0 < extra.type < abi.XEN_NETIF_EXTRA_TYPE_MAX:
                raise DeviceBroken(f"extra info of type {extra.type}, which there is not")
            if frame.extras >= abi.XEN_NETIF_EXTRA_TYPE_MAX:
                raise DeviceBroken("more extra infos than there are types")
            if not done:
                self._use_extra(frame, extra)
            if not extra.flags & abi.XEN_NETIF_EXTRA_FLAG_MORE:
                return True

    def _use_extra(self, frame: Outgoing, extra: Extra) -> None:
        if extra.type == abi.XEN_NETIF_EXTRA_TYPE_GSO:
            if extra.gso_type not in _GSO or not extra.size:
                raise DeviceBroken(f"segmentation of type {extra.gso_type} into {extra.size} bytes is not known")
            frame.gso_type, frame.gso_size = _GSO[extra.gso_type], extra.size
        elif extra.type in _MULTICAST:
            self._multicast(extra.raw, extra.type == abi.XEN_NETIF_EXTRA_TYPE_MCAST_ADD)
            frame.status = RSP_OKAY  # a request without a frame

    def _serve(self, batch: list[Outgoing]) -> None:
        self._fetch(batch)
        buffer = self._link.buffer
        sent = 0
        for frame in batch:
            if frame.status is None:
                data = buffer[frame.at : frame.at + frame.size]
                header = self._header(frame, data)
                if header is None:
                    frame.status = abi.NETIF_RSP_ERROR
                elif self._waiting or not self._outbox.put(header, data):
                    self._waiting.append((frame, header, bytes(data)))
                    continue
                else:
                    self._sent(frame)
            if self._waiting:
                self._waiting.append((frame, b"", b""))  # responses keep the ring's order
            else:
                sent += self._answer(frame)
        self._publish(sent)
        if self._waiting:
            self._wait()

    def _wait(self) -> None:
        """Try again when there may be room."""
        if not self._outbox.holding:  # else it says when
            self._cancel = self._loop.call_later(RETRY_SECONDS, self._work)

    def _fetch(self, batch: list[Outgoing]) -> None:
        """Copy the frames from the guest; those that cannot be had get their status."""
        copies: list[Copy] = []
        for frame in batch:
            if frame.status is None:
                self._plan(frame, copies)
        if not copies:
            return
        statuses = iter(self._link.copy(copies))
        for frame in batch:
            if frame.status is None and any([next(statuses) for _ in range(frame.copies)]):
                frame.status = abi.NETIF_RSP_ERROR

    def _plan(self, frame: Outgoing, copies: list[Copy]) -> None:
        requests = frame.requests
        rest = sum(request.size for request in requests[1:])
        sizes = [frame.size - rest, *(request.size for request in requests[1:])]
        if sizes[0] < 0 or any(request.flags & abi.NETTXF_extra_info for request in requests[1:]):
            frame.status = abi.NETIF_RSP_ERROR
            return
        for request, size in zip(requests, sizes, strict=True):
            if request.offset + size > PAGE:
                raise DeviceBroken(f"a request of {size} bytes at offset {request.offset} goes over its page")
        at = frame.at
        for request, size in zip(requests, sizes, strict=True):
            if size:
                copies.append(Copy(request.gref, request.offset, size, at, False))
                frame.copies += 1
                at += size

    def _header(self, frame: Outgoing, data: memoryview) -> bytes | None:
        """The message's header; None: what the guest asks for cannot be done to this frame."""
        if not frame.gso_type and not frame.flags & abi.NETTXF_csum_blank:
            valid = frame.flags & abi.NETTXF_data_validated
            return (Header(DATA_VALID) if valid else NO_OFFLOAD).pack()
        place = headers.checksum_place(data)
        if place is None:
            return None
        layers, offset = place
        if not frame.gso_type:
            return Header(NEEDS_CSUM, csum_start=layers.l4, csum_offset=offset).pack()
        if layers.protocol != headers.TCP or (frame.gso_type == GSO_TCPV4) != (layers.version == 4):
            return None
        if not frame.flags & abi.NETTXF_csum_blank:  # some front ends forget it
            at = layers.l4 + offset
            data[at : at + 2] = offload.pseudo_field(data, layers).to_bytes(2, "big")
        length = layers.l4 + (data[layers.l4 + 12] >> 4) * 4
        return Header(NEEDS_CSUM, frame.gso_type, length, frame.gso_size, layers.l4, offset).pack()

    def _sent(self, frame: Outgoing) -> None:
        self._ring.mark(frame.index)
        frame.status = RSP_OKAY

    def _flush(self) -> bool:
        """Send what waits; False: there is still no room."""
        answered = 0
        while self._waiting:
            frame, header, data = self._waiting[0]
            if frame.status is None:
                if not self._outbox.put(header, data):
                    break
                self._sent(frame)
            answered += self._answer(frame)
            self._waiting.popleft()
        self._publish(answered)
        if self._waiting:
            self._wait()
            return False
        return True

    def _answer(self, frame: Outgoing) -> int:
        """Write a frame's responses; how many those are."""
        assert frame.status is not None
        ring = self._ring
        if frame.status == RSP_OKAY and frame.size >= MIN_FRAME:
            self.counters.packets += 1
            self.counters.bytes += frame.size
        elif frame.status != RSP_OKAY:
            self.counters.dropped += 1
        ring.mark(frame.index)
        ring.respond(frame.index, frame.requests[0].id, frame.status)
        for number in range(frame.extras):
            ring.respond_extra(frame.index + 1 + number)
        for number, request in enumerate(frame.requests[1:], 1 + frame.extras):
            ring.respond(frame.index + number, request.id, frame.status)
        return frame.slots

    def _publish(self, count: int) -> None:
        if count and self._ring.publish(count):
            self.event.notify()
