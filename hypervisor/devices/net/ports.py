"""The switch's ports: sockets of driver processes, TAPs, slirp4netns.

None of them ever makes the switch wait: what does not go out at once is kept, up to `QUEUE_BYTES`, or dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hypervisor.devices.net import offload
from hypervisor.devices.net.announce import announcements
from hypervisor.devices.net.coalesce import Coalescer
from hypervisor.devices.net.guard import Guard
from hypervisor.devices.net.message import HEADER_BYTES, MAX_MESSAGE, Header
from hypervisor.devices.net.pacing import Pace
from hypervisor.devices.net.switch import Network

QUEUE_BYTES = 1 << 20
BUDGET = 32
"""Frames that are taken from a port before the others have their turn."""
RETRY_SECONDS = 0.0005
_FRAME_COST = 256  # what a queued frame takes besides its bytes


def adopt(fd: int) -> socket.socket:
    """A socket object of a SOCK_SEQPACKET socket, made without asking the kernel: a sandbox forbids to."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)


class Timers(Protocol):
    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...

    def remove_reader(self, fd: int) -> None: ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]: ...


@dataclasses.dataclass(slots=True)
class PortCounters:
    """`in_*` is what came into the switch there."""

    in_packets: int = 0
    in_bytes: int = 0
    out_packets: int = 0
    out_bytes: int = 0
    dropped: int = 0


