"""Transactions: a private view of the store that is committed as a whole or not at all.

The rule is that of Xen's xenstored: a transaction remembers the generation of
every node (or its absence) when it first touched it, be it by reading,
writing, listing or only passing it on the way to a missing node. At the end
each of them must still have that generation in the live store, else the
answer is EAGAIN and nothing is changed. So a committed transaction is as if
it had run at once, at its commit. Nothing of the store is copied up front.
"""

from __future__ import annotations

from dataclasses import replace

from hypervisor.xenstore.errors import Conflict
from hypervisor.xenstore.perms import Who
from hypervisor.xenstore.quota import Limits, check
from hypervisor.xenstore.store import Node, Store, Usage, account
from hypervisor.xenstore.tree import Change

_ABSENT = 0
"""Stands for the generation of a node that is not there; the store's begin at 1."""


class Transaction:
    """A `View` whose changes stay its own until `commit`.

    :param doomed: it cannot be committed any more (its content was lost in a restart); requests in it
        still work, so that the client finds out where it expects to, at the end.
    """

    def __init__(self, ident: int, store: Store, who: Who, limits: Limits, *, doomed: bool = False) -> None:
        self.ident = ident
        self.doomed = doomed
        self._store = store
        self._who = who
        self.limits = limits
        self._seen: dict[str, int] = {}
        self._written: dict[str, Node | None] = {}
        self._usage: dict[int, Usage] = {}
        self._held = 0
        self._changes: dict[str, Change] = {}

    def get(self, path: str) -> Node | None:
        """:raises QuotaExceeded: it holds or touches as much as it may; it can still be ended, or committed."""
        if path not in self._seen:
            check(self._who, len(self._seen) + 1, self.limits.transaction_nodes, "nodes in a transaction")
            self._held += len(path)
            self._seen[path] = self._live_generation(path)
        check(self._who, self._held, self.limits.transaction_bytes, "bytes in a transaction")
        return self._current(path)

    def put(self, path: str, node: Node) -> None:
        self._replace(path, replace(node, generation=self._store.tick()))

    def drop(self, path: str) -> None:
        self._replace(path, None)

    def nodes_of(self, domid: int) -> int:
        own = self._usage.get(domid)
        return self._store.nodes_of(domid) + (own.nodes if own else 0)

    def bytes_of(self, domid: int) -> int:
        own = self._usage.get(domid)
        return self._store.bytes_of(domid) + (own.size if own else 0)

    def record(self, changes: list[Change]) -> None:
        """Keep changes for the watches until the commit; one per path, the wider one wins."""
        for change in changes:
            known = self._changes.pop(change.path, None)
            if known is not None:
                subtree = known.subtree or change.subtree
                change = Change(change.path, subtree, tuple(dict.fromkeys(known.acls + change.acls)))
            self._changes[change.path] = change

    def commit(self) -> list[Change]:
        """Make the changes real.

        :returns: what the watches are to hear of.
        :raises Conflict: another changed a node that this transaction touched.
        :raises QuotaExceeded: others used up its owner's quota meanwhile.
        """
        if self.doomed:
            raise Conflict("a node was changed by another, or the transaction was lost in a restart")
        for path, generation in self._seen.items():
            if self._live_generation(path) != generation:
                raise Conflict(f"{path} was changed by another")
        own = self._usage.get(self._who.domid)
        if own is not None and own.nodes > 0:
            check(self._who, self.nodes_of(self._who.domid), self.limits.nodes, "nodes")
        if own is not None and own.size > 0:
            check(self._who, self.bytes_of(self._who.domid), self.limits.memory, "bytes of nodes")
        for path, node in self._written.items():
            if node is not None:
                self._store.put(path, node)
            elif self._store.get(path) is not None:
                self._store.drop(path)
        return list(self._changes.values())

    def _live_generation(self, path: str) -> int:
        node = self._store.get(path)
        return node.generation if node is not None else _ABSENT

    def _current(self, path: str) -> Node | None:
        if path in self._written:
            return self._written[path]
        if self._live_generation(path) != self._seen[path]:
            self.doomed = True
        return self._store.get(path)

    def _replace(self, path: str, node: Node | None) -> None:
        old = self._current(path)
        self._held += _weight(node) - _weight(self._written.get(path))
        if old is not None:
            account(self._usage, path, old, -1)
        if node is not None:
            account(self._usage, path, node, 1)
        self._written[path] = node


def _weight(node: Node | None) -> int:
    return node.size if node is not None else 0
