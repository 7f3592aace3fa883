"""Random requests of several clients against a naive model.

What is asked of transactions: a committed one gave the answers it would have
given had it run at once, at its commit; one that ended in EAGAIN left no
trace, and another did change something meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.xenstore.perms import parse, parse_text
from hypervisor.xenstore.store import Store
from hypervisor.xenstore.wire import Op

PATHS = ["/", "/a", "/a/x", "/a/x/y", "/b", "/b/x", "/c/x/y"]
PERMS = ["n0", "r0", "b0", "n5", "n5,r6", "b6,n5", "n0,w5,r6"]
CLIENTS = [0, 5, 6]

requests = st.tuples(
    st.sampled_from([Op.READ, Op.WRITE, Op.WRITE, Op.MKDIR, Op.RM, Op.DIRECTORY, Op.GET_PERMS, Op.SET_PERMS]),
    st.sampled_from(PATHS),
    st.one_of(st.sampled_from(PERMS), st.text("uvw", max_size=3)),
)
steps = st.tuples(
    st.sampled_from(CLIENTS), st.sampled_from(["", "", "T", "U"]), st.one_of(requests, st.sampled_from(["T", "F"]))
)


def up(path: str) -> str:
    return path.rpartition("/")[0] or "/"


@dataclass
class Model:
    """Paths to (value, permissions); as plain as can be."""

    nodes: dict[str, tuple[str, str]] = field(default_factory=dict)

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
    log: list[tuple[tuple[Op, str, str], str]] = field(default_factory=list)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=50))
def test_the_server_does_as_the_model(make_world: Any, script: list[Any]) -> None:
    world = make_world()
    for who in CLIENTS:
        world.domain(who)
    model = Model(contents(world.server.store))
    version = 0
    running: dict[tuple[int, str], Open] = {}
    for who, name, what in script:
        client = world.clients[who]
        if isinstance(what, str):
            tx = running.pop((who, name), None)
            if tx is None:
                continue
            before = dict(model.nodes)
            answer = client.ask(Op.TRANSACTION_END, what.encode() + b"\0", tx.ident)
            if answer == b"EAGAIN":
                assert version != tx.version, "nobody else changed anything"
            elif what == "T":
                assert answer == b"OK\0"
                for request, reply in tx.log:
                    assert model.ask(who, *request) == reply, "not as if it had run at its commit"
            version += model.nodes != before
            assert contents(world.server.store) == model.nodes
            continue
        op, path, extra = what
        if op == Op.SET_PERMS and extra not in PERMS:
            extra = "n0"
        if name:
            tx = running.setdefault((who, name), Open(0, version))
            tx.ident = tx.ident or client.start()
            tx.log.append(((op, path, extra), ask(client, op, path, extra, tx.ident)))
        else:
            version += op in (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)
            assert ask(client, op, path, extra, 0) == model.ask(who, op, path, extra)
        assert contents(world.server.store) == model.nodes
    check_accounts(world.server.store)


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
