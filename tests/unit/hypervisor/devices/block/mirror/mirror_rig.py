"""Two hosts' back ends, a driver on the source's disk, and a link between them that a test can look into and cut."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from blkfront import PAGE, Front, HandLoop
from fake_link import FakeGuest

from hypervisor.devices.block.backend import BlockBackend
from hypervisor.devices.block.driver import BlockDriver
from hypervisor.devices.block.mirror.copied import SourceDisk
from hypervisor.devices.block.mirror.images import Copy, DiskAnswer, DiskOffer, choose, describe, digest, survey
from hypervisor.devices.block.mirror.source import MirrorSource
from hypervisor.devices.block.mirror.target import Candidate, MirrorTarget
from hypervisor.devices.driver import Opened
from hypervisor.errors import HostUnavailable, MigrationFailed
from hypervisor.toolstack.devices import DiskSpec

DEVID = 51712
HAS_QEMU = all(shutil.which(name) for name in ("qemu-img", "qemu-storage-daemon"))
needs_qemu = pytest.mark.skipif(not HAS_QEMU, reason="qemu-utils and qemu-system-common are not installed")
FORMATS = ["raw", pytest.param("qcow2", marks=needs_qemu)]


class Killed(BaseException):
    """The driver's process is gone in the middle of it."""


def die(*_: object) -> None:
    raise Killed


@dataclasses.dataclass
class Settings:
    state_dir: Path
    image_folders: tuple[str, ...] = ()


class End:
    """One end of a link. :ivar on_send: called before each message goes, and may change it."""

    def __init__(self) -> None:
        self.other: End
        self.on_send: Callable[[bytes], bytes] = lambda message: message
        self.count = 0
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._cut = False

    async def send(self, message: bytes | int) -> None:
        if isinstance(message, int):
            message = os.pread(message, os.fstat(message).st_size, 0)
        message = self.on_send(message)
        if self._cut:
            raise MigrationFailed("the connection to the other host is over")
        self.count += 1
        self.other._inbox.put_nowait(message)

    async def receive(self) -> bytes:
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
            raise MigrationFailed("the connection to the other host is over")
        return message

    def cut(self) -> None:
        for end in (self, self.other):
            end._cut = True
            end._inbox.put_nowait(None)


def pair() -> tuple[End, End]:
    one, other = End(), End()
    one.other, other.other = other, one
    return one, other


class Guest:
    """A guest that writes to one disk of the source's host, by a driver that can be killed."""

    def __init__(self, opened: Opened, seed: int = 1) -> None:
        self.opened = opened
        self.guest = FakeGuest(frames=4096)
        self.front = Front(self.guest)
        self.random = random.Random(seed)
        self.frames = [self.guest.new_frame() for _ in range(11)]
        self.refs = [self.guest.grant(frame) for frame in self.frames]
        self.driver: BlockDriver | None = None
        self.loop = HandLoop()
        self.link: Any = None
        self.served = True
        self.dies_moving = False

    def start(self) -> None:
        self.link = self.guest.link()
        self.loop = HandLoop()
        driver = BlockDriver(self.link, self.loop, lambda *what: None)
        driver.connect(
            DEVID, {"frontend": self.front.connection, "device": self.opened.config}, list(self.opened.fds())
        )
        self.driver = driver
        self.loop.run()

    def kill(self) -> None:
        if self.driver is not None:
            for disk in self.driver._disks.values():  # as the kernel closes what a killed process had
                if disk.image is not None:
                    disk.image.close()
            self.driver = None
            self.link.close()

    def disconnect(self) -> None:
        assert self.driver is not None
        self.driver.disconnect(DEVID)
        self.served = False

    async def ask(self, op: str, fds: Sequence[int]) -> dict[str, Any] | None:
        """As `hypervisor.host.device.Device.ask`."""
        if self.driver is None:
            if not self.served:
                return None
            raise HostUnavailable("the driver process is gone")
        if op == "track":
            self.driver.track(DEVID, None)
            return {}
        if self.dies_moving:
            self.dies_moving = False
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                patch.setattr("hypervisor.devices.block.written._either", die)
                self.driver.written(DEVID, os.dup(fds[0]))
            self.kill()
            raise HostUnavailable("the driver process is gone")
        return {"known": self.driver.written(DEVID, os.dup(fds[0]))}

    async def settle(self) -> None:
        """Until all requests are answered."""
        deadline = time.monotonic() + 20
        while self.front.index(2) != self.front.produced[0]:
            assert time.monotonic() < deadline, "requests are not answered"
            await asyncio.sleep(0.001)
            self.loop.run()

    def write(self, sector: int, byte: int, pages: int = 1) -> None:
        for frame in self.frames[:pages]:
            self.guest.page(frame)[:] = bytes([byte]) * PAGE
        self.front.request(1, sector, [(ref, 0, 7) for ref in self.refs[:pages]])
        self.loop.run()

    def something(self) -> None:
        """A random write or discard, if there is room in the ring."""
        if self.front.produced[0] - self.front.index(2) > self.front.size - 2:
            return
        sectors = self.opened.config["sectors"]
        dice = self.random.random()
        if dice < 0.2:
            first = self.random.randrange(sectors)
            self.front.discard(first, self.random.randint(1, min(2000, sectors - first)))
            self.loop.run()
        else:
            pages = self.random.randint(1, 11)
            first = self.random.randrange(sectors - pages * 8)
            self.write(first, self.random.choice([0, 0, 1, 2, 255]), pages)


