"""A mover process: carries one migration's pages and blobs between two hosts.

It is forked by the zygote with `order.FDS` descriptors, reads its TLS files, gives up its rights (`sandbox`) and then
speaks with the network: what parses the other side's bytes holds nothing but this one guest's memory (the source's
descriptor of it cannot be written through), the connection, the spool and the channel. It ends with its host process.

Messages from the host: ``{"id", "op"}`` with op ``pages`` (a descriptor of two bitmaps, see `Sender.pages`; ``last`` or
``epoch``), ``commit`` (``number``), ``blob`` (``kind``, ``size``, a descriptor), ``close``; without an answer ``limit``
(``rate``) and ``taken`` (a blob in the spool). Events: ``ready``, ``failed`` and ``closed`` (``error`` or ``why``),
``connected``, ``refused`` (a stranger; ``why``), ``blob`` (``kind``, ``offset``, ``size``), ``progress`` (of
``pages``), ``copied`` (an epoch's pages: the guest may run on), ``committing`` and ``epoch`` (``number``: before and
after its pages are written).
"""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from hypervisor.errors import HostFailure, MigrationFailed, ToolstackError
from hypervisor.host import channel as channels
from hypervisor.host import sandbox, seccomp
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.host.driver_process import BoundedLog
from hypervisor.host.mover import meeting, wire
from hypervisor.host.mover.conversation import Conversation
from hypervisor.host.mover.order import FDS, SOURCE, MoverOrder
from hypervisor.host.mover.pace import Pace
from hypervisor.host.mover.pages import PageSource
from hypervisor.host.mover.sink import PageSink
from hypervisor.host.mover.spool import SPOOL_BYTES, Spool
from hypervisor.host.mover.tls import PeerClosed, Tls, TlsSocket, Untrusted
from hypervisor.host.mover.wire import BadRecord, Header, Kind, Secret
from hypervisor.host.surroundings import own_surroundings
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)

LOG_BYTES = 64 << 10
ROUND_TIMEOUT = 60.0
"""Seconds that the target may take to write what was sent, once all is sent."""
PROGRESS_EVERY = 0.25
IDLE_STEP = 1.0


class Closed(Exception):
    """The host process wants the end, or is gone."""


