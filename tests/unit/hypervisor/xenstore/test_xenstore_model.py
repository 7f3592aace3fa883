"""Random requests of several clients against a naive model, restarts of the server in between.

What is asked of transactions: a committed one gave the answers it would have
given had it run at once, at its commit; one that ended in EAGAIN left no
trace, and another did change something meanwhile, or there was a restart.

What is asked of watches: whoever may read a node, or the one above it, before
or after a change, hears of it by each watch on the node or above it, within
its depth; who may not hears nothing. Of a removed tree each watch within it hears.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.xenstore.perms import parse, parse_text
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.store import Store
from hypervisor.xenstore.wire import Op

PATHS = ["/", "/a", "/a", "/a/x", "/a/x", "/a/x/y", "/b", "/b/x/y", "/local/domain/5/x"]
PERMS = ["n0", "r0", "b0", "b0", "n5", "n5,r6", "b6,n5", "n0,w5,r6"]
CLIENTS = [0, 5, 6]

requests = st.tuples(
    st.sampled_from([Op.READ, Op.WRITE, Op.WRITE, Op.MKDIR, Op.RM, Op.DIRECTORY, Op.GET_PERMS, Op.SET_PERMS]),
    st.sampled_from(PATHS),
    st.one_of(st.sampled_from(PERMS), st.text("uvw", max_size=3)),
)
watches = st.tuples(
    st.sampled_from(["watch", "watch", "unwatch"]),
    st.sampled_from([*PATHS, "x", "/none"]),
    st.sampled_from(["", "0", "1", "2"]),
)
clients = st.sampled_from([0, 0, 5, 6])
direct = st.tuples(clients, st.just(""), requests).map(lambda step: [step])
watching = st.tuples(clients, st.just(""), watches).map(lambda step: [step])
restarts = st.just([(0, "", "restart")])


@st.composite
def transactions(draw: Any) -> list[Any]:
    """One client's transaction, requests of others in between."""
    who = draw(clients)
    inside = st.tuples(st.just(who), st.just("T"), requests)
    others = st.tuples(clients, st.just(""), requests)
    block = draw(st.lists(st.one_of(inside, inside, others), min_size=2, max_size=6))
    return [*block, (who, "T", draw(st.sampled_from("TTTF")))]


kinds = [*[direct] * 6, watching, *[transactions()] * 6, restarts]
blocks = st.sampled_from(kinds).flatmap(lambda kind: kind)
scripts = st.lists(blocks, min_size=12, max_size=25).map(lambda found: [step for block in found for step in block])

Events = dict[int, set[tuple[str, str]]]
Heard = dict[str, tuple[bool, set[int]]]
"""Changed paths: whether the watches above are concerned, and who may hear."""


def up(path: str) -> str:
    return path.rpartition("/")[0] or "/"


