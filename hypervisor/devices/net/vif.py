"""One nic in the driver process: its rings, its socket to the switch, its multicast filter."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.devices.driver import DeviceBroken, EventPort, GuestLink, LinkClosed, LinkError, Loop, Page
from hypervisor.devices.net.headers import Frame
from hypervisor.devices.net.outbox import Outbox
from hypervisor.devices.net.receive import Offloads, Queue, Receiver
from hypervisor.devices.net.rings import Journal, RxRing, TxRing
from hypervisor.devices.net.transmit import Transmitter

MAX_MULTICAST = 64
"""As netback's XEN_NETBK_MCAST_MAX."""
BROADCAST = b"\xff" * 6

Guard = Callable[[Callable[[], None]], Callable[[], None]]


class MulticastFilter:
    """Which multicast frames the guest wants (``request-multicast-control``).

    What it asked a driver before this one is not known: then all is let through, for good.
    """

    def __init__(self, wanted: bool) -> None:
        self._active = wanted
        self._addresses: set[bytes] = set()

    def change(self, address: bytes, add: bool) -> None:
        if not add:
            self._addresses.discard(address)
        elif len(self._addresses) < MAX_MULTICAST or address in self._addresses:
            self._addresses.add(address)
        else:
            self._active = False  # more than can be kept: better too much than too little

    def accepts(self, frame: Frame) -> bool:
        if not self._active or not frame[0] & 1:
            return True
        address = bytes(frame[:6])
        return address == BROADCAST or address in self._addresses


class Vif:
    """:param frontend: of `hypervisor.devices.net.frontend.read`.

    :param fds: the socket to the switch and the journals' memory; owned from here on.
    :param holding: what the guest sends is kept back (`outbox`), even when this is closed.
    :raises DeviceBroken: rings or event channels cannot be had.
    """

    def __init__(
        self,
        link: GuestLink,
        loop: Loop,
        frontend: Mapping[str, Any],
        fds: Sequence[int],
        guard: Guard,
        *,
        holding: bool = False,
    ) -> None:
        self._link = link
        self._loop = loop
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fds[0])
            sock.setblocking(False)
            self.outbox = Outbox(sock, loop, holding=holding)
            undo.callback(self.outbox.part)
            undo.callback(os.close, fds[1])
            memory = undo.enter_context(mmap.mmap(fds[1], len(frontend["queues"]) * Journal.BYTES))
            try:
                self._connect(undo, frontend, sock, memory, guard)
            except LinkClosed:
                raise
            except LinkError as exc:
                raise DeviceBroken(str(exc)) from exc
            self._undo = undo.pop_all()

    def _connect(
        self,
        undo: contextlib.ExitStack,
        frontend: Mapping[str, Any],
        sock: socket.socket,
        memory: mmap.mmap,
        guard: Guard,
    ) -> None:
        self._multicast = MulticastFilter(frontend["multicast"])
        self._transmitters: list[Transmitter] = []
        self._journals: list[memoryview] = []
        queues: list[Queue] = []
        whole = undo.enter_context(memoryview(memory))
        for number, nodes in enumerate(frontend["queues"]):
            journal = undo.enter_context(whole[number * Journal.BYTES : (number + 1) * Journal.BYTES])
            self._journals.append(journal)
            pages = self._link.map([nodes["tx_ref"], nodes["rx_ref"]])
            undo.callback(self._unmap, pages)
            rx_ring = RxRing(pages[1].view, Journal(journal))
            undo.callback(rx_ring.close)
            tx_ring = TxRing(pages[0].view)
            undo.callback(tx_ring.close)
            if tx_ring.produced:
                self._multicast = MulticastFilter(False)
            tx_event = self._bind(undo, nodes["tx_port"])
            rx_event = tx_event if nodes["rx_port"] == nodes["tx_port"] else self._bind(undo, nodes["rx_port"])
            queues.append(Queue(rx_ring, rx_event))
            self._transmitters.append(
                Transmitter(self._link, self._loop, tx_ring, tx_event, self.outbox, self._multicast.change, guard)
            )
            undo.callback(self._transmitters[-1].close)
        self._receiver = Receiver(
            self._link, self._loop, queues, sock, Offloads(**frontend["offloads"]), self._multicast.accepts, guard
        )
        undo.callback(self._receiver.close)
        for transmitter, queue, nodes in zip(self._transmitters, queues, frontend["queues"], strict=True):
            split = nodes["rx_port"] != nodes["tx_port"]
            self._listen(undo, transmitter.event, guard, [transmitter.work, *([] if split else [self._receiver.work])])
            if split:
                self._listen(undo, queue.event, guard, [self._receiver.work])
        self.outbox.on_room = guard(self._send_on)
        self._loop.call_soon(guard(self._start))

    def _send_on(self) -> None:
        for transmitter in self._transmitters:
            transmitter.work()

    def _start(self) -> None:
        """What lies in the rings already; requests that a driver before this one had taken, too.

        That one may have been killed between publishing responses and telling of them: so the guest is told anyway.
        """
        for transmitter in self._transmitters:
            transmitter.work()
            transmitter.event.notify()
        self._receiver.work()
        self._receiver.notify()

    def _bind(self, undo: contextlib.ExitStack, port: int) -> EventPort:
        event = self._link.bind(port)
        undo.callback(self._unbind, event)
        return event

    def _unbind(self, event: EventPort) -> None:
        with contextlib.suppress(LinkClosed):
            self._link.unbind(event)

    def _unmap(self, pages: Sequence[Page]) -> None:
        with contextlib.suppress(LinkClosed):
            self._link.unmap(pages)

    def _listen(
        self, undo: contextlib.ExitStack, event: EventPort, guard: Guard, work: list[Callable[[], None]]
    ) -> None:
        def notified() -> None:
            event.answer()
            for call in work:
                call()

        fd = event.fileno()
        self._loop.add_reader(fd, guard(notified))
        undo.callback(self._loop.remove_reader, fd)

    def leave(self) -> None:
        """Hand the guest what has come for it, as far as it has room, and leave the rings to another driver."""
        self._receiver.work()
        self._journals = []
        self._undo.close()

    def close(self) -> None:
        """Give the rings up: the front end makes new ones."""
        for journal in self._journals:
            Journal(journal).store(0, [])
        self._journals = []
        self._undo.close()

    def stats(self) -> dict[str, int]:
        sent = [transmitter.counters for transmitter in self._transmitters]
        received = self._receiver.counters
        return {
            "rx_bytes": received.bytes,
            "rx_packets": received.packets,
            "rx_dropped": received.dropped,
            "tx_bytes": sum(one.bytes for one in sent),
            "tx_packets": sum(one.packets for one in sent),
            "tx_dropped": sum(one.dropped for one in sent),
        }
