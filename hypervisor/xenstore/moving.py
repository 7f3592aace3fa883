"""A domain's part of xenstored on its way to another host: its nodes, its connection, its back ends' nodes.

The domid is the same there, so every path is. What other domains have to do with it stays behind: permissions for
them, and its target. Open transactions end in EAGAIN, as after a restart of xenstored.

What arrives is hostile: paths below the domain's own homes only, no more than a domain may have or a toolstack
writes, permissions for itself and domain 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hypervisor.xenstore import path as paths
from hypervisor.xenstore import records, tree
from hypervisor.xenstore.errors import Invalid, XenstoreError
from hypervisor.xenstore.path import domain_path
from hypervisor.xenstore.perms import DOM0, DOMID_ANY, Acl, parse_text
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.store import Node
from hypervisor.xenstore.wire import HEADER, PAYLOAD_MAX

MAX_NODES = 20_000
"""At once."""
_BACKENDS = ("/local/domain/0/backend", "/local/domain/0/error/backend")


Nodes = list[list[str]]
"""Path, value and permissions of each, parents before children."""


@dataclasses.dataclass(slots=True)
class Given:
    """What the other host was told of a domain's nodes. :ivar generation: of the store at that time."""

    generation: int = -1
    paths: set[str] = dataclasses.field(default_factory=set)


def give_nodes(server: Server, domid: int, uuid: str, given: Given) -> Nodes:
    """All nodes that have changed since `given`, which is brought up to date; at first, all there are."""
    changed: Nodes = []
    paths_now: set[str] = set()
    for root in _homes(server, domid, uuid):
        todo = [root]
        while todo:
            path = todo.pop()
            node = server.store.get(path)
            if node is None:
                continue
            paths_now.add(path)
            if node.generation > given.generation or path not in given.paths:
                value, acl = node.value.decode("latin-1"), str(_without_strangers(node.acl, domid))
                changed.append([path, value, acl])
            todo += [paths.child(path, name) for name in reversed(node.children)]
    given.generation, given.paths = server.store.generation, paths_now
    return changed


def give(server: Server, domid: int, uuid: str, given: Given | None = None) -> dict[str, Any]:
    """JSON for `take`. Its ring must have been let go (`Server.detach`), so that nothing changes any more.

    :param given: what `take_nodes` was told there. :raises NotFound: it is not being served.
    """
    connection = {**server.save_domain(domid), "target": None}
    given = given or Given()
    before = given.paths
    nodes = give_nodes(server, domid, uuid, given)
    return {"nodes": nodes, "gone": sorted(before - given.paths, reverse=True), "connection": connection}


def take_nodes(server: Server, domid: int, uuid: str, nodes: object) -> None:
    """The nodes alone, while the domain is still elsewhere. :raises Invalid: as `take`."""
    if server.is_introduced(domid):
        raise Invalid(f"domain {domid} is there already")
    checked = _check_nodes(server, domid, uuid, nodes)
    children = _children(domid, uuid, checked)
    for home in _homes(server, domid, uuid):
        tree.remove(server.store, DOM0, home)
    changes = []
    for path, node in checked:
        if (above := paths.parent(path)) not in children:  # one of the homes
            _attach(server, above, path)
        server.store.put(path, Node(node.value, node.acl, tuple(children[path])))
        changes.append(tree.Change(path, True, (node.acl,)))
    # To those who watch here.
    server.fire(changes, None)
    server.settle()


def take(server: Server, domid: int, uuid: str, data: dict[str, Any]) -> None:
    """Become the host of a domain; it waits for its `introduce`.

    :param data: of `give`; with what `take_nodes` has taken before, if anything, all there is of it.
    :raises Invalid: `data` is not what `give` makes; nothing has changed.
    """
    if server.is_introduced(domid):
        raise Invalid(f"domain {domid} is there already")
    try:
        connection = _connection(server, domid, data["connection"])
        gone = [_own(domid, uuid, path) for path in data["gone"]]
    except (ValueError, KeyError, TypeError, AttributeError, XenstoreError) as exc:
        raise Invalid(f"xenstore nodes of domain {domid} from elsewhere make no sense: {exc!r}") from exc
    checked = _check_nodes(server, domid, uuid, data["nodes"])
    _check_parents(server, domid, uuid, checked, gone)
    _change(server, checked, gone)
    server.load_domain(domid, connection)
    server.note(records.of_domain(domid, connection))
    server.fire_special(paths.INTRODUCE_DOMAIN, domid)


def take_changes(server: Server, domid: int, uuid: str, data: dict[str, Any]) -> dict[str, Any]:
    """The nodes of what `give` has made, while the domain is still elsewhere; as `take_nodes` for those that changed.

    :returns: what is left of it, for `take`. :raises Invalid: as `take`; nothing has changed.
    """
    if server.is_introduced(domid):
        raise Invalid(f"domain {domid} is there already")
    try:
        gone = [_own(domid, uuid, path) for path in data["gone"]]
        nodes = data["nodes"]
    except (ValueError, KeyError, TypeError, AttributeError, XenstoreError) as exc:
        raise Invalid(f"xenstore nodes of domain {domid} from elsewhere make no sense: {exc!r}") from exc
    checked = _check_nodes(server, domid, uuid, nodes)
    _check_parents(server, domid, uuid, checked, gone)
    _change(server, checked, gone)
    server.settle()
    return {**data, "nodes": [], "gone": []}


def _change(server: Server, checked: list[tuple[str, Node]], gone: list[str]) -> None:
    changes: list[tree.Change] = []
    for path in gone:
        if server.store.get(path) is not None:
            changes += tree.remove(server.store, DOM0, path)
    for path, node in checked:
        before = server.store.get(path)
        if before is None:
            _attach(server, paths.parent(path), path)
        server.store.put(path, Node(node.value, node.acl, before.children if before is not None else ()))
        changes.append(tree.Change(path, True, (node.acl,)))
    # To those who watch here. The domain itself is not to notice.
    server.fire(changes, None)


def _check_nodes(server: Server, domid: int, uuid: str, nodes: object) -> list[tuple[str, Node]]:
    """:raises Invalid: they make no sense."""
    try:
        if not isinstance(nodes, list):
            raise ValueError("no list")
        checked = [_node(server, domid, uuid, *item) for item in nodes[: MAX_NODES + 1]]
    except (ValueError, TypeError, AttributeError, XenstoreError) as exc:
        raise Invalid(f"xenstore nodes of domain {domid} from elsewhere make no sense: {exc!r}") from exc
    if len({path for path, _ in checked}) != len(checked) or len(checked) > MAX_NODES:
        raise Invalid(f"domain {domid} comes with {len(checked)} nodes, or with one twice")
    return checked


def _own(domid: int, uuid: str, path: str) -> str:
    """:raises ValueError, XenstoreError: it is no path of the domain's."""
    if paths.canonical(path.encode("latin-1"), "") != path:
        raise ValueError(f"path {path[:100]!r}")
    _home_of(domid, uuid, path)
    return path


def _check_parents(server: Server, domid: int, uuid: str, nodes: list[tuple[str, Node]], gone: list[str]) -> None:
    """:raises Invalid: a node would have no parent. Parents come before their children."""
    made: set[str] = set()
    for path, _ in nodes:
        above = paths.parent(path)
        there = server.store.get(above) is not None and not any(paths.levels_below(above, way) >= 0 for way in gone)
        if not (there or above in made or _home_of(domid, uuid, path) == path):
            raise Invalid(f"node {path} comes without its parent")
        made.add(path)


def forget(server: Server, domid: int, uuid: str) -> None:
    """Take back what `take` did; what is not there is no error."""
    if server.is_introduced(domid):
        server.release(domid)
    changes: list[tree.Change] = []
    for home in _homes(server, domid, uuid):
        if server.store.get(home) is not None:
            changes += tree.remove(server.store, DOM0, home)
    server.fire(changes, None)
    server.settle()


def _homes(server: Server, domid: int, uuid: str) -> list[str]:
    """What is the domain's own, and there."""
    homes = [domain_path(domid), f"/vm/{uuid}", f"/libxl/{domid}"]
    for backends in _BACKENDS:
        above = server.store.get(backends)
        homes += [f"{backends}/{kind}/{domid}" for kind in (above.children if above is not None else ())]
    return [home for home in homes if server.store.get(home) is not None]


def _node(server: Server, domid: int, uuid: str, path: str, value: str, acl: str) -> tuple[str, Node]:
    _own(domid, uuid, path)
    content, permissions = value.encode("latin-1"), parse_text(acl)
    if len(content) > PAYLOAD_MAX or len(permissions.entries) > server.limits.permissions:
        raise ValueError(f"the node {path[:100]!r} is too large")
    if permissions != _without_strangers(permissions, domid):
        raise ValueError(f"permissions {acl[:100]!r}")
    return path, Node(content, permissions)


def _home_of(domid: int, uuid: str, path: str) -> str:
    """The domain's home in which a path lies. :raises ValueError: in none."""
    homes = [domain_path(domid), f"/vm/{uuid}", f"/libxl/{domid}"]
    words = path.split("/")
    for backends in _BACKENDS:
        at = backends.count("/") + 2
        if path.startswith(backends + "/") and len(words) > at and words[at] == str(domid):
            homes.append("/".join(words[: at + 1]))
    for home in homes:
        if paths.levels_below(path, home) >= 0:
            return home
    raise ValueError(f"path {path[:100]!r}")


def _without_strangers(acl: Acl, domid: int) -> Acl:
    known = (0, domid, DOMID_ANY)
    kept = tuple(entry for entry in acl.entries[1:] if entry.domid in known)
    first = acl.entries[0] if acl.owner in (0, domid) else acl.entries[0]._replace(domid=0)
    return Acl((first, *kept))


def _children(domid: int, uuid: str, nodes: list[tuple[str, Node]]) -> dict[str, list[str]]:
    """Names below each node. :raises Invalid: one has no parent among them, and is no home."""
    children: dict[str, list[str]] = {path: [] for path, _ in nodes}
    for path, _ in nodes:
        above = paths.parent(path)
        if above in children:
            children[above].append(paths.basename(path))
        elif _home_of(domid, uuid, path) != path:
            raise Invalid(f"node {path} comes without its parent")
    return children


def _attach(server: Server, above: str, path: str) -> None:
    """Make the way to a home, with domain 0's rights."""
    tree.mkdir(server.store, DOM0, above, server.limits)
    node = server.store.get(above)
    assert node is not None
    server.store.put(above, node.with_child(paths.basename(path)))


def _connection(server: Server, domid: int, data: dict[str, Any]) -> dict[str, Any]:
    """A checked copy."""
    limits = server.limits
    out = [(str(text), bool(event)) for text, event in data["out"]]
    watches = [(str(path), str(token), int(prefix), int(depth)) for path, token, prefix, depth in data["watches"]]
    transactions = [int(ident) for ident in data["transactions"]]
    unread = str(data["in"])
    positions: list[int] | None = None
    if data["positions"] is not None:
        positions = [int(position) & 0xFFFF_FFFF for position in data["positions"]]
    events = sum(len(text) for text, event in out if event)
    if len(watches) > limits.watches or len(transactions) > limits.transactions or events > limits.event_bytes:
        raise ValueError("more watches, transactions or events than a domain may have")
    if sum(not event for _, event in out) > limits.outstanding + 1 or len(unread) > HEADER.size + PAYLOAD_MAX:
        raise ValueError("more input or output than a domain may have")
    home = domain_path(domid)
    for text, _ in out:
        if not HEADER.size <= len(text.encode("latin-1")) <= HEADER.size + PAYLOAD_MAX:
            raise ValueError("a packet that is none")
    for path, token, prefix, depth in watches:
        special = path.startswith("@")
        if paths.canonical(path.encode("latin-1"), home, special=True) != path or depth < -1:
            raise ValueError(f"a watch on {path[:100]!r}")
        if prefix not in (0, len(home) + 1) or (special and prefix) or len(path) + len(token) > limits.watch_size:
            raise ValueError("a watch that is none")
        token.encode("latin-1")
    if positions is not None and len(positions) != 2:
        raise ValueError("positions")
    return {
        "in": unread.encode("latin-1").decode("latin-1"),
        "out": out,
        "transactions": transactions,
        "next_transaction": max(1, int(data["next_transaction"]) & 0xFFFF_FFFF),
        "target": None,
        "shutdown": bool(data["shutdown"]),
        "watches": watches,
        "positions": positions,
    }
