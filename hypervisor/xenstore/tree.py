"""What the requests mean: reading and changing nodes of a `View` under permissions and limits.

Each function checks everything first and changes afterwards, so one that
raises has changed nothing. Functions that change return the `Change`s that
watches are to hear of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypervisor.xenstore import path as paths
from hypervisor.xenstore.errors import AccessDenied, Invalid, NotFound, NotPermitted, TooBig
from hypervisor.xenstore.perms import DOM0, Access, Acl, Who
from hypervisor.xenstore.quota import Limits, check
from hypervisor.xenstore.store import Node, Store, View
from hypervisor.xenstore.wire import PAYLOAD_MAX


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a node.

    :ivar subtree: watches on the ancestors hear of it too; otherwise only those on this very path
        (the nodes below a removed one).
    :ivar acls: permissions before and after: who may read by any of them may hear of it.
    """

    path: str
    subtree: bool
    acls: tuple[Acl, ...]


def find(view: View, who: Who, path: str, need: Access) -> Node | None:
    """The node at `path`, or None when there is none and `who` may know that.

    :raises AccessDenied: no right `need` to it, or to the nearest ancestor of a node that is not there.
    """
    node = view.get(path)
    if node is not None and node.acl.allowed(who) & need == need:
        return node
    # What a domain may learn of a node that it has no right to: as much as of the ancestor above it.
    above = path
    ancestor = None
    while ancestor is None and above != "/":
        above = paths.parent(above)
        ancestor = view.get(above)
    if node is not None or ancestor is None or not ancestor.acl.allowed(who) & need:
        raise AccessDenied(f"domain {who.domid} has no right to {path}")
    return None


def fetch(view: View, who: Who, path: str, need: Access) -> Node:
    """The node at `path`. :raises NotFound, AccessDenied: see `find`."""
    node = find(view, who, path, need)
    if node is None:
        raise NotFound(f"{path} does not exist")
    return node


def read(view: View, who: Who, path: str) -> bytes:
    return fetch(view, who, path, Access.READ).value


def directory(view: View, who: Who, path: str) -> bytes:
    """Names of the children, each with a NUL. :raises TooBig: more than a payload; use `directory_part`."""
    listing = _listing(fetch(view, who, path, Access.READ))
    if len(listing) > PAYLOAD_MAX:
        raise TooBig(f"the children of {path} are {len(listing)} bytes: read them in parts")
    return listing


def directory_part(view: View, who: Who, path: str, offset: int) -> bytes:
    """``<generation>|<child>|*`` from byte `offset` of the list; an empty name after the last one."""
    node = fetch(view, who, path, Access.READ)
    listing = _listing(node)
    head = f"{node.generation}".encode() + b"\0"
    rest = listing[offset:]
    room = PAYLOAD_MAX - len(head) - 1
    if len(rest) <= room:
        return head + rest + b"\0"
    return head + rest[: rest.rfind(b"\0", 0, room) + 1]


def write(view: View, who: Who, path: str, value: bytes, limits: Limits) -> list[Change]:
    """Set a value; make the node and its missing parents when there is none."""
    node = find(view, who, path, Access.WRITE)
    if node is None:
        return _create(view, who, path, value, limits)
    new = replace(node, value=value)
    _check_sizes(view, who, new.size - node.size if node.acl.owner == who.domid else 0, [new], limits)
    view.put(path, new)
    return [Change(path, True, (new.acl,))]


def mkdir(view: View, who: Who, path: str, limits: Limits) -> list[Change]:
    """Make a node and its missing parents; nothing happens when it is there."""
    if find(view, who, path, Access.WRITE) is not None:
        return []
    return _create(view, who, path, b"", limits)


