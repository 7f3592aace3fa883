"""Devices without rings: what happens to them is written into the "image" by a real driver process.

The front end (a test) says in its node ``ring-ref``: a number, or ``refuse`` (the back end does not like
it), ``broken`` (the driver does not), ``later`` (the driver gives up soon), ``explode`` (the driver dies).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.devices.driver import Copy, DeviceBroken, EventPort, GuestLink, Loop, Opened, Page
from hypervisor.errors import ImageInUse, ImageInvalid, SpecInvalid


class NoLink:
    """A `GuestLink` of a guest that has neither grants nor ports."""

    domid = 0
    buffer = memoryview(b"")

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()

    def fileno(self) -> int:
        return self._near.fileno()

    def alive(self) -> bool:
        return True

    def map(self, refs: Sequence[int], *, readonly: bool = False) -> list[Page]:
        raise NotImplementedError

    def unmap(self, pages: Sequence[Page]) -> None:
        raise NotImplementedError

    def copy(self, copies: Sequence[Copy]) -> list[int]:
        raise NotImplementedError

    def bind(self, port: int) -> EventPort:
        raise NotImplementedError

    def unbind(self, event: EventPort) -> None:
        raise NotImplementedError


class ToyDriver:
    def __init__(self, link: GuestLink, loop: Loop, report: Callable[[int, str, str], None]) -> None:
        self._loop = loop
        self._report = report
        self._files: dict[int, int] = {}
        self._stats: dict[int, dict[str, int]] = {}

    def connect(self, devid: int, config: Mapping[str, Any], fds: Sequence[int]) -> None:
        self._files[devid] = fds[0]
        wish = config["frontend"]["ring"]
        self._note(devid, "connect", {"wish": wish, **config["device"]})
        if wish == "broken":
            raise DeviceBroken("the ring is broken")
        if wish == "explode":
            os.abort()
        if wish == "later":
            self._loop.call_later(0.01, lambda: self._report(devid, "broken", "index ran away"))
        self._stats[devid] = {"read_requests": 3}

    def update(self, devid: int, device: Mapping[str, Any]) -> None:
        self._note(devid, "update", device)

    def disconnect(self, devid: int) -> None:
        self._note(devid, "disconnect", {})
        self._stats.pop(devid, None)
        os.close(self._files.pop(devid))

    def stats(self) -> dict[int, dict[str, int]]:
        return self._stats

    def _note(self, devid: int, what: str, more: Mapping[str, Any]) -> None:
        line = json.dumps({"what": what, "devid": devid, "pid": os.getpid(), **more})
        os.write(self._files[devid], line.encode() + b"\n")


class ToyBackend:
    """The size of a disk is said in its file's name, after the last dot. Only one domain may have it open."""

    kind = "disk"
    type = "vbd"
    driver = "toy_device:ToyDriver"

    def __init__(self, settings: Any) -> None:
        self._users: dict[str, str] = {}

    async def open(self, domain: str, domid: int, spec: Any) -> Opened:
        if not os.path.exists(getattr(spec, "path", "/")):
            raise ImageInvalid(f"image {spec.path} is not there: give one that is")
        path = getattr(spec, "path", "nic")
        if self._users.get(path, domain) != domain:
            raise ImageInUse(f"image {path} is used by domain {self._users[path]}: detach it there")
        self._users[path] = domain
        size = int(path.rpartition(".")[2]) * 512

        def fds() -> list[int]:
            return [os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)]

        return Opened(
            config={"size": size},
            nodes={"feature-flush-cache": "1"},
            connected={"sectors": str(size // 512), "sector-size": "512"},
            frontend={"virtual-device": str(spec.devid), "device-type": "disk"},
            fds=fds,
            close=lambda: self._users.pop(path, None) and None,
            size_bytes=size,
        )

    async def check(self, domain: str, spec: Any) -> int:
        path = getattr(spec, "path", "nic.0")
        if not os.path.exists(getattr(spec, "path", "/")):
            raise ImageInvalid(f"image {path} is not there: give one that is")
        return int(path.rpartition(".")[2]) * 512

    def frontend(self, read: Callable[[str], str | None]) -> dict[str, Any]:
        ring = read("ring-ref")
        if ring is None or ring == "refuse":
            raise DeviceBroken(f"ring-ref is {ring!r}")
        return {"ring": ring}

    async def resize(self, opened: Opened, spec: Any, size_bytes: int) -> dict[str, str]:
        if size_bytes < opened.size_bytes:
            raise SpecInvalid(f"size_bytes is {size_bytes}: give at least {opened.size_bytes}")
        opened.size_bytes = size_bytes
        opened.config["size"] = size_bytes
        opened.connected["sectors"] = str(size_bytes // 512)
        return {"sectors": str(size_bytes // 512)}


class ToyNics(ToyBackend):
    kind = "nic"
    type = "vif"

    async def open(self, domain: str, domid: int, spec: Any) -> Opened:
        return Opened({}, {}, {}, {"mac": spec.mac}, lambda: [os.open(os.devnull, os.O_WRONLY)], lambda: None)
