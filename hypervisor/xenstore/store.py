"""The tree: every node by its path, immutable nodes, generation counts.

Operations (`hypervisor.xenstore.tree`) work on a `View`: the live `Store`, or
a transaction's own view of it. A view never checks permissions or limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hypervisor.xenstore import path as paths
from hypervisor.xenstore.perms import Acl, parse_text

_NODE_OVERHEAD = 16
_ENTRY_SIZE = 8


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    :ivar children: names, in the order they were made.
    :ivar generation: of its last change (value, permissions or list of children); unique in its store.
    """

    value: bytes
    acl: Acl
    children: tuple[str, ...] = ()
    generation: int = 0

    @property
    def size(self) -> int:
        """Bytes that count against its owner."""
        names = sum(map(len, self.children)) + len(self.children)
        return _NODE_OVERHEAD + _ENTRY_SIZE * len(self.acl.entries) + len(self.value) + names

    def with_child(self, name: str) -> Node:
        return replace(self, children=(*self.children, name))

    def without_child(self, name: str) -> Node:
        return replace(self, children=tuple(c for c in self.children if c != name))


class View(Protocol):
    """A place where nodes are read and written."""

    def get(self, path: str) -> Node | None: ...

    def put(self, path: str, node: Node) -> None:
        """Set a node; the view gives it a new generation."""

    def drop(self, path: str) -> None:
        """Forget a node; the caller takes it from its parent's children."""

    def nodes_of(self, domid: int) -> int:
        """Nodes a domain owns."""

    def bytes_of(self, domid: int) -> int:
        """Bytes of the nodes a domain owns."""


@dataclass(slots=True)
class Usage:
    nodes: int = 0
    size: int = 0


def account(usage: dict[int, Usage], path: str, node: Node, sign: int) -> None:
    """Add (+1) or take away (-1) a node from its owner's account."""
    entry = usage.setdefault(node.acl.owner, Usage())
    entry.nodes += sign
    entry.size += sign * (node.size + len(path))
    if not entry.nodes and not entry.size:
        del usage[node.acl.owner]


class Store:
    """The live tree. Fresh, it holds the root and the special watches' nodes, owned by dom0.

    :ivar generation: count of changes so far.
    :ivar on_change: called after each change with path and new node (None: gone); for a journal.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.on_change: Callable[[str, Node | None], None] | None = None
        self._nodes: dict[str, Node] = {}
        self._usage: dict[int, Usage] = {}
        for path in ("/", paths.INTRODUCE_DOMAIN, paths.RELEASE_DOMAIN):
            self.put(path, Node(b"", parse_text("n0")))

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def put(self, path: str, node: Node) -> None:
        old = self._nodes.get(path)
        if old is not None:
            account(self._usage, path, old, -1)
        new = replace(node, generation=self.tick())
        self._nodes[path] = new
        account(self._usage, path, new, 1)
        if self.on_change is not None:
            self.on_change(path, new)

    def drop(self, path: str) -> None:
        old = self._nodes.pop(path)
        account(self._usage, path, old, -1)
        self.generation += 1
        if self.on_change is not None:
            self.on_change(path, None)

    def tick(self) -> int:
        """A generation that no node had before."""
        self.generation += 1
        return self.generation

    def nodes_of(self, domid: int) -> int:
        usage = self._usage.get(domid)
        return usage.nodes if usage else 0

    def bytes_of(self, domid: int) -> int:
        usage = self._usage.get(domid)
        return usage.size if usage else 0

    def involving(self, domid: int) -> list[tuple[str, Node]]:
        """Every node that names a domain in its permissions, parents before children."""
        found = [(p, n) for p, n in self._nodes.items() if any(e.domid == domid for e in n.acl.entries)]
        return sorted(found, key=lambda item: item[0].count("/"))

    def snapshot(self) -> list[tuple[str, Node]]:
        """All nodes as they are now; later changes do not touch it."""
        return list(self._nodes.items())

    def save(self, *, nodes: bool = True) -> dict[str, Any]:
        """JSON form. Lists of children are not in it: the paths say them. :param nodes: False leaves all nodes out."""
        found = {path: node_to_json(node) for path, node in self._nodes.items()} if nodes else {}
        return {"generation": self.generation, "nodes": found}

    @classmethod
    def restore(cls, data: dict[str, Any]) -> Store:
        """:raises KeyError, ValueError, TypeError, XenstoreError: it was not made by `save`."""
        store = cls()
        children: dict[str, list[str]] = {}
        for path in data["nodes"]:
            if path.startswith("/") and path != "/":
                children.setdefault(paths.parent(path), []).append(paths.basename(path))
        store._nodes.clear()
        store._usage.clear()
        for path, (value, acl, generation) in data["nodes"].items():
            node = Node(value.encode("latin-1"), parse_text(acl), tuple(children.pop(path, ())), int(generation))
            store._nodes[path] = node
            account(store._usage, path, node, 1)
        if children or "/" not in store._nodes:
            raise ValueError(f"a saved node has no parent: {next(iter(children), '/')}")
        store.generation = int(data["generation"])
        return store


def node_to_json(node: Node) -> list[Any]:
    return [node.value.decode("latin-1"), str(node.acl), node.generation]