class Rig:
    """:ivar plans: of the target, by disk."""

    def __init__(self, folder: Path) -> None:
        self.homes = [folder / name for name in ("source", "target")]
        for home in self.homes:
            (home / "images").mkdir(parents=True)
        self.backends = [BlockBackend(Settings(home)) for home in self.homes]
        self.near, self.far = pair()
        self.opened: list[Opened] = []
        self.guests: list[Guest] = []
        self.specs: list[DiskSpec] = []
        self.source: MirrorSource
        self.target: MirrorTarget
        self.serving: asyncio.Task[None]

    def image(self, name: str, kind: str, size: int, base: Path | None = None) -> Path:
        path = self.homes[0] / "images" / name
        if kind == "raw":
            with path.open("wb") as file:
                file.truncate(size)
        else:
            backing = ["-b", str(base), "-F", "raw"] if base is not None else []
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(path), str(size)], check=True)
        return path

    async def attach(self, path: Path, kind: str, **fields: Any) -> Guest:
        spec = DiskSpec(f"xvd{'abcd'[len(self.specs)]}", str(path), kind, **fields)  # type: ignore[arg-type]
        opened = await self.backends[0].open("d1", 3, spec)
        self.specs.append(spec)
        self.opened.append(opened)
        self.guests.append(Guest(opened, len(self.specs)))
        if not spec.readonly:
            self.guests[-1].start()
        else:
            self.guests[-1].served = False
        return self.guests[-1]

    def offer(self, number: int) -> DiskOffer:
        """As it comes to the target."""
        spec = self.specs[number]
        found = describe(spec.id, spec.path, spec.format, self.opened[number].size_bytes)
        return DiskOffer.from_json(json.loads(json.dumps(found.to_json())))

    def answer(self, number: int) -> DiskAnswer:
        """As it comes to the source."""
        found = survey(self.offer(number), [self.homes[1] / "images"], [])
        return DiskAnswer.from_json(json.loads(json.dumps(found.to_json())))

    async def begin(self, *, flatten: bool = False, copy: bool = False, rate: int = 0) -> None:
        """Both ends are ready, nothing is copied."""
        candidates, sources = [], []
        for number, spec in enumerate(self.specs):
            offer, answer = self.offer(number), self.answer(number)
            candidates.append(Candidate(offer, answer, spec))
            wanted = choose(offer, answer, flatten=flatten, copy=copy)
            files = [(file.path, file.format) for file in offer.files[1:]]
            if wanted is not Copy.NOTHING:
                hold, ask = self.backends[0].hold(self.opened[number]), self.guests[number].ask
                top = wanted is Copy.TOP
                compare = (lambda files=files: digest(files)) if top and answer.compare else None
                sources.append(SourceDisk(spec.id, hold, ask, spec.readonly, top, compare))
        self.target = MirrorTarget(self.backends[1], "d1", 3, candidates)
        self.serving = asyncio.get_running_loop().create_task(self.target.serve(self.far))
        self.source = MirrorSource(sources, self.near, rate=rate)
        await self.source.begin()

    async def end(self) -> dict[str, Opened]:
        """After the last round: the target's disks."""
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        return {name: opened for name, (_, opened) in (await self.target.take()).items()}

    async def close(self) -> None:
        for opened in self.opened:
            opened.close()
        for backend in self.backends:
            while backend._closing:
                await asyncio.wait(list(backend._closing.values()))

    def images_left(self) -> list[str]:
        return sorted(path.name for path in (self.homes[1] / "images").iterdir())


def content(path: Path, kind: str) -> bytes:
    """What a guest would see."""
    if kind == "raw":
        return path.read_bytes()
    out = path.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", str(path), str(out)], check=True)
    return out.read_bytes()
