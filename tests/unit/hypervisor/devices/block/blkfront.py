"""A block front end without a kernel, on a fake guest; and a loop that a test turns by hand."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_link import FakeGuest, FakeLink

from hypervisor.devices.block.driver import BlockDriver
from hypervisor.devices.block.frontend import read_frontend
from hypervisor.devices.block.ring import LAYOUTS, ring_size

PAGE, SECTOR = 4096, 512
RESPONSES = {"x86_64-abi": struct.Struct("<QBxh4x"), "x86_32-abi": struct.Struct("<QBxh")}
Seg = tuple[int, int, int]


def pattern(number: int, size: int = PAGE) -> bytes:
    return bytes((number * 7 + at * 13) & 0xFF for at in range(size))


class HandLoop:
    """A `hypervisor.devices.driver.Loop` whose time stands still between `run`s."""

    def __init__(self) -> None:
        self.now = 0.0
        self._readers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._numbers = itertools.count()

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self._readers.pop(fd, None)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        entry = [callback]
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), entry))
        return entry.clear

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_later(0.0, callback)

    def run(self, wait: float = 0.0) -> None:
        """Until nothing is to be done now. :param wait: real seconds to wait for a descriptor."""
        while True:
            ready = select.select(list(self._readers), [], [], wait)[0] if self._readers else []
            for fd in ready:
                if fd in self._readers:
                    self._readers[fd]()
            due = 0
            while self._timers and self._timers[0][0] <= self.now:
                for callback in heapq.heappop(self._timers)[2]:
                    due += 1
                    callback()
            if not ready and not due:
                return

    def next_timer(self) -> float | None:
        """When the next one is due."""
        while self._timers and not self._timers[0][2]:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None


class Front:
    """One disk's front end; `queue` by number. Requests are pushed at once, `answers` takes what came back."""

    def __init__(
        self, guest: FakeGuest, *, abi: str = "x86_64-abi", order: int = 0, persistent: bool = True, queues: int = 1
    ) -> None:
        self.guest = guest
        self.abi = abi
        self.layout = LAYOUTS[abi]
        self.size = ring_size(1 << order, self.layout)
        self.persistent = persistent
        self.rings = [[guest.grant() for _ in range(1 << order)] for _ in range(queues)]
        self.ports = [guest.open_port() for _ in range(queues)]
        self.produced = [0] * queues
        self.consumed = [0] * queues
        self.ids = itertools.count(100)
        self.connection = read_frontend(self.node)

    def node(self, name: str) -> str | None:
        nodes = {"protocol": self.abi, "feature-persistent": "1" if self.persistent else "0"}
        pages = len(self.rings[0])
        if pages > 1:
            nodes["ring-page-order"] = str(pages.bit_length() - 1)
        if len(self.rings) > 1:
            nodes["multi-queue-num-queues"] = str(len(self.rings))
        for number, refs in enumerate(self.rings):
            prefix = f"queue-{number}/" if len(self.rings) > 1 else ""
            nodes[f"{prefix}event-channel"] = str(self.ports[number])
            for page, ref in enumerate(refs):
                nodes[f"{prefix}ring-ref{page if pages > 1 else ''}"] = str(ref)
        return nodes.get(name)

    # -- the ring's memory, whose pages need not lie side by side

    def poke(self, at: int, data: bytes, queue: int = 0) -> None:
        page, offset = divmod(at, PAGE)
        here = min(len(data), PAGE - offset)
        self.guest.granted(self.rings[queue][page])[offset : offset + here] = data[:here]
        if here < len(data):
            self.guest.granted(self.rings[queue][page + 1])[: len(data) - here] = data[here:]

    def peek(self, at: int, count: int, queue: int = 0) -> bytes:
        page, offset = divmod(at, PAGE)
        data = bytes(self.guest.granted(self.rings[queue][page])[offset : offset + count])
        return (
            data + bytes(self.guest.granted(self.rings[queue][page + 1])[: count - len(data)])
            if len(data) < count
            else data
        )

    def index(self, number: int, queue: int = 0) -> int:
        return int.from_bytes(self.peek(4 * number, 4, queue), "little")

    def set_index(self, number: int, value: int, queue: int = 0) -> None:
        self.poke(4 * number, (value & 0xFFFF_FFFF).to_bytes(4, "little"), queue)

    def slot_at(self, index: int) -> int:
        return 64 + (index & (self.size - 1)) * self.layout.slot

    # -- requests

    def put(self, slot: bytes, queue: int = 0, *, notify: bool = True) -> None:
        self.poke(self.slot_at(self.produced[queue]), slot.ljust(self.layout.slot, b"\0"), queue)
        self.produced[queue] += 1
        self.set_index(0, self.produced[queue], queue)
        if notify:
            self.guest.notify(self.ports[queue])

    def request(
        self, op: int, sector: int, segments: Sequence[Seg] = (), *, declared: int | None = None, **kw: Any
    ) -> int:
        ident = next(self.ids)
        head = self.layout.head.pack(op, len(segments) if declared is None else declared, 51712, ident, sector)
        body = b"".join(struct.pack("<IBBxx", *segment) for segment in segments)
        self.put(head + body, **kw)
        return ident

    def indirect(self, op: int, sector: int, segments: Sequence[Seg], *, count: int | None = None, **kw: Any) -> int:
        ident = next(self.ids)
        body = b"".join(struct.pack("<IBBxx", *segment) for segment in segments)
        refs = [self.guest.grant(self.guest.new_frame(body[at : at + PAGE])) for at in range(0, len(body), PAGE)]
        count = len(segments) if count is None else count
        slot = bytearray(self.layout.slot)
        self.layout.head.pack_into(slot, 0, 6, op, count, ident, sector)
        struct.pack_into(f"<{len(refs)}I", slot, self.layout.references, *refs)
        self.put(bytes(slot), **kw)
        return ident

    def discard(self, sector: int, count: int, **kw: Any) -> int:
        ident = next(self.ids)
        self.put(self.layout.head.pack(5, 0, 0, ident, sector) + struct.pack("<Q", count), **kw)
        return ident

    def answers(self, queue: int = 0) -> list[tuple[int, int, int]]:
        """(id, operation, status) that came since the last call."""
        found = []
        end = self.index(2, queue)
        while self.consumed[queue] != end:
            pack = RESPONSES[self.abi]
            found.append(pack.unpack(self.peek(self.slot_at(self.consumed[queue]), pack.size, queue)))
            self.consumed[queue] += 1
        self.set_index(3, self.consumed[queue] + 1, queue)
        return found


