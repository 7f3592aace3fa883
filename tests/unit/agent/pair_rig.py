"""Two agents without broker and threads over two fake hosts: one asks the other by a plain call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent import executor
from agent.api import JsonDict
from agent.errors import BrokerError, InstructionError, ReplyTimeout
from agent.journal import Accepted, Journal
from agent.wire import Instruction, Reply
from hypervisor.toolstack.api import DomainInfo, MigrationPhase
from hypervisor.toolstack.drivers.fake import FakeToolstack

MIB = 256
IDENT = "11111111-1111-4111-8111-111111111111"


class Killed(BaseException):
    """Of an agent; nothing in it catches it."""


@dataclasses.dataclass
class Network:
    """`agent.api.Peers` of every agent on it.

    :ivar down: hosts whose agent is not there: what is sent to it waits.
    :ivar broken: the broker is gone.
    :ivar asker: the host whose instruction it is that asks the others.
    :ivar asked: (host, verb, id) of everything that was sent.
    """

    rigs: dict[str, Rig] = dataclasses.field(default_factory=dict)
    down: set[str] = dataclasses.field(default_factory=set)
    broken: bool = False
    asker: str = "node1"
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    queues: dict[str, list[Instruction]] = dataclasses.field(default_factory=dict)

    def call(self, host: str, verb: str, args: JsonDict, *, ident: str, timeout: float, expire: bool) -> JsonDict:
        if self.broken:
            raise BrokerError("the broker is gone: start it")
        self.asked.append((host, verb, ident))
        # A deadline that has passed when a dead agent comes back; a living one answers at once.
        deadline = 1.0 if expire and host in self.down else None
        self.queues.setdefault(host, []).append(Instruction(ident, verb, host, dict(args), "peers", deadline))
        if host not in self.rigs or host in self.down:
            raise ReplyTimeout(f"the agent of host {host!r} gave no answer")
        try:
            self.deliver(host)
        except Killed:
            if host == self.asker:
                raise  # it is its own instruction that it waits for
            self.restart(host)
            raise ReplyTimeout(f"the agent of host {host!r} died") from None
        reply = self.answer(self.rigs[host], ident)
        if reply.error is not None:
            error = reply.error
            raise InstructionError(error["code"], error["message"], error["retryable"])
        return dict(reply.result or {})

    def tell(self, host: str, verb: str, args: JsonDict, *, ident: str) -> None:
        self.asked.append((host, verb, ident))
        self.queues.setdefault(host, []).append(Instruction(ident, verb, host, dict(args)))

    def call_all(
        self,
        host: str,
        verb: str,
        calls: Sequence[tuple[str, JsonDict]],
        *,
        at_once: int,
        done: Callable[[str, JsonDict | InstructionError], None],
        more: Callable[[], bool],
    ) -> None:
        for ident, args in calls:
            if not more():
                return
            try:
                outcome: JsonDict | InstructionError = self.call(host, verb, args, ident=ident, timeout=1, expire=False)
            except InstructionError as exc:
                outcome = exc
            done(ident, outcome)

    def deliver(self, host: str) -> None:
        """The agent carries out what it had begun, then what lies in its queue."""
        rig = self.rigs[host]
        if host != self.asker:  # which is in the middle of something, if anybody asks it
            for ident in rig.journal.unfinished():
                rig.executor.run(ident)
        queue = self.queues.get(host, [])
        while queue:
            instruction = queue[0]
            assert rig.journal.accept(instruction) is not Accepted.REUSED
            queue.pop(0)
            rig.executor.run(instruction.id)

    def restart(self, host: str) -> None:
        """Its process is a new one."""
        rig = self.rigs[host]
        rig.journal.close()
        rig.journal = Journal(rig.journal.path)
        rig.journal._db.execute("PRAGMA synchronous=OFF")
        rig.executor._journal = rig.host.claims._journal = rig.journal  # type: ignore[attr-defined]

    def resume(self, host: str) -> None:
        """What an agent does at its start: finish what was begun, then take messages."""
        for ident in self.rigs[host].journal.unfinished():
            self.rigs[host].executor.run(ident)
        self.deliver(host)

    @staticmethod
    def answer(rig: Rig, ident: str) -> Reply:
        rows = [row for row in rig.journal.outbox(1000) if row.correlation_id == ident and row.routing_key == "peers"]
        for row in rows:
            rig.journal.published(row.seq)
        return Reply.from_json(json.loads(rows[0].body))


@dataclasses.dataclass
class Pair:
    """:ivar here: host ``node1`` with the domain `uuid`; `there` host ``node2``."""

    network: Network
    here: Rig
    there: Rig
    uuid: str = ""

    def both(self) -> tuple[Rig, Rig]:
        return self.here, self.there

    def where(self) -> tuple[str, str]:
        """State of the domain here and there; "" where there is none."""
        return _state(self.here, self.uuid), _state(self.there, self.uuid)

    def info(self, rig: Rig) -> DomainInfo:
        return rig.toolstack.get_domain(self.uuid)

    def migrate(self, **args: Any) -> Reply:
        return self.here.run("migrate", {"uuid": self.uuid, "target": "node2", **args}, id=IDENT)

    def live_through(self, at: str, monkeypatch: pytest.MonkeyPatch, **args: Any) -> Reply:
        """Migrate; whichever agent reaches `at` dies there and is started again."""
        return self.lives("migrate", {"uuid": self.uuid, "target": "node2", **args}, at, monkeypatch)

    def lives(self, verb: str, args: JsonDict, at: str, monkeypatch: pytest.MonkeyPatch, ident: str = IDENT) -> Reply:
        """An instruction of the host that asks; whichever agent reaches `at` dies there and is started again."""
        asker = self.network.rigs[self.network.asker]
        fired: list[str] = []

        def boundary(name: str) -> None:
            if name == at and not fired:
                fired.append(name)
                raise Killed

        monkeypatch.setattr(executor, "boundary", boundary)
        try:
            with contextlib.suppress(Killed):
                asker.executor.run(asker.accept(verb, args, id=ident))
        finally:
            monkeypatch.undo()
        assert fired, f"{at} was not reached"
        self.restart()
        return asker.reply(ident)

    def restart(self) -> None:
        """Both agents start, the target's first; whatever the driver has begun goes to its end."""
        for host in ("node2", "node1"):
            self.network.restart(host)
        for host in ("node2", "node1", "node2"):
            self.network.resume(host)

    def settled(self) -> None:
        """No open row, no claim, no record that nobody forgets, and what both hosts count is right."""
        for rig in self.both():
            rig.clean()
            assert rig.toolstack.migration_list() == []
            used = sum(info.memory_mib for info in rig.toolstack.list_domains())
            capacity = rig.host.claims.capacity()  # type: ignore[attr-defined]
            assert (capacity.memory_used_mib, capacity.memory_claimed_mib) == (used, 0)
            assert capacity.memory_free_mib == rig.toolstack.memory_mib - used

    def phases(self) -> tuple[MigrationPhase | None, MigrationPhase | None]:
        found = []
        for rig in self.both():
            statuses = rig.toolstack.migration_list()
            found.append(statuses[0].phase if statuses else None)
        return found[0], found[1]


def _state(rig: Rig, uuid: str) -> str:
    return next((info.state.value for info in rig.toolstack.list_domains() if info.uuid == uuid), "")


@contextlib.contextmanager
def make_pair(folder: Path, **options: Any) -> Iterator[Pair]:
    network = Network()
    rigs = []
    for number, name in enumerate(("node1", "node2")):
        (folder / name).mkdir()
        toolstack = FakeToolstack(str(folder / name / "host"), memory_mib=4096, first_domid=1 + 1000 * number)
        rigs.append(make_rig(folder / name, toolstack, name=name, peers=network, **options))
    network.rigs = {"node1": rigs[0], "node2": rigs[1]}
    pair = Pair(network, *rigs)
    pair.uuid = rigs[0].create(memory_mib=MIB, vcpus=2)
    try:
        yield pair
    finally:
        for rig in rigs:
            rig.journal.close()
            rig.toolstack.close()
        shutil.rmtree(folder)
