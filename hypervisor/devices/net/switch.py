"""A learning switch: which ports a frame goes to. Pure; ports and clock are given.

A network is a broadcast domain; nothing crosses to another. Ports are of two kinds:

- a *nic's* has one MAC, known and checked, so nothing is learnt there, no other port can take it over, and frames for
  unknown addresses never go there;
- an *uplink's* has what is behind it: its addresses are learnt, bounded and forgotten after `AGE` seconds.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from hypervisor.devices.net import message
from hypervisor.devices.net.guard import Guard
from hypervisor.devices.net.message import HEADER_BYTES, Header

AGE = 300.0
"""Seconds, as IEEE 802.1Q's default."""
MAX_LEARNT = 4096
"""Of one network; the one not heard of for longest is forgotten."""

_CONTROL = b"\x01\x80\xc2\x00\x00"


class Port(Protocol):
    """:ivar guard: of a nic's port; None: an uplink's."""

    guard: Guard | None

    def deliver(self, header: Header, data: memoryview) -> None:
        """Send a message on (`message`), or drop it; never wait. `data` is valid during the call only."""


@dataclasses.dataclass(slots=True)
class Counters:
    """
    :ivar forwarded: frames sent on. :ivar filtered: with nobody to go to.
    :ivar spoofed: with an address that is not the sender's. :ivar malformed: no frame, or a header that lies.
    """

    forwarded: int = 0
    spoofed: int = 0
    malformed: int = 0
    filtered: int = 0


class Network:
    """One broadcast domain."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = Counters()
        self._clock = clock
        self._nics: dict[bytes, Port] = {}
        self._uplinks: list[Port] = []
        self._learnt: OrderedDict[bytes, tuple[Port, float]] = OrderedDict()

    def add_nic(self, mac: bytes, port: Port) -> None:
        """:raises ValueError: the network has a nic of this MAC."""
        if mac in self._nics:
            raise ValueError(f"MAC {mac.hex(':')} is there already")
        self._nics[mac] = port
        self._learnt.pop(mac, None)

    def add_uplink(self, port: Port) -> None:
        self._uplinks.append(port)

    def remove(self, port: Port) -> None:
        """A port, and what was learnt there."""
        self._nics = {mac: other for mac, other in self._nics.items() if other is not port}
        self._uplinks = [other for other in self._uplinks if other is not port]
        for mac in [mac for mac, (other, _) in self._learnt.items() if other is port]:
            del self._learnt[mac]

    @property
    def learnt(self) -> int:
        return len(self._learnt)

    def receive(self, source: Port, data: memoryview) -> None:
        """A message that arrived at a port."""
        size = len(data) - HEADER_BYTES
        counters = self.counters
        if not message.MIN_FRAME <= size <= message.MAX_FRAME:
            counters.malformed += 1
            return
        header = message.parse(data)
        if (header.flags or header.gso_type) and not message.sane(header, size):
            counters.malformed += 1
            return
        frame = data[HEADER_BYTES:]
        if source.guard is None:
            if not self._learn(source, bytes(frame[6:12])):
                counters.spoofed += 1
                return
        elif not source.guard.allows(frame):
            counters.spoofed += 1
            return
        targets = self._targets(source, bytes(frame[:6]))
        if not targets:
            counters.filtered += 1
        for port in targets:
            counters.forwarded += 1
            port.deliver(header, data)

    def announce(self, source: Port, data: bytes) -> None:
        """Send a message of our own making to all ports but one, as if it came from there."""
        for port in (*self._nics.values(), *self._uplinks):
            if port is not source:
                port.deliver(message.NO_OFFLOAD, memoryview(data))

    def _targets(self, source: Port, mac: bytes) -> list[Port]:
        nic = self._nics.get(mac)
        if nic is not None:
            return [nic] if nic is not source else []
        if mac[0] & 1:
            if mac[:5] == _CONTROL:  # a bridge does not pass these on (IEEE 802.1Q, table 8-1)
                return []
            return [port for port in (*self._nics.values(), *self._uplinks) if port is not source]
        known = self._learnt.get(mac)
        if known is not None and self._clock() - known[1] <= AGE:
            return [known[0]] if known[0] is not source else []
        return [port for port in self._uplinks if port is not source]

    def _learn(self, port: Port, mac: bytes) -> bool:
        """False: no frame of an uplink can have this source address."""
        if mac[0] & 1 or mac in self._nics:
            return False
        self._learnt[mac] = (port, self._clock())
        self._learnt.move_to_end(mac)
        if len(self._learnt) > MAX_LEARNT:
            self._learnt.popitem(last=False)
        return True
