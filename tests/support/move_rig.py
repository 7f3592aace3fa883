"""Domain processes without a host process: forked by a zygote, their console and xenstore served here; and moved."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.devices.console import ConsoleRing
from hypervisor.errors import HostFailure
from hypervisor.host import channel as channels
from hypervisor.host.handles import Handles
from hypervisor.host.mover import Receiver, Sender, TlsFiles
from hypervisor.host.process import ProcessHold
from hypervisor.host.runtime import CONSOLE_PORT, STORE_PORT, BuildRequest
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.memory import layout
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.xenstore import domain_nodes
from hypervisor.xenstore.domain_nodes import DomainNodes
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.ring import XenstoreRing
from hypervisor.xenstore.server import Server

PV_RUNTIME = "hypervisor.host.pv_runtime:PvRuntime"
UUID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
BASE_MFN, DOMID = 0x20000, 7
DEADLINE = 60.0


class Said:
    """A `ConsoleLog` in memory, over all the places the guest was at."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.changed = asyncio.Event()

    def write(self, data: bytes) -> None:
        self.data += data
        self.changed.set()

    def tail(self, size: int) -> bytes:
        return bytes(self.data[-size:])

    def close(self) -> None:
        return

    @property
    def text(self) -> str:
        return self.data.decode("latin-1")

    async def until(self, ready: Callable[[str], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not ready(self.text):
                self.changed.clear()
                await self.changed.wait()


class Place:
    """A guest's domain process on one of two made-up hosts."""

    def __init__(self, process: ProcessHold, request: BuildRequest, boot: dict[str, Any], said: Said) -> None:
        self.process, self.request, self.boot, self.said = process, request, boot, said
        self.pages = layout.total_frames(request.max_pages)
        self.ended = asyncio.Event()
        self.reason = ""
        process.on_ended = self._ended
        self.attached = False

    def _ended(self, message: dict[str, Any]) -> None:
        self.reason = f"{message.get('reason')} {message.get('detail')}".strip()
        self.ended.set()

    @classmethod
    async def make(cls, zygote: ZygoteClient, folder: Path, request: BuildRequest, said: Said) -> Place:
        handles = Handles.create("guest", layout.total_frames(request.max_pages))
        ours, theirs = channels.pair()
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / "domain.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        message = {"op": "spawn", "request": request.to_json(), "directory": str(folder), "sandbox": "auto"}
        pid, pidfd = await zygote.spawn(message, [theirs.fileno(), log, *handles.pack()])
        theirs.close()
        os.close(log)
        process = ProcessHold(pid, pidfd, ours, handles, zygote)
        built = await process.built(DEADLINE)
        await process.request("commit")
        return cls(process, request, built["boot"], said)

    def attach(self, server: Server) -> None:
        """Serve its rings: when there is a guest."""
        self.attached = True
        handles, base, loop = self.process.handles, self.request.base_mfn, asyncio.get_running_loop()

        def later(seconds: float, function: Callable[[], None]) -> None:
            loop.call_later(seconds, function)

        pages = [memoryview(handles.map_page(self.boot[name] - base)) for name in ("console_mfn", "store_mfn")]
        sink: Any = self.said
        self.console = ConsoleRing(pages[0], lambda: self.process.ring(CONSOLE_PORT), sink, later)
        self.store = XenstoreRing(server, DOMID, pages[1], lambda: self.process.ring(STORE_PORT), later)
        self.process.listen(CONSOLE_PORT, self.console.on_notify)
        self.process.listen(STORE_PORT, self.store.on_notify)

    def detach(self) -> None:
        """Serve them no more: nothing is written to them from here on."""
        if self.attached:
            self.attached = False
            for port in (CONSOLE_PORT, STORE_PORT):
                self.process.unlisten(port)
            self.console.close()
            self.store.close()

    async def ask(self, op: str, *fds: int, **fields: Any) -> dict[str, Any]:
        return await self.process.request(f"migration_{op}", 30, fields, fds)

    async def end(self) -> None:
        self.detach()
        if self.process.alive:
            await self.process.end()


def request_for(
    kernel: str, *, ramdisk: str | None = None, memory_mib: int = 8, vcpus: int = 1, cmdline: str = ""
) -> BuildRequest:
    boot = KernelBoot(kernel=kernel, ramdisk=ramdisk, cmdline=cmdline)
    spec = DomainSpec(uuid=UUID, name="moving", memory_mib=memory_mib, vcpus=vcpus, owner="tests", boot=boot)
    return BuildRequest(spec, DOMID, BASE_MFN, memory_mib * 256, memory_mib * 256)


def store_for(request: BuildRequest, boot: dict[str, Any]) -> Server:
    server = Server()
    handle = Handle(server)
    domain_nodes.prepare_host(handle)
    kib = request.nr_pages * 4
    nodes = DomainNodes(
        domid=DOMID, uuid=UUID, name="moving", memory_kib=kib, max_memory_kib=kib, vcpus=request.spec.vcpus,
        max_vcpus=request.spec.vcpus, store_port=STORE_PORT, store_mfn=boot["store_mfn"], console_port=CONSOLE_PORT,
        console_mfn=boot["console_mfn"], owner="tests", kernel="k", ramdisk="", cmdline="", console_tty="",
        start_time=0.0,
    )  # fmt: skip
    domain_nodes.lay_out(handle, nodes)
    return server


class Times(dict[str, float]):
    """Milliseconds of each step."""

    def __init__(self) -> None:
        super().__init__()
        self._at = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self[name] = round((now - self._at) * 1e3, 3)
        self._at = now


async def move(
    source: Place,
    zygote: ZygoteClient,
    folder: Path,
    tls: tuple[TlsFiles, TlsFiles],
    server: Server,
    *,
    rounds: int = 2,
    early: bool = True,
    zstd: bool = False,
) -> tuple[Place, Times]:
    """Live. The source's process is ended. :returns: where the guest is now, and the times of the switch."""
    import dataclasses
    import uuid

    facts = (await source.ask("facts"))["facts"]
    request = dataclasses.replace(source.request, incoming=facts)
    target = await Place.make(zygote, folder, request, source.said)
    common = {"ident": str(uuid.uuid4()), "token": "t", "pages": source.pages}
    receiver = await Receiver.listen(
        zygote, address="127.0.0.1", tls=tls[1], memory_fd=target.process.handles.memory, **common
    )
    sender = await Sender.start(
        zygote,
        address="127.0.0.1",
        port=receiver.port,
        tls=tls[0],
        memory_fd=source.process.handles.memory,
        zstd=zstd,
        **common,
    )
    bitmap, state = os.memfd_create("bitmap"), os.memfd_create("state")
    try:
        await source.ask("log", bitmap, on=True)
        size = (source.pages + 7) // 8
        os.pwrite(bitmap, b"\xff" * size + bytes(size), 0)
        for _ in range(rounds):
            await sender.pages(bitmap)
            await source.ask("dirty")
        await sender.pages(bitmap)
        if early:
            await source.ask("export", state, early=True)
            await sender.blob("early", state)
            await target_takes(target, receiver, "early")
        await source.ask("dirty")
        await sender.pages(bitmap)
        times = Times()
        source.detach()
        frozen = await source.ask("freeze", on=True, dirty=True)
        times.mark("freeze")
        times["pages to send"] = frozen["pages"]
        os.ftruncate(state, 0)
        exported = asyncio.create_task(source.ask("export", state))
        last = await sender.pages(bitmap, last=True)
        times.mark("pages")
        await exported
        times.mark("export")
        await sender.blob("state", state)
        times.mark("send state")
        await target_takes(target, receiver, "state", times)
        await target.process.request("unpause")
        times.mark("unpause")
        times["last pages"] = last.pages
    finally:
        os.close(bitmap)
        os.close(state)
        await sender.close()
        await receiver.close()
    await source.end()
    target.attach(server)
    return target, times


async def target_takes(target: Place, receiver: Receiver, kind: str, times: Times | None = None) -> None:
    found, content = await receiver.receive(DEADLINE)
    if found != kind:
        raise HostFailure(f"{found} instead of {kind}: {receiver.why}")
    if times is not None:
        times.mark("receive state")
    fd = os.memfd_create("state")
    try:
        os.write(fd, content)
        await target.ask("import", fd, receiver.marks)
    finally:
        os.close(fd)
    if times is not None:
        times.mark("import")
