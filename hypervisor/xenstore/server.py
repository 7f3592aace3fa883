"""xenstored itself: the store, its clients and what passes between them.

Pure as far as it goes: no sockets, no rings, no clock of its own. Transports
(`hypervisor.xenstore.ring`, `hypervisor.xenstore.transport_unix`) hold a
`Connection` each, hand complete packets to `Server.process` and are told by
`Endpoint.output_ready` that there is something to send. A transport takes a
few requests at a time and then lets the others have their turn; that and the
bounds in `Connection` and `Limits` are what keeps a guest from slowing others.

Nothing is sent before it is in the journal (`settle`), so a server that was
killed and restored from it goes on where a client saw it last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypervisor.devices.rate import Bucket
from hypervisor.xenstore import path as paths
from hypervisor.xenstore import tree
from hypervisor.xenstore.connection import Connection, Endpoint
from hypervisor.xenstore.control import AccessLog
from hypervisor.xenstore.errors import (
    AccessDenied,
    AlreadyExists,
    NotFound,
    TooBig,
    UnknownOperation,
    XenstoreError,
    errno_name,
)
from hypervisor.xenstore.operations import HANDLERS, Call
from hypervisor.xenstore.perms import DOM0, Who
from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.records import Journal, Record
from hypervisor.xenstore.store import Node, Store, node_to_json
from hypervisor.xenstore.transaction import Transaction
from hypervisor.xenstore.watch import Watch, WatchTable, may_hear
from hypervisor.xenstore.wire import PAYLOAD_MAX, Packet

LOG = logging.getLogger(__name__)

STATE_VERSION = 1


class Server:
    """:param clock: seconds, monotonic.

    :ivar ring_mapper: called with domid, gfn and port when a tool sends INTRODUCE; it maps the ring and calls
        `introduce`, or raises XenstoreError. Without it INTRODUCE is refused.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
        store: Store | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.store = store or Store()
        self.watches: WatchTable[Connection] = WatchTable()
        self.journal = journal
        self.ring_mapper: Callable[[int, int, int], None] | None = None
        self.clock = clock
        self.access_log = AccessLog(clock)
        self._domains: dict[int, Connection] = {}
        self._shutdown: set[int] = set()
        self._restored: dict[int, tuple[int, int]] = {}
        self._tools: dict[Connection, None] = {}
        self._quota: dict[str, int] = {}
        self._records: list[Record] = []
        self._ready: dict[Connection, None] = {}
        self._after_reply: list[Callable[[], None]] = []
        self.store.on_change = self._note_node

    # -- clients ------------------------------------------------------------------------------------------

    def connect(self, endpoint: Endpoint, label: str = "tool") -> Connection:
        """A new tool connection, with dom0's rights."""
        conn = self._connection(Who(DOM0.domid), label)
        conn.endpoint = endpoint
        self._tools[conn] = None
        return conn

    def disconnect(self, conn: Connection) -> None:
        """A tool went away: its watches and transactions go too."""
        self.watches.remove_all(conn)
        self._tools.pop(conn, None)
        conn.close()

    def introduce(self, domid: int, endpoint: Endpoint) -> Connection:
        """Begin to serve a domain. One that was restored goes on with its watches and unread output.

        :raises AlreadyExists: it is being served.
        """
        conn = self._domains.get(domid)
        if conn is not None and conn.endpoint is not None:
            raise AlreadyExists(f"domain {domid} is introduced already")
        if conn is None:
            conn = self._domains[domid] = self._connection(Who(domid))
            self._note(["d", domid])
            self.fire_special(paths.INTRODUCE_DOMAIN, domid)
        conn.endpoint = endpoint
        if conn.pending:
            self._ready[conn] = None
        return conn

    def detach(self, conn: Connection) -> None:
        """A domain's ring lets go, and the domain may live on: it waits for another `introduce`."""
        if conn.endpoint is not None and not conn.closed:
            self._restored[conn.who.domid] = conn.endpoint.positions()
            conn.rewind()
        conn.endpoint = None

    def restored_positions(self, domid: int) -> tuple[int, int] | None:
        """Ring positions (next byte to read, first byte of the queued output) of a domain that was served before."""
        return self._restored.pop(domid, None)

    def release(self, domid: int) -> None:
        """Stop to serve a domain that is gone: its watches, its nodes and others' permissions for it go.

        :raises NotFound: it is not being served.
        """
        conn = self._domains.pop(domid, None)
        if conn is None:
            raise NotFound(f"domain {domid} is not introduced")
        self.watches.remove_all(conn)
        conn.close()
        self._ready.pop(conn, None)
        self._shutdown.discard(domid)
        self._restored.pop(domid, None)
        for other in self._domains.values():
            if other.who.target == domid:
                other.who.target = None
        self._note(["r", domid])
        self.fire(tree.forget_domain(self.store, domid), None)
        self.fire_special(paths.RELEASE_DOMAIN, domid)

    def is_introduced(self, domid: int) -> bool:
        return domid in self._domains

    @property
    def domains(self) -> list[int]:
        return sorted(self._domains)

    def domain_shutdown(self, domid: int) -> None:
        """The domain shut down or crashed: tell the watchers of @releaseDomain, once until `domain_resumed`."""
        if domid in self._domains and domid not in self._shutdown:
            self._shutdown.add(domid)
            self._note(["s", domid, True])
            self.fire_special(paths.RELEASE_DOMAIN, domid)

    def domain_resumed(self, domid: int) -> None:
        """:raises NotFound: it is not being served."""
        self.domain(domid)
        self._shutdown.discard(domid)
        self._note(["s", domid, False])

    def set_target(self, domid: int, target: int) -> None:
        """:raises NotFound: one of the two is not being served."""
        conn, _ = self.domain(domid), self.domain(target)
        conn.who.target = target
        self._note(["g", domid, target])

    def set_quota(self, name: str, value: int) -> None:
        """:param name: a field of `Limits`."""
        self.limits = replace(self.limits, **{name: value})
        self._quota[name] = value
        for conn in (*self._tools, *self._domains.values()):
            conn.set_limits(self.limits)
        self._note(["q", name, value])

    def reset(self, conn: Connection) -> None:
        """Bring a domain's connection back to its beginning (ring reconnection), or end it after an error."""
        conn.reset()
        self.forget_watches(conn)
        self._note(["R", conn.who.domid])
        self.settle()

    # -- requests -----------------------------------------------------------------------------------------

    def throttle(self, conn: Connection) -> float:
        """Seconds until this client may be served again; 0.0 for now."""
        return 0.0 if conn.who.privileged else conn.bucket.delay()

    def note_start(self, domid: int, req_cons: int, rsp_base: int) -> None:
        """A domain's ring begins at these positions."""
        self._note(["p", domid, req_cons, rsp_base])

    def note_input(self, conn: Connection, position: int) -> None:
        """A ring was read up to `position`; what of it is no complete request yet is in the parser."""
        self._note(["i", conn.who.domid, position, conn.parser.pending.decode("latin-1")])

    def process(self, conn: Connection, packet: Packet) -> None:
        """Handle one request. Its reply and the watch events are queued, and their transports told."""
        try:
            payload = self._answer(conn, packet)
            if len(payload) > PAYLOAD_MAX:
                raise TooBig(f"the answer has {len(payload)} bytes")
            reply = packet.reply(payload)
        except XenstoreError as exc:
            LOG.debug("%s: request %d failed: %s", conn.label, packet.type, exc)
            reply = packet.error(errno_name(exc))
        except Exception:
            LOG.exception("%s: a bug of ours in request %d", conn.label, packet.type)
            reply = packet.error(b"EIO")
        self.access_log.note(conn, packet, reply)
        self._sent(conn, conn.push_reply(reply), False)
        after, self._after_reply = self._after_reply, []
        for action in after:
            action()
        self.settle()

    def settle(self) -> None:
        """Journal what was done since the last time, then let the transports send. Ends every step."""
        if self._records:
            records, self._records = self._records, []
            if self.journal is not None:
                self.journal.append(records)
        while self._ready:
            conn = next(iter(self._ready))
            del self._ready[conn]
            if conn.endpoint is None:
                continue
            try:
                conn.endpoint.output_ready()
            except Exception:  # whoever caused the output has nothing to do with its receiver
                LOG.exception("%s: its transport failed", conn.label)

    def _answer(self, conn: Connection, packet: Packet) -> bytes:
        handler = HANDLERS.get(packet.type)
        if handler is None:
            raise UnknownOperation(f"no request type {packet.type}")
        if handler.privileged and not conn.who.privileged:
            raise AccessDenied("dom0 only")
        transaction = None
        if packet.tx_id and handler.in_transaction:
            transaction = conn.transactions.get(packet.tx_id)
            if transaction is None:
                raise NotFound(f"no transaction {packet.tx_id}")
        if handler.writes and not conn.who.privileged and self._others_in_transaction(conn):
            conn.bucket.take()
        return handler.function(Call(self, conn, packet.payload, transaction))

    def _others_in_transaction(self, conn: Connection) -> bool:
        return any(c.transactions for c in (*self._tools, *self._domains.values()) if c is not conn)

    # -- what the requests do to the server -----------------------------------------------------------------

    def fire(self, changes: list[tree.Change], origin: Connection | None) -> None:
        """Queue events for the watches that changes concern."""
        for change in changes:
            for conn, watches in self.watches.matching(change):
                if may_hear(conn.who, change, self.store):
                    for watch in watches:
                        self._event(conn, watch, change.path, origin)

    def fire_special(self, name: str, domid: int) -> None:
        node = self.store.get(name)
        for conn, watch, path in self.watches.special(name, domid):
            if conn.who.privileged or (node is not None and node.acl.readable(conn.who)):
                self._event(conn, watch, path, None)
        self.settle()

    def add_watch(self, conn: Connection, watch: Watch) -> None:
        """Add a watch, and fire it once after the reply. :raises AlreadyExists: it is there."""
        self.watches.add(conn, watch)
        self._note_domain(conn, "w", *watch.to_json())
        self._after_reply.append(lambda: self._event(conn, watch, watch.path, None))

    def remove_watch(self, conn: Connection, path: str, token: bytes) -> None:
        """:raises NotFound: there is none."""
        self.watches.remove(conn, path, token)
        self._note_domain(conn, "u", path, token.decode("latin-1"))

    def forget_watches(self, conn: Connection) -> None:
        self.watches.remove_all(conn)
        self._note_domain(conn, "W")

    def start_transaction(self, conn: Connection) -> int:
        ident = conn.new_transaction_id()
        conn.transactions[ident] = Transaction(ident, self.store, conn.who, conn.limits)
        self._note_domain(conn, "t", ident)
        return ident

    def end_transaction(self, conn: Connection, transaction: Transaction, *, commit: bool) -> None:
        """:raises Conflict, QuotaExceeded: nothing was committed; the transaction has ended all the same."""
        del conn.transactions[transaction.ident]
        self._note_domain(conn, "e", transaction.ident)
        if commit:
            self.fire(transaction.commit(), conn)

    def forget_transactions(self, conn: Connection) -> None:
        for ident in list(conn.transactions):
            del conn.transactions[ident]
            self._note_domain(conn, "e", ident)

    # -- persistence --------------------------------------------------------------------------------------

    def save(self, *, nodes: bool = True) -> dict[str, Any]:
        """JSON form of everything but the tools' connections, which end with the process."""
        domains = {str(domid): self.save_domain(domid) for domid in self.domains}
        quota = dict(self._quota)
        return {"version": STATE_VERSION, "store": self.store.save(nodes=nodes), "domains": domains, "quota": quota}

    @classmethod
    def restore(
        cls,
        data: dict[str, Any],
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> Server:
        """From `save`. Each domain waits for its `introduce`; its open transactions will end in EAGAIN.

        :raises ValueError, KeyError, TypeError, XenstoreError: it was not made by `save` of this version.
        """
        if data.get("version") != STATE_VERSION:
            raise ValueError(f"xenstore state of version {data.get('version')}: {STATE_VERSION} is known here")
        server = cls(limits, clock=clock, journal=journal, store=Store.restore(data["store"]))
        for name, value in data.get("quota", {}).items():
            server.set_quota(str(name), int(value))
        for text, saved in data["domains"].items():
            server.load_domain(int(text), saved)
        return server

    def load_domain(self, domid: int, saved: dict[str, Any]) -> None:
        """A domain that waits for its `introduce`; nothing is journalled. :raises: as `restore`."""
        conn = self._domains[domid] = self._connection(Who(domid, saved["target"]))
        conn.load(saved)
        if saved["shutdown"]:
            self._shutdown.add(domid)
        for path, token, prefix, depth in saved["watches"]:
            self.watches.add(conn, Watch(path, token.encode("latin-1"), int(prefix), int(depth)))
        for ident in saved["transactions"]:
            conn.transactions[ident] = Transaction(ident, self.store, conn.who, conn.limits, doomed=True)
        if saved["positions"] is not None:
            req_cons, rsp_base = saved["positions"]
            self._restored[domid] = (int(req_cons), int(rsp_base))

    def save_domain(self, domid: int) -> dict[str, Any]:
        """For `load_domain`. :raises NotFound: it is not being served."""
        conn = self.domain(domid)
        positions = conn.endpoint.positions() if conn.endpoint is not None else self._restored.get(domid)
        return {
            **conn.save(),
            "target": conn.who.target,
            "shutdown": domid in self._shutdown,
            "watches": [w.to_json() for w in self.watches.of(conn)],
            "positions": list(positions) if positions is not None else None,
        }

    # -- helpers --------------------------------------------------------------------------------------------

    def _connection(self, who: Who, label: str = "") -> Connection:
        bucket = Bucket(self.limits.write_rate, self.limits.write_burst, self.clock)
        return Connection(who, self.limits, bucket, label)

    def domain(self, domid: int) -> Connection:
        """A domain's connection. :raises NotFound: it is not being served."""
        conn = self._domains.get(domid)
        if conn is None:
            raise NotFound(f"domain {domid} is not introduced")
        return conn

    def _event(self, conn: Connection, watch: Watch, path: str, origin: Connection | None) -> None:
        payload = watch.event(path)
        if len(payload) <= PAYLOAD_MAX and not conn.closed:
            data = conn.push_event(payload, origin, once=not path.startswith("@"))
            if data is not None:
                self._sent(conn, data, True)

    def _sent(self, conn: Connection, data: bytes, is_event: bool) -> None:
        self._ready[conn] = None
        self._note_domain(conn, "o", data.decode("latin-1"), is_event)

    def _note_domain(self, conn: Connection, kind: str, *rest: Any) -> None:
        """Only what concerns a domain is noted; a tool's connection ends with the process."""
        if not conn.who.privileged:
            self._note([kind, conn.who.domid, *rest])

    def _note_node(self, path: str, node: Node | None) -> None:
        self._note(["n", path, node_to_json(node) if node is not None else None])

    def note(self, records: list[Record]) -> None:
        """They are part of the present step."""
        for record in records:
            self._note(record)

    def _note(self, record: Record) -> None:
        if self.journal is not None:
            self._records.append(record)
