"""What one domain may use of xenstore, and the checks. dom0 has no limits.

The defaults are those of Xen's own xenstored where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisor.xenstore.errors import QuotaExceeded
from hypervisor.xenstore.perms import Who


@dataclass(frozen=True, slots=True)
class Limits:
    """Per unprivileged domain.

    :ivar nodes: nodes it may own.
    :ivar levels: of a path that it makes; a longer way costs time at each step of each change below it.
    :ivar node_size: bytes of one node: value, child names and permissions.
    :ivar memory: bytes of all nodes it owns, paths included.
    :ivar permissions: entries of one node.
    :ivar watches: watches it may have.
    :ivar watch_size: bytes of one watch: path and token.
    :ivar transactions: open at once.
    :ivar transaction_nodes: nodes one transaction may touch.
    :ivar transaction_bytes: bytes one transaction may have written and not committed.
    :ivar outstanding: replies it has not read; no further request of it is taken then.
    :ivar event_bytes: bytes of watch events waiting for it; what comes beyond is dropped. Also bytes of events of
        its making that wait for tools; no further request of it is taken then.
    :ivar tool_output_bytes: bytes waiting for one tool; no further request of it is taken then. With 16 times as
        much (events, for it watches and does not read) it is cut off.
    :ivar write_rate: writes a second while another connection has a transaction open.
    :ivar write_burst: writes it may do at once before that rate holds.
    """

    nodes: int = 1000
    levels: int = 64
    node_size: int = 2048
    memory: int = 1 << 20
    permissions: int = 5
    watches: int = 128
    watch_size: int = 4096
    transactions: int = 10
    transaction_nodes: int = 1024
    transaction_bytes: int = 1 << 18
    outstanding: int = 20
    event_bytes: int = 1 << 16
    tool_output_bytes: int = 1 << 20
    write_rate: float = 200.0
    write_burst: float = 100.0


SETTABLE = {
    "nodes": "Nodes per domain",
    "levels": "Levels of a node path",
    "watches": "Watches per domain",
    "watch-size": "Max. size of a watch",
    "transactions": "Transactions per domain",
    "transaction-nodes": "Max. number of accessed nodes per transaction",
    "transaction-bytes": "Max. size of a transaction",
    "outstanding": "Outstanding requests per domain",
    "event-bytes": "Max. size of unread watch events per domain",
    "memory": "Total size of nodes per domain",
    "node-size": "Max. size of a node",
    "permissions": "Max. number of permissions per node",
}
"""Limits that an administrator may change while it runs, by the names of ``xenstore-control quota``."""


def check(who: Who, used: int, most: int, what: str) -> None:
    """:raises QuotaExceeded: an unprivileged `who` would use more than it may."""
    if used > most and not who.privileged:
        raise QuotaExceeded(f"domain {who.domid} would have {used} {what}: {most} is its limit")