class MoverProcess:
    """What source and target have in common."""

    def __init__(
        self, order: MoverOrder, channel: Channel, tls: Tls, memory: int, spool: int, marks: mmap.mmap
    ) -> None:
        self.order = order
        self._channel = channel
        self._own = tls
        self._spool = Spool(spool)
        self._todo: collections.deque[tuple[Message, list[int]]] = collections.deque()
        self._answers: collections.deque[bytes] = collections.deque()
        self._pace = Pace(order.rate)
        self._memory = memory
        self._marks = marks
        self._talk: Conversation
        self._sink: PageSink | None = None
        self._source: PageSource | None = None
        self._round = 0
        self._round_done = 0

    # -- the channel

    def tell(self, message: Message) -> None:
        """:raises Closed: nobody listens any more."""
        try:
            self._channel.send(message)
        except ChannelClosed as exc:
            raise Closed(str(exc)) from exc

    def serve(self) -> None:
        """Take one message; what needs the connection waits for its turn. :raises Closed."""
        try:
            message, fds = self._channel.receive()
        except ChannelClosed as exc:
            raise Closed("the host process is gone") from exc
        except BadMessage as exc:
            raise Closed(str(exc)) from exc
        op = message.get("op")
        if op == "close":
            raise Closed("")
        if op == "limit":
            self._pace.set(int(message["rate"]))
        elif op == "taken":
            self._spool.taken()
        else:
            self._todo.append((message, fds))

    # -- the connection

    def secret(self, target: bytes, source: bytes) -> Secret:
        return Secret(self.order.ident, self.order.token, self.order.pages, target, source)

    def converse(self, tls: TlsSocket) -> NoReturn:
        """Until one side ends it. :raises PeerClosed, BadRecord, Closed."""
        allowed = wire.FROM_TARGET if self.order.role == SOURCE else wire.FROM_SOURCE
        self._talk = talk = Conversation(tls, allowed, self._heard, self._channel.fileno(), self.serve)
        # Something may have come with the greeting already.
        talk.take()
        while True:
            while self._answers:
                talk.send([self._answers.popleft()])
            if self._todo:
                self._carry_out(*self._todo.popleft())
            else:
                talk.wait(IDLE_STEP)

    def _carry_out(self, message: Message, fds: list[int]) -> None:
        number, op = message.get("id"), message.get("op")
        try:
            if op == "pages":
                result = self._send_pages(fds[0], last=bool(message.get("last")), epoch=bool(message.get("epoch")))
            elif op == "commit":
                self._talk.send([wire.record(Kind.EPOCH, count=int(message["number"]))])
                self._talk.flush()
                result = {}
            elif op == "blob":
                result = self._send_blob(str(message["kind"]), int(message["size"]), fds[0])
            else:
                raise HostFailure(f"unknown op {op!r}")
        except HostFailure as exc:
            self.tell({"id": number, "error": exc.to_json()})
            return
        finally:
            channels.close_all(fds)
        self.tell({"id": number, "result": result})

    def _send_blob(self, kind: str, size: int, fd: int) -> dict[str, Any]:
        name = kind.encode()
        self._talk.send([wire.header(Kind.BLOB, count=size, length=len(name)), name])
        at = 0
        while at < size:
            data = os.pread(fd, min(wire.MAX_DATA, size - at), at)
            if not data:
                raise Closed("a blob is shorter than the host process says")
            self._talk.send([wire.header(Kind.DATA, length=len(data)), data])
            at += len(data)
        self._talk.flush()
        return {}

    # -- source

    def _send_pages(self, fd: int, *, last: bool, epoch: bool) -> dict[str, Any]:
        """Time is counted until the target has written it all; of the last round and of epochs until it is sent."""
        if self._source is None:
            raise HostFailure("the target sends no pages")
        started, before, told = time.monotonic(), self._talk.bytes_sent, time.monotonic()
        size = (self.order.pages + 7) // 8
        dirty, shared = os.pread(fd, size, 0), os.pread(fd, size, size)
        if len(dirty) < size:
            raise HostFailure(f"a bitmap of {len(dirty)} bytes for {self.order.pages} pages")
        for pieces in self._records(dirty, shared.ljust(size, b"\0"), epoch=epoch):
            sent = self._talk.bytes_sent
            self._talk.send(pieces)
            self._pace.sent(self._talk.bytes_sent - sent)
            while not last and (pause := self._pace.wait()):
                self._talk.wait(pause)
            if time.monotonic() - told > PROGRESS_EVERY:
                told = time.monotonic()
                self.tell({"event": "progress", **self._so_far(before, started)})
        self._round += 1
        if not (last or epoch):
            self._talk.send([wire.record(Kind.ROUND, count=self._round)])
            until = time.monotonic() + ROUND_TIMEOUT
            while self._round_done < self._round:
                if time.monotonic() > until:
                    raise PeerClosed(f"the target did not take a round of pages within {ROUND_TIMEOUT:g} s")
                self._talk.wait(IDLE_STEP)
        return self._so_far(before, started)

    def _records(self, dirty: bytes, shared: bytes, *, epoch: bool) -> Iterator[list[bytes | memoryview]]:
        assert self._source is not None
        if not epoch:
            return self._source.round(dirty, shared)
        self._source.copy(dirty, shared)
        self.tell({"event": "copied"})
        return self._source.copied()

    def _so_far(self, before: int, started: float) -> dict[str, Any]:
        assert self._source is not None
        counts = self._source.counts.to_json()
        return {**counts, "bytes": self._talk.bytes_sent - before, "seconds": time.monotonic() - started}

    # -- what arrives

    def _heard(self, head: Header, body: memoryview) -> None:
        kind = head.kind
        if kind is Kind.BYE:
            raise PeerClosed("")
        if kind is Kind.BLOB:
            if self._spool.begin(bytes(body), head.count):
                self.tell(self._spool.event())
        elif kind is Kind.DATA:
            if self._spool.more(body):
                self.tell(self._spool.event())
        elif kind is Kind.ROUND and self._sink is not None:
            self._answers.append(wire.record(Kind.ROUND, count=head.count))
        elif kind is Kind.ROUND:
            self._round_done = head.count
        elif kind is Kind.EPOCH:
            self._end_epoch(head.count)
        elif self._sink is not None:
            self._sink.take(head, body)

    def _end_epoch(self, number: int) -> None:
        """Nothing interrupts this but the end of the process; the host has been told then that it had begun."""
        assert self._sink is not None
        if not number:
            self._sink.stage()
            return
        self.tell({"event": "committing"})
        self._sink.commit()
        self.tell({"event": "epoch", "number": number})

    # -- the two roles

    def as_source(self, sock: socket.socket) -> NoReturn:
        """:raises ToolstackError: they did not come together."""
        tls = self._own.connection(sock, self.order.address)
        features = wire.ZSTD if self.order.zstd else 0
        meeting.greet_target(tls, self._own, self.secret, features, self._channel.fileno(), self.serve)
        self._source = PageSource(self._memory, self.order.pages, compress=self.order.zstd)
        self.tell({"event": "connected"})
        self.converse(tls)

    def as_target(self, listener: socket.socket) -> NoReturn:
        def refused(why: str) -> None:
            LOG.warning("sent away: %s", why)
            self.tell({"event": "refused", "why": why[: wire.MAX_TEXT]})

        tls, _ = meeting.await_source(listener, self._own, self.secret, self._channel.fileno(), self.serve, refused)
        self._sink = PageSink(self._memory, self.order.pages, self._marks)
        self.tell({"event": "connected"})
        self.converse(tls)

    def bye(self) -> None:
        """The host process wants the end: tell the other side, which may not listen."""
        with contextlib.suppress(PeerClosed, BadRecord, Closed, AttributeError):
            self._talk.send([wire.record(Kind.BYE)])