def remove(view: View, who: Who, path: str) -> list[Change]:
    """Remove a node and all below it. No error when it is not there, but its parent must be."""
    node = find(view, who, path, Access.WRITE)
    if node is None:
        if view.get(paths.parent(path)) is None:
            raise NotFound(f"neither {path} nor its parent exists")
        return []
    if path == "/":
        raise Invalid("the root cannot be removed")
    parent_path = paths.parent(path)
    parent = view.get(parent_path)
    assert parent is not None, "a node has a parent"
    doomed = list(_walk(view, path, node, parent.acl))
    changes = [Change(p, p == path, (n.acl, above)) for p, n, above in doomed]
    for below, _node, _above in reversed(doomed):
        view.drop(below)
    view.put(parent_path, parent.without_child(paths.basename(path)))
    return changes


def get_perms(view: View, who: Who, path: str) -> Acl:
    return fetch(view, who, path, Access.READ).acl


def set_perms(view: View, who: Who, path: str, acl: Acl, limits: Limits) -> list[Change]:
    """:raises NotPermitted: an unprivileged owner would give the node away."""
    check(who, len(acl.entries), limits.permissions, "permissions on one node")
    node = fetch(view, who, path, Access.WRITE | Access.OWNER)
    if not who.privileged and acl.owner != node.acl.owner:
        raise NotPermitted("only dom0 changes a node's owner")
    new = replace(node, acl=acl)
    _check_sizes(view, who, new.size - node.size if acl.owner == who.domid else 0, [new], limits)
    view.put(path, new)
    return [Change(path, True, (node.acl, acl))]


def forget_domain(store: Store, domid: int) -> list[Change]:
    """A domain is gone: its nodes go with all below them, and so do others' permissions for it."""
    changes: list[Change] = []
    for path, _ in store.involving(domid):
        node = store.get(path)
        if node is None:
            continue
        if node.acl.owner == domid and path.startswith("/") and path != "/":
            changes += remove(store, DOM0, path)
        else:
            acl = node.acl.without(domid)
            store.put(path, replace(node, acl=acl.owned_by(0) if acl.owner == domid else acl))
    return changes


def _create(view: View, who: Who, path: str, value: bytes, limits: Limits) -> list[Change]:
    check(who, path.count("/"), limits.levels, "levels in a path")
    missing = [path]
    ancestor_path = paths.parent(path)
    while (ancestor := view.get(ancestor_path)) is None:
        missing.append(ancestor_path)
        ancestor_path = paths.parent(ancestor_path)
    missing.reverse()
    acl = ancestor.acl if who.privileged else ancestor.acl.owned_by(who.domid)
    nodes = [Node(b"", acl, (paths.basename(below),)) for below in missing[1:]] + [Node(value, acl)]
    grown = ancestor.with_child(paths.basename(missing[0]))

    growth = sum(node.size for node in nodes) + sum(map(len, missing))
    if ancestor.acl.owner == who.domid:
        growth += grown.size - ancestor.size
    check(who, view.nodes_of(who.domid) + len(nodes), limits.nodes, "nodes")
    _check_sizes(view, who, growth, [grown, *nodes], limits)

    view.put(ancestor_path, grown)
    for where, node in zip(missing, nodes, strict=True):
        view.put(where, node)
    return [Change(path, True, (acl,))]


def _check_sizes(view: View, who: Who, growth: int, nodes: list[Node], limits: Limits) -> None:
    for node in nodes:
        check(who, node.size, limits.node_size, "bytes in one node")
    if growth > 0:
        check(who, view.bytes_of(who.domid) + growth, limits.memory, "bytes of nodes")


def _listing(node: Node) -> bytes:
    return "".join(name + "\0" for name in node.children).encode()


def _walk(view: View, path: str, node: Node, above: Acl) -> Iterator[tuple[str, Node, Acl]]:
    """A node and all below it, parents first; no recursion, since a guest says how deep it is."""
    todo = [(path, node, above)]
    while todo:
        path, node, above = todo.pop()
        yield path, node, above
        for name in reversed(node.children):
            below = paths.child(path, name)
            child = view.get(below)
            assert child is not None, "a listed child exists"
            todo.append((below, child, node.acl))