class Rig:
    """A guest, its driver and a raw image."""

    def __init__(self, folder: Path, *, sectors: int = 2048, **kw: Any) -> None:
        self.path = folder / "disk.img"
        self.path.write_bytes(bytes(sectors * SECTOR))
        self.journal = folder / "ring"
        self.guest = FakeGuest(**kw)
        self.loop = HandLoop()
        self.reports: list[tuple[int, str, str]] = []
        self.device: dict[str, Any] = {
            "kind": "raw",
            "sectors": sectors,
            "readonly": False,
            "direct": False,
            "discard": True,
            "limits": {},
        }
        self.link: FakeLink
        self.driver: BlockDriver
        self.start()

    def start(self) -> None:
        """A new driver process."""
        self.link = self.guest.link()
        self.loop = HandLoop()
        self.driver = BlockDriver(self.link, self.loop, lambda *what: self.reports.append(what))

    def kill(self) -> None:
        self.link.close()
        self.start()

    def connect(self, front: Front, devid: int = 51712, path: Path | None = None, **device: Any) -> None:
        self.device |= device
        fd = os.open(path or self.path, os.O_RDONLY if self.device["readonly"] else os.O_RDWR)
        self.connect_fd(front, fd, devid)

    def connect_fd(self, front: Front, fd: int, devid: int = 51712, more: Sequence[int] = ()) -> None:
        journal = os.open(f"{self.journal}-{devid}", os.O_RDWR | os.O_CREAT, 0o600)
        config: Mapping[str, Any] = {"frontend": front.connection, "device": dict(self.device)}
        self.driver.connect(devid, config, [fd, journal, *more])

    def data(self) -> bytes:
        return self.path.read_bytes()
