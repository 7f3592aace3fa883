"""Nics in the host process: `hypervisor.devices.driver.Backend` for netif."""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hypervisor.devices.driver import Opened
from hypervisor.devices.net import frontend, networks
from hypervisor.devices.net.keeper import SwitchKeeper
from hypervisor.devices.net.rings import Journal
from hypervisor.errors import DeviceExists, NetworkUnknown, Unsupported


class Settings(Protocol):
    """What it needs of the host's settings."""

    @property
    def state_dir(self) -> Path: ...

    @property
    def networks(self) -> Sequence[str]: ...

    @property
    def sandbox(self) -> str: ...

    @property
    def log_level(self) -> int: ...


class Nic(Protocol):
    """`hypervisor.toolstack.devices.NicSpec`."""

    id: int
    mac: str
    network: str
    addresses: tuple[str, ...]
    queues: int
    limits: Any


FEATURES = {
    "feature-rx-copy": "1",
    "feature-rx-flip": "0",
    "feature-sg": "1",
    "feature-gso-tcpv4": "1",
    "feature-gso-tcpv6": "1",
    "feature-ipv6-csum-offload": "1",
    "feature-multicast-control": "1",
    "feature-split-event-channels": "1",
}
"""public/io/netif.h. No control ring is offered, so hashing stays the front end's own."""


class NetBackend:
    """:raises SpecInvalid: the host's networks make no sense."""

    kind = "nic"
    type = "vif"
    driver = "hypervisor.devices.net.driver:NetDriver"

    def __init__(self, settings: Settings) -> None:
        self._networks = networks.parse(settings.networks)
        self.switch = SwitchKeeper(settings.state_dir / "net", sandbox=settings.sandbox, log_level=settings.log_level)
        self._macs: dict[tuple[str, str], str] = {}  # (network, MAC) → port

    async def open(self, domain: str, domid: int, spec: Nic) -> Opened:
        """:raises NetworkUnknown: no such network, or it cannot be had here. :raises DeviceExists: the MAC is taken."""
        network = self._look(domain, spec)
        port, place = f"{domain}/{spec.id}", (spec.network, spec.mac)
        self._macs[place] = port
        try:
            limits = dataclasses.asdict(spec.limits)
            await self.switch.add(port, network, spec.mac, list(spec.addresses), limits)
        except BaseException:
            del self._macs[place]
            raise
        journal = os.memfd_create("nic-journal", os.MFD_CLOEXEC)
        os.ftruncate(journal, frontend.MAX_QUEUES * Journal.BYTES)

        def close() -> None:
            self._macs.pop(place, None)
            self.switch.remove(port)
            os.close(journal)

        def leave() -> dict[str, Any]:
            content = os.pread(journal, frontend.MAX_QUEUES * Journal.BYTES, 0).rstrip(b"\0")
            return {"journal": base64.b64encode(content).decode()}

        def arrive(carried: Mapping[str, Any]) -> None:
            content = base64.b64decode(str(carried.get("journal", "")))
            os.pwrite(journal, content[: frontend.MAX_QUEUES * Journal.BYTES], 0)
            self.switch.announce(port)

        return Opened(
            config={},
            nodes={**FEATURES, "multi-queue-max-queues": str(spec.queues)},
            connected={"hotplug-status": "connected"},
            frontend={"mac": spec.mac, "handle": str(spec.id)},
            fds=lambda: (self.switch.socket_of(port), os.dup(journal)),
            close=close,
            leave=leave,
            arrive=arrive,
        )

    async def check(self, domain: str, spec: Nic) -> int:
        """The switch and the network's uplink are started. :raises NetworkUnknown, DeviceExists: as `open`."""
        await self.switch.join(self._look(domain, spec))
        return 0

    def _look(self, domain: str, spec: Nic) -> networks.NetworkConfig:
        network = self._networks.get(spec.network)
        if network is None:
            known = ", ".join(sorted(self._networks)) or "none"
            raise NetworkUnknown(
                f"network {spec.network!r} is not configured on this host: it has {known}; see networks"
            )
        port = f"{domain}/{spec.id}"
        if self._macs.get((spec.network, spec.mac), port) != port:
            raise DeviceExists(f"MAC {spec.mac} is in use on network {spec.network}: give another one")
        return network

    def frontend(self, read: Callable[[str], str | None]) -> dict[str, Any]:
        """:raises DeviceBroken: the nodes make no sense."""
        return frontend.read(read, frontend.MAX_QUEUES)

    async def resize(self, opened: Opened, spec: Any, size_bytes: int) -> dict[str, str]:
        raise Unsupported("a nic has no size")

    def let_go(self) -> None:
        """The host process ends; guests stay connected."""
        self.switch.let_go()

    async def close(self) -> None:
        """End switch and uplinks."""
        await self.switch.close()
