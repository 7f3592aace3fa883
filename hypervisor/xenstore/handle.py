"""The host process's own way into its xenstored: dom0's rights, no bytes on a wire.

The same requests as a tool's go through the same code, so watches fire and the
journal is kept. Values are text, as everything the toolstack writes is.

A watch's callback is a function or a coroutine function. A coroutine runs as a
task, one at a time for each watch; what changes meanwhile is told when it is
done, each path once. However much a guest changes, no more than `MAX_WAITING`
paths wait: beyond that the watched path itself is told, once. So a callback
takes its path as a hint of where to look, and looks at what is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from hypervisor.xenstore import errors
from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.wire import Op, Packet, Parser

LOG = logging.getLogger(__name__)

MAX_WAITING = 256
"""Changed paths that wait for a coroutine which is still at work on an earlier one."""

Callback = Callable[[str], object]
"""A function, or a coroutine function."""


class Handle:
    """:param defer: runs a watch callback later, not from within the change that caused it
    (``loop.call_soon``); the default runs it at once, after the change is complete.
    """

    def __init__(self, server: Server, defer: Callable[[Callable[[], None]], object] | None = None) -> None:
        self._server = server
        self._defer = defer or (lambda function: function())
        self._parser = Parser()
        self._replies: dict[int, Packet] = {}
        self._requests = 0
        self._watchers: dict[bytes, _Watcher] = {}
        self._tokens = 0
        self._tx = 0
        self._conn: Connection = server.connect(self, "host process")

    # -- requests: each raises hypervisor.xenstore.errors.XenstoreError ---------------------------------------

    def read(self, path: str) -> str | None:
        """The value, or None when there is no such node. Bytes beyond ASCII are escaped."""
        try:
            return self._call(Op.READ, path.encode() + b"\0").decode("ascii", "backslashreplace")
        except errors.NotFound:
            return None

    def write(self, path: str, value: str) -> None:
        self._call(Op.WRITE, path.encode() + b"\0" + value.encode())

    def mkdir(self, path: str) -> None:
        self._call(Op.MKDIR, path.encode() + b"\0")

    def remove(self, path: str) -> None:
        """Remove a node and all below it; no error when it, or its parent, is not there."""
        try:
            self._call(Op.RM, path.encode() + b"\0")
        except errors.NotFound:
            return

    def exists(self, path: str) -> bool:
        return self.read(path) is not None

    def directory(self, path: str) -> list[str]:
        """Names of the children; [] when there is no such node."""
        listing = b""
        try:
            while True:
                part = self._call(Op.DIRECTORY_PART, path.encode() + b"\0" + b"%d\0" % len(listing))
                names = part.partition(b"\0")[2]
                if names.endswith(b"\0\0") or names == b"\0":
                    return [name.decode() for name in (listing + names).split(b"\0") if name]
                listing += names
        except errors.NotFound:
            return []

    def perms(self, path: str) -> str:
        """In the form ``n0,r1``. :raises NotFound: no such node."""
        return ",".join(field.decode() for field in self._call(Op.GET_PERMS, path.encode() + b"\0").split(b"\0")[:-1])

    def set_perms(self, path: str, perms: str) -> None:
        """:param perms: ``n0,r1``: owner and default first, then entries for single domains."""
        fields = [path.encode(), *(p.encode() for p in perms.split(","))]
        self._call(Op.SET_PERMS, b"".join(field + b"\0" for field in fields))

    def watch(self, path: str, callback: Callback, *, depth: int | None = None) -> Callable[[], None]:
        """Call `callback` with the changed path for each change at or below `path`, and once at first.

        :param path: absolute, or ``@introduceDomain``, ``@releaseDomain``.
        :param depth: levels below `path` that matter; None for all.
        :returns: the function that ends it. A coroutine that is at work then is not interrupted.
        :raises Invalid: no such path can be.
        """
        self._tokens += 1
        token = b"%d" % self._tokens
        self._watchers[token] = _Watcher(path, callback)
        fields = path.encode() + b"\0" + token + b"\0"
        try:
            self._call(Op.WATCH, fields + (b"%d\0" % depth if depth is not None else b""))
        except errors.XenstoreError:
            del self._watchers[token]
            raise

        def unwatch() -> None:
            watcher = self._watchers.pop(token, None)
            if watcher is not None:
                watcher.end()
                self._call(Op.UNWATCH, fields, 0)

        return unwatch

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything within happens as a whole or, when it raises, not at all; not to be nested.

        Nothing may be awaited within: every request of this handle belongs to the transaction until it ends.

        :raises Conflict: at the end; nothing happened, do it again. Since the host process has one thread,
            only what runs within the block can be in conflict with it.
        """
        self._tx = int(self._call(Op.TRANSACTION_START, b"\0")[:-1])
        try:
            yield
        except BaseException:
            self._end(b"F\0")
            raise
        self._end(b"T\0")

    def close(self) -> None:
        for watcher in self._watchers.values():
            watcher.end()
        self._watchers.clear()
        self._server.disconnect(self._conn)

    # -- Endpoint ---------------------------------------------------------------------------------------------

    def output_ready(self) -> None:
        while size := self._conn.pending:
            self._parser.feed(self._conn.peek_output(size))
            self._conn.consume_output(size)
            while (packet := self._parser.next()) is not None:
                if packet.type != Op.WATCH_EVENT:
                    self._replies[packet.req_id] = packet
                    continue
                path, token, _ = packet.payload.split(b"\0")
                self._defer(partial(self._deliver, token, path.decode()))

    def resume(self) -> None:
        """Requests here are calls: nothing waits."""

    def positions(self) -> tuple[int, int]:
        return 0, 0

    # -- inside -------------------------------------------------------------------------------------------------

    def _deliver(self, token: bytes, path: str) -> None:
        watcher = self._watchers.get(token)
        if watcher is not None:
            watcher.tell(path)

    def _end(self, word: bytes) -> None:
        # What the commit makes watches call is outside of it.
        tx, self._tx = self._tx, 0
        self._call(Op.TRANSACTION_END, word, tx)

    def _call(self, op: Op, payload: bytes, tx: int | None = None) -> bytes:
        # A callback may send requests while one is being answered, hence the numbers.
        self._requests = (self._requests + 1) & 0xFFFF_FFFF
        number = self._requests
        self._server.process(self._conn, Packet(op, number, self._tx if tx is None else tx, payload))
        reply = self._replies.pop(number)
        if reply.type == Op.ERROR:
            name = reply.payload[:-1]
            what = payload.partition(b"\0")[0].decode("ascii", "replace")
            raise errors.from_errno_name(name, f"xenstore {op.name} {what}: {name.decode()}")
        return reply.payload


class _Watcher:
    """One watch's callback and what it is still to be told."""

    def __init__(self, path: str, callback: Callback) -> None:
        self._path = path
        self._callback = callback
        self._waiting: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def tell(self, path: str) -> None:
        if self._task is None:
            coroutine = self._callback(path)
            if asyncio.iscoroutine(coroutine):
                self._task = asyncio.get_running_loop().create_task(self._run(coroutine))
        elif len(self._waiting) < MAX_WAITING:
            self._waiting[path] = None
        else:
            self._waiting = {self._path: None}

    def end(self) -> None:
        self._waiting.clear()

    async def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            while True:
                try:
                    await coroutine
                except Exception:  # one change that could not be dealt with must not deafen the watch
                    LOG.exception("xenstore watch on %s: its callback failed", self._path)
                if not self._waiting:
                    return
                path = next(iter(self._waiting))
                del self._waiting[path]
                again = self._callback(path)
                assert asyncio.iscoroutine(again), "a coroutine function is one each time"
                coroutine = again
        finally:
            self._task = None
