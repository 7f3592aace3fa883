"""CONTROL: what an administrator asks of xenstored itself (``xenstore-control``).

Words and answers are those of Xen 4.17's ``xenstored_control.c``. Left out are
``live-update`` (the host process is simply restarted), ``logfile`` and
``memreport <file>`` (no file is opened for whoever reaches the socket), and
``quota-soft`` (there are hard limits only).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from hypervisor.devices.rate import Bucket
from hypervisor.xenstore.errors import Invalid
from hypervisor.xenstore.quota import SETTABLE
from hypervisor.xenstore.store import Store
from hypervisor.xenstore.wire import Op, Packet, domid_of_guest, number

if TYPE_CHECKING:
    from hypervisor.xenstore.connection import Connection
    from hypervisor.xenstore.server import Server

LOG = logging.getLogger(__name__)

MAX_QUOTA = 1 << 30

_NAMES = {int(op): op.name for op in Op}
_LOG_RATE = 100.0
_LOG_BURST = 1000.0
_LOG_BYTES = 128


class AccessLog:
    """Every request and its answer in the log, while somebody wants it (``log on``).

    No more than a hundred lines a second, for guests cause them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.on = False
        self._bucket = Bucket(_LOG_RATE, _LOG_BURST, clock)
        self._left_out = 0

    def note(self, conn: Connection, packet: Packet, reply: Packet) -> None:
        if not self.on:
            return
        if self._bucket.delay():
            self._left_out += 1
            return
        self._bucket.take()
        if self._left_out:
            LOG.info("access: %d requests are not shown", self._left_out)
            self._left_out = 0
        name = _NAMES.get(packet.type, f"type {packet.type}")
        answer = "error" if reply.type == Op.ERROR else "answer"
        asked, said = packet.payload[:_LOG_BYTES], reply.payload[:_LOG_BYTES]
        LOG.info("access: %s: %s tx %d %r: %s %r", conn.label, name, packet.tx_id, asked, answer, said)


def run(server: Server, words: list[str]) -> str:
    """:returns: the answer, without its NUL. :raises XenstoreError: no such command, or not with these words."""
    found = _COMMANDS.get(words[0])
    if found is None:
        raise Invalid(f"no control command {words[0]!r}: ask for help")
    return found[1](server, words[1:])


def _check(server: Server, words: list[str]) -> str:
    _none(words)
    Store.restore(server.store.save())
    return "OK"


def _log(server: Server, words: list[str]) -> str:
    if words not in (["on"], ["off"]):
        raise Invalid("log takes on or off")
    server.access_log.on = words == ["on"]
    return "OK"


def _memreport(server: Server, words: list[str]) -> str:
    _none(words)
    LOG.info("memory: %d nodes", len(server.store))
    for domid in (0, *server.domains):
        LOG.info("memory: domain %d: %s", domid, ", ".join(f"{n} {v}" for n, v in _usage(server, domid).items()))
    return "OK"


def _print(_server: Server, words: list[str]) -> str:
    if len(words) != 1:
        raise Invalid("print takes one text")
    LOG.info("control: %r", words[0][:256])
    return "OK"


def _quota(server: Server, words: list[str]) -> str:
    if not words:
        lines = (
            f"{name:<17}: {getattr(server.limits, name.replace('-', '_')):8d} {what}" for name, what in SETTABLE.items()
        )
        return "Quota settings:\n" + "".join(line + "\n" for line in lines)
    if words[0] == "set":
        if len(words) != 3 or words[1] not in SETTABLE:
            raise Invalid("quota set takes the name of a quota and a number")
        value = number(words[2].encode(), MAX_QUOTA)
        if value < 1:
            raise Invalid("a quota is at least 1")
        server.set_quota(words[1].replace("-", "_"), value)
        return "OK"
    if len(words) != 1:
        raise Invalid("quota takes the number of a domain")
    domid = domid_of_guest(words[0].encode())
    server.domain(domid)
    lines = (f"{name:<16}: {value:8d}" for name, value in _usage(server, domid).items())
    return f"Domain {domid}:\n" + "".join(line + "\n" for line in lines)


def _help(_server: Server, words: list[str]) -> str:
    _none(words)
    return "".join(f"{name}\t{words_taken}\n" for name, (words_taken, _) in _COMMANDS.items())


def _usage(server: Server, domid: int) -> dict[str, int]:
    used = {"nodes": server.store.nodes_of(domid)}
    if server.is_introduced(domid):
        conn = server.domain(domid)
        used["watches"] = server.watches.count(conn)
        used["transactions"] = len(conn.transactions)
        used["outstanding"] = conn.outstanding
    used["memory"] = server.store.bytes_of(domid)
    return used


def _none(words: list[str]) -> None:
    if words:
        raise Invalid("this control command takes nothing")


_COMMANDS: dict[str, tuple[str, Callable[[Server, list[str]], str]]] = {
    "check": ("", _check),
    "log": ("on|off", _log),
    "memreport": ("", _memreport),
    "print": ("<string>", _print),
    "quota": ("[set <name> <val>|<domid>]", _quota),
    "help": ("", _help),
}
