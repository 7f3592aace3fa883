"""A front end of netif on a fake guest, for unit tests of the driver."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hypervisor import abi
from hypervisor.devices.net.rings import Journal
from tests.support.fake_link import FakeGuest

SLOTS = 256
OFFLOADS = {"sg": True, "gso4": True, "gso6": True, "csum4": True, "csum6": True}


class FakeLoop:
    """A `hypervisor.devices.driver.Loop` whose clock moves only when told."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: deque[Callable[[], None]] = deque()
        self.timers: list[tuple[float, int, list[Callable[[], None]]]] = []
        self.now = 0.0
        self._count = itertools.count()

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        entry = [callback]
        heapq.heappush(self.timers, (self.now + seconds, next(self._count), entry))
        return entry.clear

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def run(self, seconds: float = 0.0) -> None:
        """All that is due within `seconds`, and what descriptors have to say."""

        end = self.now + seconds
        for _ in range(100_000):
            while self.soon:
                self.soon.popleft()()
            ready = select.select(list(self.readers), [], [], 0)[0] if self.readers else []
            for fd in ready:
                if fd in self.readers:
                    self.readers[fd]()
            if self.timers and self.timers[0][0] <= end:
                when, _, entry = heapq.heappop(self.timers)
                self.now = max(self.now, when)
                if entry:
                    entry[0]()
            elif not ready and not self.soon:
                self.now = end
                return
        raise AssertionError("the loop does not come to rest")


@dataclasses.dataclass
class Queue:
    tx: memoryview
    rx: memoryview
    tx_ref: int
    rx_ref: int
    tx_port: int
    rx_port: int
    tx_prod: int = 0
    tx_seen: int = 0
    rx_prod: int = 0
    rx_seen: int = 0
    posted: dict[int, int] = dataclasses.field(default_factory=dict)
    """Ring index to grant of each receive buffer."""


class Frontend:
    """:ivar driver_end, switch_end: of the socket; the driver gets duplicates of its end."""

    def __init__(
        self, guest: FakeGuest, *, queues: int = 1, split: bool = True, offloads: dict[str, bool] | None = None
    ) -> None:
        self.guest = guest
        self.offloads = {**OFFLOADS, **(offloads or {})}
        self.multicast = False
        self.queues = [self._queue(split) for _ in range(queues)]
        self.driver_end, self.switch_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.switch_end.setblocking(False)
        self.journal = os.memfd_create("journal")
        os.ftruncate(self.journal, 8 * Journal.BYTES)

    def close(self) -> None:
        self.driver_end.close()
        self.switch_end.close()
        os.close(self.journal)

    def _queue(self, split: bool) -> Queue:
        tx_ref, rx_ref = self.guest.grant(), self.guest.grant()
        tx_port = self.guest.open_port()
        rx_port = self.guest.open_port() if split else tx_port
        queue = Queue(self.guest.granted(tx_ref), self.guest.granted(rx_ref), tx_ref, rx_ref, tx_port, rx_port)
        for page in (queue.tx, queue.rx):
            struct.pack_into("<IIII", page, 0, 0, 1, 0, 1)
        return queue

    def config(self) -> dict[str, Any]:
        queues = [
            {"tx_ref": q.tx_ref, "rx_ref": q.rx_ref, "tx_port": q.tx_port, "rx_port": q.rx_port} for q in self.queues
        ]
        return {"frontend": {"queues": queues, "offloads": self.offloads, "multicast": self.multicast}, "device": {}}

    def fds(self) -> list[int]:
        return [os.dup(self.driver_end.fileno()), os.dup(self.journal)]

    # -- transmit

    def put(self, slot: bytes, queue: int = 0) -> int:
        """Write 12 bytes into the next transmit slot; its index."""
        q = self.queues[queue]
        at = 64 + (q.tx_prod & (SLOTS - 1)) * 12
        q.tx[at : at + 12] = slot.ljust(12, b"\0")
        q.tx_prod += 1
        return q.tx_prod - 1

    def request(self, gref: int, offset: int, flags: int, id_: int, size: int, queue: int = 0) -> int:
        return self.put(struct.pack("<IHHHH", gref, offset, flags, id_, size), queue)

    def gso(self, kind: int, size: int, queue: int = 0, flags: int = 0) -> int:
        return self.put(struct.pack("<BBHBBH", abi.XEN_NETIF_EXTRA_TYPE_GSO, flags, size, kind, 0, 0), queue)

    def push(self, queue: int = 0) -> None:
        q = self.queues[queue]
        struct.pack_into("<I", q.tx, 0, q.tx_prod & 0xFFFF_FFFF)
        self.guest.notify(q.tx_port)

    def send(
        self, frame: bytes, *, flags: int = 0, gso: tuple[int, int] | None = None, queue: int = 0, piece: int = 4096
    ) -> list[int]:
        """Put a frame into the ring in pieces; the ids of its requests."""
        pieces = [frame[at : at + piece] for at in range(0, len(frame), piece)]
        ids = []
        for number, data in enumerate(pieces):
            gref = self.guest.grant(self.guest.new_frame(data), readonly=True)
            more = abi.NETTXF_more_data if number < len(pieces) - 1 else 0
            extra = abi.NETTXF_extra_info if gso and not number else 0
            id_ = self.queues[queue].tx_prod & 0xFFFF
            ids.append(id_)
            size = len(data) if number else len(frame)
            self.request(gref, 0, (flags if not number else 0) | more | extra, id_, size, queue)
            if gso and not number:
                self.gso(*gso, queue)
        return ids

    def tx_responses(self, queue: int = 0) -> list[tuple[int, int]]:
        """(id, status) of those published since this was last asked."""
        q = self.queues[queue]
        (prod,) = struct.unpack_from("<I", q.tx, 8)
        result = []
        while q.tx_seen != prod:
            at = 64 + (q.tx_seen & (SLOTS - 1)) * 12
            result.append(struct.unpack_from("<Hh", q.tx, at))
            q.tx_seen += 1
        return result

    def sent(self) -> list[bytes]:
        """Messages that the switch got."""
        result = []
        while True:
            try:
                result.append(self.switch_end.recv(1 << 17))
            except BlockingIOError:
                return result

    # -- receive

    def post(self, count: int, queue: int = 0) -> None:
        """Offer `count` new receive buffers."""
        q = self.queues[queue]
        for _ in range(count):
            gref = self.guest.grant()
            q.posted[q.rx_prod] = gref
            at = 64 + (q.rx_prod & (SLOTS - 1)) * 8
            struct.pack_into("<HHI", q.rx, at, q.rx_prod & (SLOTS - 1), 0xAAAA, gref)
            q.rx_prod += 1
        struct.pack_into("<I", q.rx, 0, q.rx_prod & 0xFFFF_FFFF)
        self.guest.notify(q.rx_port)

    def received(self, queue: int = 0) -> list[tuple[bytes, int, tuple[int, int] | None]]:
        """(frame, flags of its first response, GSO type and size) of whole frames since this was last asked.

        Statuses below 0 give None instead of the frame's bytes.
        """
        q = self.queues[queue]
        (prod,) = struct.unpack_from("<I", q.rx, 8)
        frames: list[Any] = []
        data: bytes | None = b""
        first: int | None = None
        gso = None
        while q.rx_seen != prod:
            id_, offset, flags, status = struct.unpack_from("<HHHh", q.rx, 64 + (q.rx_seen & (SLOTS - 1)) * 8)
            assert id_ == q.rx_seen & (SLOTS - 1), "a response with another request's id"
            gref = q.posted.pop(q.rx_seen)
            q.rx_seen += 1
            if first is None:
                first = flags
            if status < 0:
                data = None
            elif data is not None:
                data += bytes(self.guest.granted(gref)[offset : offset + status])
            if flags & abi.NETRXF_extra_info:
                at = 64 + (q.rx_seen & (SLOTS - 1)) * 8
                _, _, size, kind, _, _ = struct.unpack_from("<BBHBBH", q.rx, at)
                gso = (kind, size)
                q.posted.pop(q.rx_seen)
                q.rx_seen += 1
            if not flags & abi.NETRXF_more_data:
                frames.append((data, first, gso))
                data, first, gso = b"", None, None
        assert first is None, "a frame without its end"
        return frames