@dataclass
class Model:
    """Paths to (value, permissions); as plain as can be."""

    nodes: dict[str, tuple[str, str]] = field(default_factory=dict)
    watches: dict[int, list[tuple[str, str]]] = field(default_factory=dict)

    def right(self, who: int, path: str) -> str:
        entries = self.nodes[path][1].split(",")
        if who == 0 or int(entries[0][1:]) == who:
            return "rwo"
        letter = next((e[0] for e in entries[1:] if int(e[1:]) == who), entries[0][0])
        return {"n": "", "r": "r", "w": "w", "b": "rw"}[letter]

    def refusal(self, who: int, path: str, need: str) -> str | None:
        if path in self.nodes and set(need) <= set(self.right(who, path)):
            return None
        above = up(path)
        while above not in self.nodes:
            above = up(above)
        if path in self.nodes and path != "/":
            return "EACCES"
        return "ENOENT" if path not in self.nodes and set(need) & set(self.right(who, above)) else "EACCES"

    def make(self, who: int, path: str) -> None:
        if path not in self.nodes:
            self.make(who, up(path))
            first, *rest = self.nodes[up(path)][1].split(",")
            owner = first if who == 0 else f"{first[0]}{who}"
            self.nodes[path] = ("", ",".join([owner, *rest]))

    def ask(self, who: int, op: Op, path: str, extra: str) -> str:
        need = {Op.READ: "r", Op.DIRECTORY: "r", Op.GET_PERMS: "r", Op.SET_PERMS: "wo"}.get(op, "w")
        refusal = self.refusal(who, path, need)
        if refusal and (refusal == "EACCES" or need != "w"):
            return refusal
        if op == Op.READ:
            return self.nodes[path][0]
        if op == Op.GET_PERMS:
            return self.nodes[path][1]
        if op == Op.DIRECTORY:
            return ",".join(sorted(p.rpartition("/")[2] for p in self.nodes if up(p) == path and p != "/"))
        if op == Op.SET_PERMS:
            return self.set_perms(who, path, extra)
        if op == Op.RM:
            return self.remove(path)
        self.make(who, path)
        if op == Op.WRITE:
            self.nodes[path] = (extra, self.nodes[path][1])
        return "OK"

    def set_perms(self, who: int, path: str, perms: str) -> str:
        owner = self.nodes[path][1].split(",")[0][1:]
        if who != 0 and perms.split(",")[0][1:] != owner:
            return "EPERM"
        self.nodes[path] = (self.nodes[path][0], perms)
        return "OK"

    def remove(self, path: str) -> str:
        if path not in self.nodes:
            return "OK" if up(path) in self.nodes else "ENOENT"
        if path == "/":
            return "EINVAL"
        self.nodes = {p: n for p, n in self.nodes.items() if p != path and not p.startswith(path + "/")}
        return "OK"

    # -- watches: each is (path as the client wrote it, depth)

    def changed(self, op: Op, path: str, before: dict[str, tuple[str, str]]) -> list[tuple[str, bool]]:
        """What a successful request changed: paths, and whether the watches above are concerned."""
        if op == Op.RM:
            return [(p, p == path) for p in before if p not in self.nodes]
        if op == Op.MKDIR and path in before:
            return []
        return [(path, True)] if op in (Op.WRITE, Op.MKDIR, Op.SET_PERMS) else []

    def may_hear(self, who: int, path: str, before: dict[str, tuple[str, str]]) -> bool:
        now, then = self, Model(before)
        return any("r" in m.right(who, p) for m in (now, then) for p in (path, up(path)) if p in m.nodes)

    def note(self, heard: Heard, op: Op, path: str, before: dict[str, tuple[str, str]]) -> None:
        """Add what a successful request changed."""
        for changed, above in self.changed(op, path, before):
            was_above, who = heard.get(changed, (False, set()))
            heard[changed] = was_above or above, who | {w for w in CLIENTS if self.may_hear(w, changed, before)}

    def events(self, heard: Heard) -> Events:
        found: Events = {who: set() for who in CLIENTS}
        for path, (above, hearers) in heard.items():
            for who in hearers:
                found[who] |= {event for w in self.watches[who] for event in told(who, w, path, above)}
        return found


def told(who: int, watch: tuple[str, str], path: str, above: bool) -> set[tuple[str, str]]:
    """How one watch words a change, if it concerns it."""
    written, depth = watch
    home = f"/local/domain/{who}/"
    full = written if written.startswith("/") else home + written
    below = path.removeprefix(full) if full != "/" else path.removesuffix("/")
    if path != full and not (above and path.startswith(full.rstrip("/") + "/")):
        return set()
    if depth and below.count("/") > int(depth):
        return set()
    return {(path.removeprefix(home) if written != full else path, written + "," + depth)}


def ask(client: Any, op: Op, path: str, extra: str, tx: int) -> str:
    payload = path.encode() + b"\0"
    if op == Op.WRITE:
        payload += extra.encode()
    elif op == Op.SET_PERMS:
        payload += extra.replace(",", "\0").encode() + b"\0"
    answer = client.ask(op, payload, tx)
    if op in (Op.DIRECTORY, Op.GET_PERMS) and not answer.startswith(b"E"):
        names = answer.decode().split("\0")[:-1]
        return ",".join(sorted(names) if op == Op.DIRECTORY else names)
    return answer.rstrip(b"\0").decode()


def contents(store: Store) -> dict[str, tuple[str, str]]:
    nodes = store.save()["nodes"]
    return {path: (value, acl) for path, (value, acl, _) in nodes.items() if path.startswith("/")}


@dataclass
class Open:
    ident: int
    version: int
    doomed: bool = False
    log: list[tuple[tuple[Op, str, str], str]] = field(default_factory=list)


