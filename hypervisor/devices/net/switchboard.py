"""What the host process tells the switch process, and how that follows it.

Messages are JSON objects, one a datagram of a SOCK_SEQPACKET socket, with at most one descriptor::

    {"op": "network", "name", "uplink": "tap" | "bare-tap" | "plain" | ""}   + its descriptor; again: another uplink
    {"op": "nic", "port", "network", "mac", "addresses", "limits"}    + its socket; again: another one
    {"op": "announce", "port"}                                        the nic came from another host
    {"op": "remove", "port"}
    {"op": "stats", "id"}   answered with {"id", "networks", "ports"}
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from hypervisor.devices.net.ports import BareTapPort, BasePort, NicPort, PlainPort, TapPort, Timers
from hypervisor.devices.net.switch import Network

LOG = logging.getLogger(__name__)

MAX_MESSAGE = 1 << 16
ANNOUNCE_AGAIN = (0.05, 0.2, 0.5, 1.0)
"""Seconds after the first announcement of a nic that came from another host."""

_UPLINKS: dict[str, Callable[[int, Network, Timers], BasePort]] = {
    "tap": TapPort,
    "bare-tap": BareTapPort,
    "plain": PlainPort,
}


class Switchboard:
    """:raises ValueError, KeyError: from `handle`, a message that makes no sense; nothing has changed then."""

    def __init__(self, loop: Timers, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = loop
        self._clock = clock
        self._networks: dict[str, Network] = {}
        self._uplinks: dict[str, BasePort] = {}
        self._nics: dict[str, NicPort] = {}

    @property
    def nics(self) -> int:
        """Those that somebody may still use."""
        return sum(not port.hungup for port in self._nics.values())

    def handle(self, message: Mapping[str, Any], fd: int | None) -> dict[str, Any] | None:
        """Do what a message says; the answer, if it wants one. The descriptor belongs to the switchboard."""
        op = message["op"]
        try:
            if op == "network":
                self._network(message["name"], message["uplink"], fd)
                fd = None
            elif op == "nic" and fd is not None:
                self._nic(message, fd)
                fd = None
            elif op == "announce":
                self._announce(message["port"])
            elif op == "remove":
                self._remove(message["port"])
            elif op == "stats":
                return {"id": message["id"], **self._stats()}
            else:
                raise ValueError(f"op {op!r}, descriptor {fd}")
        finally:
            if fd is not None:
                os.close(fd)
        return None

    def _network(self, name: str, uplink: str, fd: int | None) -> None:
        if name not in self._networks:
            self._networks[name] = Network(self._clock)
        before = self._uplinks.pop(name, None)
        if before is not None:
            before.close()
        if uplink and fd is not None:
            self._uplinks[name] = _UPLINKS[uplink](fd, self._networks[name], self._loop)

    def _nic(self, message: Mapping[str, Any], fd: int) -> None:
        self._remove(message["port"])
        self._nics[message["port"]] = NicPort(
            fd,
            self._networks[message["network"]],
            self._loop,
            bytes.fromhex(message["mac"].replace(":", "")),
            list(message["addresses"]),
            message["limits"],
        )

    def _announce(self, name: str) -> None:
        """At once, and some more times, for what was not ready to hear it."""
        port = self._nics[name]

        def announce() -> None:
            if self._nics.get(name) is port:
                port.announce()

        announce()
        for seconds in ANNOUNCE_AGAIN:
            self._loop.call_later(seconds, announce)

    def _remove(self, name: str) -> None:
        port = self._nics.pop(name, None)
        if port is not None:
            port.close()

    def _stats(self) -> dict[str, Any]:
        ports = {**self._nics, **{f"uplink {name}": port for name, port in self._uplinks.items()}}
        return {
            "networks": {name: dataclasses.asdict(network.counters) for name, network in self._networks.items()},
            "ports": {name: dataclasses.asdict(port.counters) for name, port in ports.items()},
        }
