"""A mover process as the host process uses it: `Sender` on the source, `Receiver` on the target."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, Self

from hypervisor.errors import HostFailure, HostUnavailable, MigrationFailed, ToolstackError, from_json
from hypervisor.host import channel as channels
from hypervisor.host.channel import Message
from hypervisor.host.link import Link
from hypervisor.host.mover import order as orders
from hypervisor.host.mover.order import MoverOrder, TlsFiles
from hypervisor.host.mover.sent import PagesSent
from hypervisor.host.mover.sockets import connect, listener
from hypervisor.host.mover.spool import SPOOL_BYTES
from hypervisor.host.mover.wire import MAX_BLOB, MAX_NAME
from hypervisor.host.process import reap
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

GREETING_TIMEOUT = 30.0
START_TIMEOUT = 20.0
BLOB_TIMEOUT = 120.0
CLOSE_TIMEOUT = 2.0
_NO_TIMEOUT = 1e8

CLOSED = "closed"
EPOCH = "epoch-whole"
"""What `Receiver.receive` says when an epoch is written: kind, and its number as text. No blob can be named so."""


class Mover:
    """What both ends have in common. One task at a time may use one; `close` may come at any time.

    :ivar why: how the conversation ended, one line; "" while it goes on or when it ended as it should.
    :ivar error: the error that ended it, or None.
    :ivar marks: on the target, descriptor of a file with a byte for each page, set when it was written; while open.
    """

    def __init__(self) -> None:
        self.why = ""
        self.error: ToolstackError | None = None
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._blobs: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._over = False
        self._link: Link | None = None
        self._pidfd = -1
        self._gone = asyncio.Event()
        self._spool = -1
        self.marks = -1
        for future in (self._ready, self._connected):
            future.add_done_callback(lambda f: f.cancelled() or f.exception())

    async def blob(self, kind: str, data: bytes | int) -> None:
        """Send something; what is sent arrives in the order of the calls, after all pages before it.

        :param kind: an identifier of at most `MAX_NAME` characters. :param data: bytes, or a memfd with them; at most
            `MAX_BLOB` bytes. :raises MigrationFailed: the connection is over.
        """
        if not (kind.isascii() and kind.isidentifier() and len(kind) <= MAX_NAME):
            raise HostFailure(f"a blob of kind {kind[:40]!r}")
        fd = data if isinstance(data, int) else _in_memory(data)
        try:
            size = os.fstat(fd).st_size
            if size > MAX_BLOB:
                raise HostFailure(f"a blob of {size} bytes: at most {MAX_BLOB} can be sent")
            await self._ask("blob", {"kind": kind, "size": size}, fd, BLOB_TIMEOUT)
        finally:
            if not isinstance(data, int):
                os.close(fd)

    async def receive(self, timeout: float) -> tuple[str, bytes]:
        """The other side's next blob: kind and content; ``("closed", b"")`` at the end, again and again.

        :raises TimeoutError: none came within `timeout` seconds.
        """
        if self._over and self._blobs.empty():
            return CLOSED, b""
        return await within(self._blobs.get(), timeout)

    @property
    def free(self) -> bool:
        """Whether a blob would go out at once: the other side is there, and no round of pages is under way."""
        joined = self._connected.done() and not self._connected.cancelled() and self._connected.exception() is None
        return joined and not self._over and self._link is not None

    async def close(self) -> None:
        """End the conversation and the process; harmless when repeated."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(HostUnavailable):
                link.send({"op": "close", "id": 0})
            if self._pidfd >= 0:
                with contextlib.suppress(TimeoutError):
                    await within(self._gone.wait(), CLOSE_TIMEOUT)
            link.close()
        self._end("closed by this host")
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._loop.remove_reader(self._pidfd)
            reap(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for fd in (self._spool, self.marks):
            if fd >= 0:
                os.close(fd)
        self._spool = self.marks = -1

    # -- inside

    async def _start(self, zygote: ZygoteClient, order: MoverOrder, memory: int, sock: socket.socket, box: str) -> None:
        ours, theirs = channels.pair()
        fds: list[int] = []
        try:
            self._spool = os.memfd_create("reeve-mover-spool", os.MFD_CLOEXEC)
            os.ftruncate(self._spool, SPOOL_BYTES)
            self.marks = os.memfd_create("reeve-mover-marks", os.MFD_CLOEXEC)
            os.ftruncate(self.marks, order.pages)
            fds = [theirs.fileno(), 2, memory, sock.fileno(), self._spool, self.marks]
            message = {"op": "spawn-mover", "order": order.to_json(), "sandbox": box}
            _, self._pidfd = await zygote.spawn(message, fds)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            sock.close()
        self._loop.add_reader(self._pidfd, self._ended)
        self._link = Link(ours, self._event, lambda: self._end("the mover process is gone"))
        await self._in_time(self._ready, START_TIMEOUT, "the mover process did not start")

    async def _in_time(self, future: asyncio.Future[None], timeout: float, what: str) -> None:
        try:
            await within(asyncio.shield(future), timeout)
        except TimeoutError:
            raise HostUnavailable(f"{what} within {timeout:g} s: try again") from None

    async def _ask(self, op: str, fields: dict[str, Any], fd: int | None, timeout: float) -> dict[str, Any]:
        link = self._link
        if link is None or link.closed or self._over:
            raise self._failure()
        try:
            return await link.request(op, timeout, fields, [] if fd is None else [fd])
        except HostUnavailable as exc:
            raise self._failure() from exc

    def _failure(self) -> ToolstackError:
        if self.error is not None:
            return self.error
        return MigrationFailed(f"the connection to the other host is over: {self.why or 'it was closed'}: try again")

    def _event(self, message: Message, fds: list[int]) -> None:
        channels.close_all(fds)
        kind = message["event"]
        if kind == "ready":
            _set(self._ready)
        elif kind == "connected":
            _set(self._connected)
        elif kind == "blob":
            self._take(str(message["kind"]), int(message["offset"]), int(message["size"]))
        elif kind in ("failed", "closed"):
            error = message.get("error")
            self.error = from_json(error) if error is not None else None
            self._end(str(message.get("why", "")) or (self.error.message if self.error else ""))
        else:
            self._more(message)

    def _more(self, message: Message) -> None:
        """Events of one role."""

    def _take(self, kind: str, offset: int, size: int) -> None:
        content = os.pread(self._spool, size, offset)
        if self._link is not None and not self._link.closed:
            with contextlib.suppress(HostUnavailable):
                self._link.send({"op": "taken"})
        self._blobs.put_nowait((kind, content))

    def _end(self, why: str) -> None:
        if self._over:
            return
        self._over = True
        self.why = why
        self._blobs.put_nowait((CLOSED, b""))
        for future in (self._ready, self._connected):
            if not future.done():
                future.set_exception(self._failure())
        if self._link is not None:
            self._link.close()

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # What it said last is still in the channel.
        while self._link is not None and not self._link.closed and self._link.readable():
            self._link.read_one()
        self._end("the mover process is gone")
        self._gone.set()


class Sender(Mover):
    """The source's end.

    :ivar on_progress: called a few times a second while pages are sent, with what was sent of the round so far.
    :ivar on_copied: called when `epoch` has a copy of its pages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_progress: Callable[[PagesSent], None] = lambda sent: None
        self.on_copied: Callable[[], None] = lambda: None
        self._in_round = False

    @property
    def free(self) -> bool:
        return super().free and not self._in_round

    @classmethod
    async def start(
        cls,
        zygote: ZygoteClient,
        *,
        address: str,
        port: int,
        tls: TlsFiles,
        ident: str,
        token: str,
        memory_fd: int,
        pages: int,
        rate: int = 0,
        zstd: bool = False,
        sandbox: str = "auto",
    ) -> Self:
        """Connected, both sides proved to be who they should be.

        :param memory_fd: of the guest's memory, `pages` pages; the process can only read it.
        :param rate: bytes a second, 0 for no limit. :param zstd: compress pages.
        :raises HostUnavailable: the target cannot be reached. :raises MigrationRefused: certificate, token, version or
            migration are not what one side expects. :raises HostFailure: the TLS files are of no use.
        """
        sender = cls()
        sock = await connect(address, port)
        memory = -1
        try:
            memory = os.open(f"/proc/self/fd/{memory_fd}", os.O_RDONLY | os.O_CLOEXEC)
            order = MoverOrder(orders.SOURCE, ident, token, pages, tls, address, rate, zstd)
            await sender._start(zygote, order, memory, sock, sandbox)
            await sender._in_time(sender._connected, GREETING_TIMEOUT, "the target did not answer")
        except BaseException:
            await sender.close()
            raise
        finally:
            sock.close()
            if memory >= 0:
                os.close(memory)
        return sender

    async def pages(self, bitmap_fd: int, *, last: bool = False) -> PagesSent:
        """Send every page whose bit is set.

        :param bitmap_fd: two bitmaps of a bit for each page, the lowest of byte 0 first, each `(pages + 7) // 8` bytes:
            pages to send, and those of them that may be written unseen, which are only sent when they differ from what
            was sent last. The second one may be missing.
        :param last: the guest stands still: no bandwidth limit, and the target's answer is not waited for (a blob
            that is sent next arrives after them).
        :raises MigrationFailed: the connection is over.
        """
        return await self._pages(bitmap_fd, {"last": last})

    async def epoch(self, bitmap_fd: int) -> PagesSent:
        """As `pages`, of a guest that may run on when `on_copied` has been called. The target keeps them aside."""
        return await self._pages(bitmap_fd, {"epoch": True})

    async def commit(self, number: int) -> None:
        """Everything of an epoch has been sent: the target writes its pages, and hears `EPOCH`.

        :param number: from 1; 0: from here on pages belong to an epoch.
        :raises MigrationFailed: the connection is over.
        """
        await self._ask("commit", {"number": number}, None, BLOB_TIMEOUT)

    async def _pages(self, bitmap_fd: int, how: dict[str, bool]) -> PagesSent:
        # Stays set when the caller is cancelled: the process goes on with the round.
        self._in_round = True
        sent = PagesSent.from_json(await self._ask("pages", how, bitmap_fd, _NO_TIMEOUT))
        self._in_round = False
        return sent

    def limit(self, bytes_per_second: int) -> None:
        """From now on send no faster than that; 0: as fast as it goes."""
        if self._link is not None and not self._link.closed:
            with contextlib.suppress(HostUnavailable):
                self._link.send({"op": "limit", "rate": max(0, bytes_per_second)})

    def _more(self, message: Message) -> None:
        if message["event"] == "progress":
            self.on_progress(PagesSent.from_json(message))
        elif message["event"] == "copied":
            self.on_copied()


class Receiver(Mover):
    """The target's end.

    :ivar port: where it listens.
    :ivar on_connected: called when the source is there and has proved who it is.
    :ivar on_refused: called with the reason when a stranger was sent away; the wait for the source goes on.
    :ivar torn: an epoch is being written, the memory holds neither it nor the one before. Stays so when the process
        was killed meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.torn = False
        self.on_connected: Callable[[], None] = lambda: None
        self.on_refused: Callable[[str], None] = lambda why: None

    @classmethod
    async def listen(
        cls,
        zygote: ZygoteClient,
        *,
        address: str,
        tls: TlsFiles,
        ident: str,
        token: str,
        memory_fd: int,
        pages: int,
        port: int = 0,
        sandbox: str = "auto",
    ) -> Self:
        """Pages go straight into the memory. To be called when the domain process is built: it writes there too.

        :param address: of this host, on which the source connects; `port` 0: any.
        :raises HostFailure: nothing can listen there, or the TLS files are of no use.
        """
        receiver = cls()
        sock = listener(address, port)
        receiver.port = sock.getsockname()[1]
        try:
            order = MoverOrder(orders.TARGET, ident, token, pages, tls)
            await receiver._start(zygote, order, memory_fd, sock, sandbox)
        except BaseException:
            await receiver.close()
            raise
        finally:
            sock.close()
        return receiver

    async def connected(self, timeout: float) -> None:
        """Wait for the source. :raises HostUnavailable: it did not come. :raises ToolstackError: why it cannot."""
        await self._in_time(self._connected, timeout, "the source did not connect")

    def _event(self, message: Message, fds: list[int]) -> None:
        super()._event(message, fds)
        if message["event"] == "connected":
            self.on_connected()

    def _more(self, message: Message) -> None:
        if message["event"] == "refused":
            LOG.warning("a stranger was sent away: %s", message.get("why"))
            self.on_refused(str(message.get("why")))
        elif message["event"] == "committing":
            self.torn = True
        elif message["event"] == "epoch":
            self.torn = False
            self._blobs.put_nowait((EPOCH, str(int(message["number"])).encode()))


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("reeve-blob", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd
