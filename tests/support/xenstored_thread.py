"""The project's xenstored in a thread, for tests of its clients."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from hypervisor.xenstore.server import Server
from hypervisor.xenstore.transport_unix import UnixServer


class _NoRing:
    """A domain's end that is never used."""

    def output_ready(self) -> None: ...

    def resume(self) -> None: ...

    def positions(self) -> tuple[int, int]:
        return 0, 0


class Xenstored:
    """May be stopped and started again on the same socket, without what it knew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.start()

    def start(self) -> None:
        self.server = server = Server()
        server.ring_mapper = lambda domid, _gfn, _port: server.introduce(domid, _NoRing())
        self.unix = UnixServer(self.server, self.path)
        asyncio.run_coroutine_threadsafe(self.unix.start(), self.loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.unix.stop(), self.loop).result(10)

    def special(self, name: str, domid: int) -> None:
        self.loop.call_soon_threadsafe(self.server.fire_special, name, domid)

    def end(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()
