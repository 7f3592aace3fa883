"""The host process's own way into its xenstored: dom0's rights, no bytes on a wire.

The same requests as a tool's go through the same code, so watches fire and the
journal is kept. Values are text, as everything the toolstack writes is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from hypervisor.xenstore import errors
from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.wire import Op, Packet, Parser


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
        self._callbacks: dict[bytes, Callable[[str], None]] = {}
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

    def watch(self, path: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback` with the changed path for each change at or below `path`, and once at first.

        :returns: the function that ends it.
        """
        self._tokens += 1
        token = b"%d" % self._tokens
        self._callbacks[token] = callback
        fields = path.encode() + b"\0" + token + b"\0"
        try:
            self._call(Op.WATCH, fields)
        except errors.XenstoreError:
            del self._callbacks[token]
            raise

        def unwatch() -> None:
            if self._callbacks.pop(token, None) is not None:
                self._call(Op.UNWATCH, fields)

        return unwatch

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything within happens as a whole or, when it raises, not at all; not to be nested.

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
        self._callbacks.clear()
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
        callback = self._callbacks.get(token)
        if callback is not None:
            callback(path)

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