def _life(process: MoverProcess, sock: socket.socket) -> Message:
    """All of it. :returns: the last event."""
    try:
        if process.order.role == SOURCE:
            process.as_source(sock)
        process.as_target(sock)
    except Closed as exc:
        process.bye()
        return {"event": "closed", "why": str(exc)}
    except (PeerClosed, Untrusted) as exc:
        return {"event": "closed", "why": str(exc)}
    except BadRecord as exc:
        error = MigrationFailed(f"the other host says what makes no sense ({exc}): are both of one release?")
        return {"event": "closed", "why": error.message, "error": error.to_json()}
    except ToolstackError as exc:
        return {"event": "closed", "why": exc.message, "error": exc.to_json()}


def run_child(order: MoverOrder, fds: Sequence[int], *, sandbox_required: bool, log_level: int) -> NoReturn:
    """The forked child's whole life. `fds`: as `order.FDS` says."""
    code = 1
    channel = channels.from_fd(fds[0])
    try:
        gc.enable()
        sandbox.close_other_fds([0, 1, 2, *fds[:FDS]])
        own_surroundings("reeve-mover", fds[1], log_level)
        os.close(fds[1])
        stream = BoundedLog(LOG_BYTES)
        form = f"%(asctime)s %(levelname)s mover {order.ident} %(name)s: %(message)s"
        logging.basicConfig(level=log_level, stream=stream, format=form, force=True)
        code = _run(order, channel, fds, sandbox_required=sandbox_required)
    except BaseException:
        LOG.exception("mover process failed")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(order: MoverOrder, channel: Channel, fds: Sequence[int], *, sandbox_required: bool) -> int:
    memory, spool = fds[2], fds[4]
    say: Callable[[Message], None] = channel.send
    try:
        tls = Tls(order.tls, server=order.role != SOURCE)
        sock = socket.socket(fileno=fds[3])
        marks = mmap.mmap(fds[5], order.pages)
        largest = max(order.pages * PAGE_SIZE, SPOOL_BYTES)
        report = sandbox.restrict(max_file_size=largest)
        report = sandbox.lock_down(report, required=sandbox_required, profile=seccomp.MOVER)
    except ToolstackError as exc:
        say({"event": "failed", "error": exc.to_json()})
        return 1
    say({"event": "ready", "sandbox": report.to_json()})
    last = _life(MoverProcess(order, channel, tls, memory, spool, marks), sock)
    LOG.info("ends: %s", last["why"] or "as told")
    with contextlib.suppress(ChannelClosed):
        say(last)
    return 0
