"""One function per request type, and the table of them (`HANDLERS`).

A function decodes the payload, calls the core and encodes the answer; it
raises `XenstoreError` for the table in `hypervisor.xenstore.errors` to name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.xenstore import control, perms, tree
from hypervisor.xenstore import path as paths
from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.errors import Busy, Invalid, NotFound, TooBig, UnknownOperation
from hypervisor.xenstore.quota import check
from hypervisor.xenstore.store import Store
from hypervisor.xenstore.transaction import Transaction
from hypervisor.xenstore.watch import Watch
from hypervisor.xenstore.wire import Op, domid_of, domid_of_guest, one_string, strings
from hypervisor.xenstore.wire import number as decimal

if TYPE_CHECKING:
    from hypervisor.xenstore.server import Server

LOG = logging.getLogger(__name__)

OK = b"OK\0"

DOMID_SELF = 0x7FF0


@dataclass(slots=True)
class Call:
    """A request being handled.

    :ivar transaction: the one that the request names; None outside of one.
    """

    server: Server
    conn: Connection
    payload: bytes
    transaction: Transaction | None = None

    @property
    def view(self) -> Transaction | Store:
        return self.transaction if self.transaction is not None else self.server.store

    def path(self, raw: bytes, *, special: bool = False) -> str:
        return paths.canonical(raw, paths.domain_path(self.conn.who.domid), special=special)

    def one_path(self, *, special: bool = False) -> str:
        return self.path(one_string(self.payload), special=special)

    def changed(self, changes: list[tree.Change]) -> bytes:
        if self.transaction is not None:
            self.transaction.record(changes)
        else:
            self.server.fire(changes, self.conn)
        return OK


# -- nodes ------------------------------------------------------------------------------------------------


def _read(call: Call) -> bytes:
    return tree.read(call.view, call.conn.who, call.one_path())


def _directory(call: Call) -> bytes:
    return tree.directory(call.view, call.conn.who, call.one_path())


def _directory_part(call: Call) -> bytes:
    raw, offset = strings(call.payload, 2, 2)
    return tree.directory_part(call.view, call.conn.who, call.path(raw), decimal(offset))


def _write(call: Call) -> bytes:
    raw, nul, value = call.payload.partition(b"\0")
    if not nul:
        raise Invalid("WRITE without a path")
    return call.changed(tree.write(call.view, call.conn.who, call.path(raw), value, call.conn.limits))


def _mkdir(call: Call) -> bytes:
    return call.changed(tree.mkdir(call.view, call.conn.who, call.one_path(), call.conn.limits))


def _rm(call: Call) -> bytes:
    return call.changed(tree.remove(call.view, call.conn.who, call.one_path()))


def _get_perms(call: Call) -> bytes:
    return tree.get_perms(call.view, call.conn.who, call.one_path(special=True)).encode()


def _set_perms(call: Call) -> bytes:
    raw, *fields = strings(call.payload, 2, 2048)
    acl = perms.parse(fields)
    path = call.path(raw, special=True)
    return call.changed(tree.set_perms(call.view, call.conn.who, path, acl, call.conn.limits))


# -- watches ----------------------------------------------------------------------------------------------


def _watch(call: Call) -> bytes:
    raw, token, *rest = strings(call.payload, 2, 3)
    path = call.path(raw, special=True)
    home = paths.domain_path(call.conn.who.domid)
    prefix = len(home) + 1 if paths.is_relative(raw) else 0
    watch = Watch(path, token, prefix, decimal(rest[0]) if rest else -1)
    limits = call.conn.limits
    if call.server.watches.count(call.conn) >= limits.watches and not call.conn.who.privileged:
        raise TooBig(f"domain {call.conn.who.domid} has {limits.watches} watches: that is its limit")
    check(call.conn.who, watch.size, limits.watch_size, "bytes in one watch")
    call.server.add_watch(call.conn, watch)
    return OK


def _unwatch(call: Call) -> bytes:
    raw, token, *_ = strings(call.payload, 2, 3)
    call.server.remove_watch(call.conn, call.path(raw, special=True), token)
    return OK


def _reset_watches(call: Call) -> bytes:
    call.server.forget_watches(call.conn)
    call.server.forget_transactions(call.conn)
    return OK


# -- transactions -----------------------------------------------------------------------------------------


def _transaction_start(call: Call) -> bytes:
    if call.transaction is not None:
        raise Busy("transactions do not nest")
    conn = call.conn
    check(conn.who, len(conn.transactions) + 1, conn.limits.transactions, "open transactions")
    return b"%d\0" % call.server.start_transaction(conn)


def _transaction_end(call: Call) -> bytes:
    word = one_string(call.payload)
    if word not in (b"T", b"F"):
        raise Invalid("TRANSACTION_END takes T or F")
    if call.transaction is None:
        raise NotFound("no transaction to end")
    call.server.end_transaction(call.conn, call.transaction, commit=word == b"T")
    return OK


# -- domains ----------------------------------------------------------------------------------------------


def _get_domain_path(call: Call) -> bytes:
    return paths.domain_path(domid_of(one_string(call.payload))).encode() + b"\0"


def _introduce(call: Call) -> bytes:
    domid, gfn, port, *_ = strings(call.payload, 3, 4)
    number, page, channel = domid_of_guest(domid), int(decimal(gfn.removeprefix(b"-"))), decimal(port)
    if not channel:
        raise Invalid("0 is no event channel port")
    if call.server.ring_mapper is None:
        raise UnknownOperation("this xenstored is told of domains by its host process")
    call.server.ring_mapper(number, -page if gfn.startswith(b"-") else page, channel)
    return OK


def _release(call: Call) -> bytes:
    call.server.release(domid_of_guest(one_string(call.payload)))
    return OK


def _is_domain_introduced(call: Call) -> bytes:
    domid = domid_of(one_string(call.payload))
    return b"T\0" if domid in (0, DOMID_SELF) or call.server.is_introduced(domid) else b"F\0"


def _resume(call: Call) -> bytes:
    call.server.domain_resumed(domid_of_guest(one_string(call.payload)))
    return OK


def _set_target(call: Call) -> bytes:
    domid, target, *_ = strings(call.payload, 2, 3)
    call.server.set_target(domid_of_guest(domid), domid_of_guest(target))
    return OK


def _control(call: Call) -> bytes:
    words = [word.decode("ascii", "replace") for word in strings(call.payload, 1, 16)]
    return control.run(call.server, words).encode() + b"\0"


@dataclass(frozen=True, slots=True)
class Handler:
    """:ivar privileged: dom0 only. :ivar in_transaction: whether the transaction id is looked at.

    :ivar writes: counts against the rate of writes.
    """

    function: Callable[[Call], bytes]
    privileged: bool = False
    in_transaction: bool = True
    writes: bool = False


def _dom0(function: Callable[[Call], bytes]) -> Handler:
    return Handler(function, privileged=True)


HANDLERS: dict[int, Handler] = {
    Op.DIRECTORY: Handler(_directory),
    Op.DIRECTORY_PART: Handler(_directory_part),
    Op.READ: Handler(_read),
    Op.WRITE: Handler(_write, writes=True),
    Op.MKDIR: Handler(_mkdir, writes=True),
    Op.RM: Handler(_rm, writes=True),
    Op.GET_PERMS: Handler(_get_perms),
    Op.SET_PERMS: Handler(_set_perms, writes=True),
    Op.WATCH: Handler(_watch, in_transaction=False),
    Op.UNWATCH: Handler(_unwatch, in_transaction=False),
    Op.RESET_WATCHES: Handler(_reset_watches, in_transaction=False),
    Op.TRANSACTION_START: Handler(_transaction_start),
    Op.TRANSACTION_END: Handler(_transaction_end, writes=True),
    Op.GET_DOMAIN_PATH: Handler(_get_domain_path),
    Op.INTRODUCE: _dom0(_introduce),
    Op.RELEASE: _dom0(_release),
    Op.IS_DOMAIN_INTRODUCED: _dom0(_is_domain_introduced),
    Op.RESUME: _dom0(_resume),
    Op.SET_TARGET: _dom0(_set_target),
    Op.CONTROL: _dom0(_control),
}
