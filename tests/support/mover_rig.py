"""Two movers joined over the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

from hypervisor.host.handles import Handles
from hypervisor.host.mover import Receiver, Sender, TlsFiles
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.types import PAGE_SIZE

SUPPORT = str(Path(__file__).parent)
IDENT = "6f3ad3d5-6d2f-4c39-9a29-3d6de4a0a001"
TOKEN = "a token of this one migration"


class Memory:
    """A domain's memory as a host holds it; closed with the object."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        handles = Handles.create("test", pages)
        self.fd = handles.memory
        weakref.finalize(self, handles.close)

    def write(self, page: int, content: bytes) -> None:
        os.pwrite(self.fd, content, page * PAGE_SIZE)

    def read(self, page: int) -> bytes:
        return os.pread(self.fd, PAGE_SIZE, page * PAGE_SIZE)

    def all(self) -> bytes:
        return os.pread(self.fd, self.pages * PAGE_SIZE, 0)


class Bitmap(int):
    """A descriptor, closed with the object."""

    def __del__(self) -> None:
        os.close(self)


def bitmap(pages: int, dirty: object, shared: object = ()) -> Bitmap:
    """A descriptor as `Sender.pages` wants it. :param dirty, shared: page numbers."""
    size = (pages + 7) // 8
    bits = bytearray(2 * size)
    for start, numbers in ((0, dirty), (size, shared)):
        for number in numbers:  # type: ignore[attr-defined]
            bits[start + number // 8] |= 1 << number % 8
    fd = os.memfd_create("bitmap")
    os.write(fd, bits)
    return Bitmap(fd)


@contextlib.asynccontextmanager
async def zygote() -> AsyncIterator[ZygoteClient]:
    client = ZygoteClient("scripted_runtime:ScriptedRuntime")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SUPPORT, before]))
    try:
        await client.start()
        yield client
    finally:
        await client.stop()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.asynccontextmanager
async def pair(
    client: ZygoteClient, source: TlsFiles, target: TlsFiles, memory: Memory, into: Memory, **options: object
) -> AsyncIterator[tuple[Sender, Receiver]]:
    common = {"ident": IDENT, "token": TOKEN, "pages": memory.pages}
    receiver = await Receiver.listen(client, address="127.0.0.1", tls=target, memory_fd=into.fd, **common)
    try:
        sender = await Sender.start(
            client,
            **{"address": "127.0.0.1", "port": receiver.port, "tls": source, "memory_fd": memory.fd} | common | options,
        )
        try:
            await asyncio.wait_for(receiver.connected(10), 10)
            yield sender, receiver
        finally:
            await sender.close()
    finally:
        await receiver.close()