def ethernet(
    payload: bytes, kind: int = 0x88B5, source: bytes = b"\0\x16\x3e\0\0\1", target: bytes = b"\xff" * 6
) -> bytes:
    return target + source + kind.to_bytes(2, "big") + payload


def tcp4(payload: bytes, *, flags: int = 0x18, sequence: int = 1000, id_: int = 7, options: bytes = b"") -> bytes:
    """An Ethernet frame whose checksums are 0."""
    length = 40 + len(options) + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, id_, 0x4000, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    tcp = struct.pack(">HHIIBBHHH", 1234, 80, sequence, 5, (5 + len(options) // 4) << 4, flags, 8192, 0, 0)
    return ethernet(ip + tcp + options + payload, 0x0800)


def tcp6(payload: bytes, *, flags: int = 0x18, sequence: int = 1000) -> bytes:
    source, target = b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(14) + b"\2"
    ip = struct.pack(">IHBB16s16s", 6 << 28, 20 + len(payload), 6, 64, source, target)
    tcp = struct.pack(">HHIIBBHHH", 1234, 80, sequence, 5, 5 << 4, flags, 8192, 0, 0)
    return ethernet(ip + tcp + payload, 0x86DD)


def udp4(payload: bytes, source: bytes = b"\x0a\0\0\1", ports: tuple[int, int] = (1000, 2000)) -> bytes:
    length = 28 + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, 17, 0, source, b"\x0a\0\0\2")
    return ethernet(ip + struct.pack(">HHHH", *ports, 8 + len(payload), 0) + payload, 0x0800)


def words_sum(pieces: Sequence[bytes]) -> int:
    """RFC 1071, word by word: the reference."""
    value = 0
    for data in pieces:
        padded = data + b"\0" * (len(data) & 1)
        for (word,) in struct.iter_unpack(">H", padded):
            value += word
            value = (value & 0xFFFF) + (value >> 16)
    return value


def checksums_right(frame: bytes) -> bool:
    """Whether IPv4's and TCP's or UDP's checksum of a frame are right, by the reference."""
    if frame[12:14] == b"\x08\0":
        start, total = 14 + (frame[14] & 15) * 4, int.from_bytes(frame[16:18], "big")
        if words_sum([frame[14:start]]) != 0xFFFF:
            return False
        addresses, protocol, end = frame[26:34], frame[23], 14 + total
    else:
        start, addresses, protocol = 54, frame[22:54], frame[20]
        end = 54 + int.from_bytes(frame[18:20], "big")
    pseudo = addresses + struct.pack(">II", end - start, protocol)
    return words_sum([pseudo, frame[start:end]]) == 0xFFFF