class BasePort:
    """What all ports share: turns, the queue, limits.

    :ivar hungup: nobody is at the other end any more.
    :param limits: JSON of `Limits`; frames from there wait in the socket, frames to there in the queue.
    """

    guard: Guard | None = None
    overhead = HEADER_BYTES  # of what is written there
    budget = BUDGET

    def __init__(self, fd: int, network: Network, loop: Timers, limits: Mapping[str, Any] | None = None) -> None:
        self.counters = PortCounters()
        self.hungup = False
        self._fd = fd
        self._network = network
        self._loop = loop
        self._buffer = memoryview(bytearray(MAX_MESSAGE))
        self._in = Pace(limits or {}, time.monotonic)
        self._out = Pace(limits or {}, time.monotonic)
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._cancel_flush: Callable[[], None] | None = None
        self._cancel_pause: Callable[[], None] | None = None
        loop.add_reader(fd, self._readable)

    def close(self) -> None:
        self._network.remove(self)
        self._loop.remove_reader(self._fd)
        for cancel in (self._cancel_flush, self._cancel_pause):
            if cancel is not None:
                cancel()
        self._close()

    def deliver(self, header: Header, data: memoryview) -> None:
        """See `hypervisor.devices.net.switch.Port`."""
        self._post(data)

    # -- into the switch

    def _readable(self) -> None:
        for _ in range(self.budget):
            try:
                count = self._read(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if not count:
                self._hangup()
                break
            self.counters.in_packets += 1
            self.counters.in_bytes += count - HEADER_BYTES
            self._take(self._buffer[:count])
            if self._in.limited:
                self._in.take(count - HEADER_BYTES)
                if self._pause():
                    break
        self._taken()

    def _take(self, data: memoryview) -> None:
        """A message has come."""
        self._network.receive(self, data)

    def _taken(self) -> None:
        """For now these were all."""

    def _pause(self) -> bool:
        delay = self._in.delay()
        if delay:
            self._loop.remove_reader(self._fd)
            self._cancel_pause = self._loop.call_later(delay, self._resume)
        return bool(delay)

    def _resume(self) -> None:
        self._cancel_pause = None
        self._loop.add_reader(self._fd, self._readable)

    def _hangup(self) -> None:
        """The other end is gone for good: the host process will take the port away."""
        self.hungup = True
        self._loop.remove_reader(self._fd)

    # -- out of the switch

    def _post(self, data: memoryview | bytes) -> None:
        if not self._queue and self._try(data):
            return
        if self._queued + len(data) + _FRAME_COST > QUEUE_BYTES:
            self.counters.dropped += 1
            return
        self._queue.append(bytes(data))
        self._queued += len(data) + _FRAME_COST
        if self._cancel_flush is None:
            self._later()

    def _try(self, data: memoryview | bytes) -> bool:
        """False: not now."""
        if self._out.limited and self._out.delay():
            return False
        try:
            self._write(data)
        except BlockingIOError:
            return False
        except OSError:
            self.counters.dropped += 1  # what the kernel refuses, or nobody there
            return True
        self._out.take(len(data) - self.overhead)
        self.counters.out_packets += 1
        self.counters.out_bytes += len(data) - self.overhead
        return True

    def _later(self) -> None:
        self._cancel_flush = self._loop.call_later(max(RETRY_SECONDS, self._out.delay()), self._flush)

    def _flush(self) -> None:
        self._cancel_flush = None
        while self._queue:
            if not self._try(self._queue[0]):
                self._later()
                return
            self._queued -= len(self._queue.popleft()) + _FRAME_COST

    # -- the kernel

    def _read(self, buffer: memoryview) -> int:
        """A message into `buffer`; its length."""
        raise NotImplementedError

    def _write(self, data: memoryview | bytes) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class NicPort(BasePort):
    """A driver process's socket."""

    def __init__(
        self, fd: int, network: Network, loop: Timers, mac: bytes, addresses: list[str], limits: Mapping[str, Any]
    ) -> None:
        """:raises ValueError: an address is none, or the MAC is in use."""
        self.guard = Guard(mac, addresses)
        self._announcements = announcements(mac, addresses)
        network.add_nic(mac, self)
        self._sock = adopt(fd)
        self._sock.setblocking(False)
        super().__init__(fd, network, loop, limits)

    def announce(self) -> None:
        """Tell all others where its MAC is."""
        for frame in self._announcements:
            self._network.announce(self, frame)

    def _read(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def _write(self, data: memoryview | bytes) -> None:
        self._sock.send(data)

    def _close(self) -> None:
        self._sock.close()


class TapPort(BasePort):
    """A TAP with IFF_VNET_HDR: it speaks our messages."""

    def __init__(self, fd: int, network: Network, loop: Timers) -> None:
        network.add_uplink(self)
        os.set_blocking(fd, False)
        super().__init__(fd, network, loop)

    def _read(self, buffer: memoryview) -> int:
        return os.readv(self._fd, [buffer])

    def _write(self, data: memoryview | bytes) -> None:
        os.write(self._fd, data)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


class _BarePort(BasePort):
    """What takes frames without a header only: of at most the network's MTU, with checksums."""

    overhead = 0

    def deliver(self, header: Header, data: memoryview) -> None:
        frames = offload.plain(header, data[HEADER_BYTES:])
        if frames is None:
            self.counters.dropped += 1
            return
        for frame in frames:
            self._post(memoryview(frame))

    def _read(self, buffer: memoryview) -> int:
        count = self._receive(buffer[HEADER_BYTES:])
        return count + HEADER_BYTES if count else 0

    def _receive(self, buffer: memoryview) -> int:
        """A frame into `buffer`; its length."""
        raise NotImplementedError


class BareTapPort(_BarePort):
    """A TAP without offloads, for a switch beyond it that cannot do what the kernel does.

    What comes from there was checked by nobody: it is passed on as it is, its checksum for the guest to look at.
    """

    def __init__(self, fd: int, network: Network, loop: Timers) -> None:
        network.add_uplink(self)
        os.set_blocking(fd, False)
        super().__init__(fd, network, loop)

    def _receive(self, buffer: memoryview) -> int:
        return os.readv(self._fd, [buffer])

    def _write(self, data: memoryview | bytes) -> None:
        os.write(self._fd, data)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


class PlainPort(_BarePort):
    """slirp4netns: a SOCK_SEQPACKET socket of bare frames, whose checksums it has made itself."""

    budget = 2 * BUDGET  # some 90 KiB in frames of 1500 bytes: more than fits into a large one

    def __init__(self, fd: int, network: Network, loop: Timers) -> None:
        network.add_uplink(self)
        self._sock = adopt(fd)
        self._sock.setblocking(False)
        self._coalescer = Coalescer()
        super().__init__(fd, network, loop)

    def _take(self, data: memoryview) -> None:
        self._forward(self._coalescer.add(data[HEADER_BYTES:]))

    def _taken(self) -> None:
        self._forward(self._coalescer.flush())

    def _forward(self, data: bytearray | None) -> None:
        if data is not None:
            self._network.receive(self, memoryview(data))

    def _receive(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def _write(self, data: memoryview | bytes) -> None:
        self._sock.send(data)

    def _close(self) -> None:
        self._sock.close()