class Run:
    """The server under test beside the model, and the transactions that are open."""

    def __init__(self, world: Any) -> None:
        self.world = world
        for who in CLIENTS:
            world.domain(who)
        for path, perms in (("/a", b"b0"), ("/a/x", b"n5"), ("/b", b"n5\0r6")):
            world.dom0.ask(Op.WRITE, path.encode() + b"\0")
            world.dom0.ask(Op.SET_PERMS, path.encode() + b"\0" + perms + b"\0")
        self.model = Model(contents(world.server.store), {who: [] for who in CLIENTS})
        self.version = 0
        self.open: dict[tuple[int, str], Open] = {}
        for who in CLIENTS:
            self.watch(who, "watch", "/", "")

    def check(self, heard: Events) -> None:
        assert contents(self.world.server.store) == self.model.nodes
        for who in CLIENTS:
            assert set(self.world.clients[who].take_events()) == heard[who], who

    def request(self, who: int, name: str, op: Op, path: str, extra: str) -> None:
        client = self.world.clients[who]
        heard: Events = {w: set() for w in CLIENTS}
        if name:
            tx = self.open.setdefault((who, name), Open(0, self.version))
            tx.ident = tx.ident or client.start()
            tx.log.append(((op, path, extra), ask(client, op, path, extra, tx.ident)))
        else:
            self.version += op in (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)
            before = dict(self.model.nodes)
            answer = self.model.ask(who, op, path, extra)
            assert ask(client, op, path, extra, 0) == answer
            if answer == "OK":
                changes: Heard = {}
                self.model.note(changes, op, path, before)
                heard = self.model.events(changes)
        self.check(heard)

    def end(self, who: int, name: str, word: str) -> None:
        tx = self.open.pop((who, name), None)
        if tx is None:
            return
        before = dict(self.model.nodes)
        changes: Heard = {}
        answer = self.world.clients[who].ask(Op.TRANSACTION_END, word.encode() + b"\0", tx.ident)
        if answer == b"EAGAIN":
            assert self.version != tx.version, "nobody else changed anything"
        elif word == "T":
            assert answer == b"OK\0" and not tx.doomed
            for (op, path, extra), reply in tx.log:
                step = dict(self.model.nodes)
                assert self.model.ask(who, op, path, extra) == reply, "not as if it had run at its commit"
                if reply == "OK":
                    self.model.note(changes, op, path, step)
        self.version += self.model.nodes != before
        # Made readable behind a change, in the same transaction, a node is readable after it, too.
        for path, (above, who_hears) in changes.items():
            after = {w for w in CLIENTS if self.model.may_hear(w, path, before)}
            changes[path] = (above, who_hears | after)
        # All that a transaction did to a path is one change. A right that was there only within may or may not count.
        most = self.model.events(changes)
        heard = {w: set(self.world.clients[w].take_events()) for w in CLIENTS}
        assert heard[0] == most[0]
        assert all(heard[w] <= most[w] for w in CLIENTS)
        self.check({w: set() for w in CLIENTS})

    def watch(self, who: int, what: str, path: str, depth: str) -> None:
        client, watches = self.world.clients[who], self.model.watches[who]
        payload = f"{path}\0{path},{depth}\0".encode()
        heard: Events = {w: set() for w in CLIENTS}
        there = (path, depth) in watches
        if what == "watch":
            answer = client.ask(Op.WATCH, payload + (depth.encode() + b"\0" if depth else b""))
            assert answer == (b"EEXIST" if there else b"OK\0")
            if not there:
                watches.append((path, depth))
                heard[who] = {(path, f"{path},{depth}")}
        else:
            assert client.ask(Op.UNWATCH, payload) == (b"OK\0" if there else b"ENOENT")
            if there:
                watches.remove((path, depth))
        self.check(heard)

    def restart(self) -> None:
        """Domains go on; tools connect again, with nothing of what they had."""
        self.world.restart(Server.restore(json.loads(json.dumps(self.world.server.save()))))
        self.model.watches[0] = []
        self.open = {key: tx for key, tx in self.open.items() if key[0] != 0}
        for tx in self.open.values():
            tx.version, tx.doomed = -1, True
        self.check({w: set() for w in CLIENTS})


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(scripts)
def test_the_server_does_as_the_model(make_world: Any, script: list[Any]) -> None:
    run = Run(make_world())
    for who, name, what in script:
        if what == "restart":
            run.restart()
        elif isinstance(what, str):
            run.end(who, name, what)
        elif isinstance(what[0], Op):
            op, path, extra = what
            run.request(who, name, op, path, "n0" if op == Op.SET_PERMS and extra not in PERMS else extra)
        else:
            run.watch(who, *what)
    check_accounts(run.world.server.store)


def check_accounts(store: Store) -> None:
    again = Store.restore(store.save())
    assert again.save() == store.save()
    for domid in CLIENTS:
        owned = [(p, store.get(p)) for p in store.save()["nodes"]]
        mine = [(p, n) for p, n in owned if n is not None and n.acl.owner == domid]
        assert store.nodes_of(domid) == again.nodes_of(domid) == len(mine)
        assert store.bytes_of(domid) == again.bytes_of(domid) == sum(n.size + len(p) for p, n in mine)


@given(st.lists(st.sampled_from(PERMS), min_size=1))
def test_permissions_keep_their_text(texts: list[str]) -> None:
    for text in texts:
        acl = parse_text(text)
        assert str(acl) == text
        assert parse(acl.encode().split(b"\0")[:-1]) == acl
