"""Micro-guests move between two real host processes; whatever dies on the way, exactly one copy runs in the end.

``REEVE_MIGRATION_CUTS=500`` lets something die at 500 random moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from build import available, build_guest
from host_rig import HostRig, kill_process, until
from moving_pair import Move, Pair, Phase, is_whole, kill_all, moving_pair, processes

from hypervisor.errors import HostUnavailable, MigrationRefused, ToolstackError, WrongState, from_json
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, MigrationOptions, OnEvent

if why := available():
    pytest.skip(why, allow_module_level=True)

MEMORY = 16
CUTS = int(os.environ.get("REEVE_MIGRATION_CUTS", "20"))
"""Runs in which something dies at a random moment."""


def a_spec(kernel: str, cmdline: str = "", **fields: object) -> DomainSpec:
    ident = str(uuid.uuid4())
    boot = KernelBoot(kernel=str(build_guest(kernel)), cmdline=cmdline)
    values = {"uuid": ident, "name": f"m-{ident[:8]}", "memory_mib": MEMORY, "owner": "tests"}
    values |= {"on_poweroff": OnEvent.PRESERVE, "on_crash": OnEvent.PRESERVE, **fields}
    return DomainSpec(boot=boot, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with moving_pair(tmp_path_factory.mktemp("pair"), traps=True) as pair:
        yield pair


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.clear()


def started(pair: Pair, spec: DomainSpec, line: bytes) -> str:
    toolstack = pair.toolstack(pair.rigs[0])
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: line in toolstack.console_log(spec.uuid), "the guest to boot")
    return spec.uuid


def restless(pair: Pair) -> str:
    """A guest that writes all its memory over and over, and looks whether it is there."""
    return started(pair, a_spec("memtouch", "forever"), b"memtouch:")


def test_back_and_forth_with_all_memory_being_written(pair: Pair) -> None:
    domain = restless(pair)
    for number in range(4):
        move = Move(pair, domain, number % 2).start()
        status = move.moved()
        assert status.rounds > 1 and status.pages_sent >= MEMORY * 128 and status.downtime_ms > 0
        assert pair.places(domain) == {1 - number % 2: DomainState.RUNNING}
        move.forget()
    is_whole(pair, domain)


def test_the_console_and_its_log_go_along(pair: Pair) -> None:
    domain = started(pair, a_spec("hello"), b"hello: ready")
    move = Move(pair, domain, 0).start()
    move.moved()
    assert b"hello: ready" in move.there.console_log(domain)
    console = move.there.open_console(domain)
    console.write(b"are you there\n")
    until(lambda: b"echo: are you there" in move.there.console_log(domain), "its answer")
    console.close()
    assert move.there.get_spec(domain).owner == "owner-there"
    assert move.there.get_domain(domain).detail == ""


def test_a_paused_guest_stays_paused(pair: Pair) -> None:
    domain = restless(pair)
    pair.toolstack(pair.rigs[0]).pause(domain)
    move = Move(pair, domain, 0).start()
    move.moved()
    assert pair.places(domain) == {1: DomainState.PAUSED}
    move.there.unpause(domain)
    is_whole(pair, domain)


def test_cancelled_while_it_is_copied(pair: Pair) -> None:
    domain = restless(pair)
    move = Move(pair, domain, 0, bandwidth_bytes=4 << 20).start()
    until(lambda: move.here.migration_status(move.ident).phase is Phase.COPYING, "the copy to begin")
    with pytest.raises(WrongState, match=move.ident):
        move.here.pause(domain)
    move.here.migration_cancel(move.ident)
    here, there = move.settle()
    assert (here, there) == (Phase.KEPT, Phase.DROPPED)
    error = from_json(move.here.migration_status(move.ident).error or {})
    assert error.code == "migration.cancelled"
    is_whole(pair, domain)


def test_a_slowed_guest_is_as_fast_as_before_when_it_stays(pair: Pair) -> None:
    domain = restless(pair)
    move = Move(pair, domain, 0, bandwidth_bytes=8 << 20, timeout_s=8, max_rounds=1000, downtime_ms=0.5).start()
    status = move.ended(move.here)
    assert status.phase is Phase.KEPT and from_json(status.error or {}).code == "migration.failed"
    move.settle()
    is_whole(pair, domain)


def test_a_guest_that_ends_by_itself_is_not_moved(pair: Pair) -> None:
    domain = started(pair, a_spec("hello"), b"hello: ready")
    move = Move(pair, domain, 0, bandwidth_bytes=1 << 16)
    ticket = move.prepare()
    move.here.shutdown(domain)
    with contextlib.suppress(WrongState):
        move.here.migration_start(
            domain, ident=move.ident, token=move.token, ticket=ticket, options=move.options, peer="there"
        )
        assert move.ended(move.here).phase is Phase.KEPT
    until(lambda: move.here.get_domain(domain).state is DomainState.SHUTDOWN, "its end")
    move.there.migration_cancel(move.ident)
    assert pair.places(domain) == {0: DomainState.SHUTDOWN}


def test_wrong_token_and_wrong_certificate(pair: Pair, tmp_path: Path) -> None:
    domain = restless(pair)
    move = Move(pair, domain, 0)
    ticket = move.prepare()
    move.here.migration_start(domain, ident=move.ident, token="guessed", ticket=ticket, options=MigrationOptions())
    status = move.ended(move.here)
    assert status.phase is Phase.KEPT and from_json(status.error or {}).code == MigrationRefused.code
    assert move.there.migration_status(move.ident).phase is Phase.WAITING, "it waits for the right one"
    move.there.migration_cancel(move.ident)
    is_whole(pair, domain)


# -- what dies ----------------------------------------------------------------------------------------------------

SOURCE, TARGET = ("starting", "copying", "switching", "moved"), ("waiting", "receiving", "complete", "running")


def restarted(rig: HostRig) -> None:
    rig.kill()
    rig.start()


@pytest.mark.parametrize("phase", SOURCE)
def test_the_source_host_dies(pair: Pair, phase: str) -> None:
    domain = restless(pair)
    move = Move(pair, domain, 0)
    move.source.trap(phase, "kill")
    with contextlib.suppress(HostUnavailable):
        move.start()
    until(move.source.trapped, f"phase {phase}")
    restarted(move.source)
    here, there = move.settle()
    gone = phase == "moved"
    assert (here, there) == ((Phase.MOVED, Phase.RUNNING) if gone else (Phase.KEPT, Phase.DROPPED))
    assert pair.places(domain) == {1 if gone else 0: DomainState.RUNNING}
    is_whole(pair, domain)


@pytest.mark.parametrize("phase", TARGET)
def test_the_target_host_dies(pair: Pair, phase: str) -> None:
    domain = restless(pair)
    move = Move(pair, domain, 0)
    move.target.trap(phase, "kill")
    with contextlib.suppress(HostUnavailable, ToolstackError):
        move.start()
    until(move.target.trapped, f"phase {phase}")
    restarted(move.target)
    if phase == "waiting":
        with contextlib.suppress(ToolstackError):
            move.start()
        move.there.migration_list()
        assert pair.places(domain) == {0: DomainState.RUNNING}
    else:
        here, there = move.settle()
        gone = phase == "running"
        assert (here, there) == ((Phase.MOVED, Phase.RUNNING) if gone else (Phase.KEPT, Phase.DROPPED))
        assert pair.places(domain) == {1 if gone else 0: DomainState.RUNNING}
    is_whole(pair, domain)


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("victim", ["mover", "domain"])
@pytest.mark.parametrize("phase", ["copying", "switching", "moved", "receiving", "complete"])
def test_a_process_dies(pair: Pair, phase: str, victim: str, role: str) -> None:
    """While the host that has just written the phase stands still."""
    domain = restless(pair)
    move = Move(pair, domain, 0)
    stopped = move.source if phase in SOURCE else move.target
    stopped.trap(phase, "stop")
    move.start()
    until(stopped.trapped, f"phase {phase}")
    rig = move.source if role == "source" else move.target
    if victim == "mover":
        kill_all(processes(rig, "mover"))
    else:
        kill_process(rig.process_of(domain))
    stopped.go_on()
    here, there = move.settle()
    told = (here, there, pair.places(domain))
    if victim == "mover":
        assert told in (
            (Phase.KEPT, Phase.DROPPED, {0: DomainState.RUNNING}),
            (Phase.MOVED, Phase.RUNNING, {1: DomainState.RUNNING}),
        )
        is_whole(pair, domain)
    elif here is Phase.MOVED:  # what dies then may be the only copy, as any domain's process may
        assert told in ((Phase.MOVED, Phase.RUNNING, {1: s}) for s in (DomainState.RUNNING, DomainState.CRASHED))
        if told[2][1] is DomainState.RUNNING:
            is_whole(pair, domain)
    else:
        assert there is Phase.DROPPED and list(told[2]) == [0]
        if told[2][0] is DomainState.RUNNING:
            is_whole(pair, domain)
        else:
            assert told[2][0] is DomainState.CRASHED and role == "source"


class Fate:
    """A guest, and migrations of it while something dies. One that is lost, with its process, is followed by another.

    :ivar place: of the host that has it. :ivar told: what happened, for whoever reads a failure.
    """

    def __init__(self, pair: Pair, chance: random.Random) -> None:
        self.pair, self.chance = pair, chance
        self.place, self.domain = 0, restless(pair)
        self.told: list[str] = []

    def run(self, victim: str) -> None:
        pair, chance = self.pair, self.chance
        move = Move(pair, self.domain, self.place).start()
        rig = pair.rigs[chance.randrange(2)]
        role = "source" if rig is move.source else "target"
        self.told = [*self.told[-5:], f"{victim} of the {role}, from host {self.place}"]
        self._wait(move)
        if victim == "mover":
            kill_all(processes(rig, "mover"))
        elif victim == "host":
            restarted(rig)
        else:
            with contextlib.suppress(OSError, ValueError, ProcessLookupError):
                kill_process(rig.process_of(self.domain))
        here, there = move.settle()
        told = (here, there, pair.places(self.domain))
        assert (here, there) in ((Phase.KEPT, Phase.DROPPED), (Phase.MOVED, Phase.RUNNING)), (told, self.told)
        self.place = 1 - self.place if here is Phase.MOVED else self.place
        until(lambda: len(pair.places(self.domain)) == 1, "one copy to be left")
        state = pair.places(self.domain)[self.place]
        move.forget()
        if state is DomainState.CRASHED and victim == "domain":
            pair.toolstack(pair.rigs[self.place]).destroy(self.domain)
            self.place, self.domain = 0, restless(pair)
        else:
            assert state is DomainState.RUNNING, (told, self.told)

    def _wait(self, move: Move) -> None:
        """For a moment by chance: of time, or of the copy's rounds."""
        if self.chance.random() < 0.5:
            end = time.monotonic() + self.chance.random() * 0.3
            until(lambda: time.monotonic() > end, "the moment")
            return
        wait = self.chance.randrange(6)
        until(lambda: (s := move.status(move.here)) is None or s.rounds >= wait or s.phase.ended, "a round")


@pytest.mark.timeout(60 + CUTS * 10)
def test_something_dies_at_random_moments(pair: Pair) -> None:
    """Mostly the link: a mover's death is a connection that breaks off."""
    fate = Fate(pair, random.Random(CUTS))
    for number in range(CUTS):
        fate.run("mover" if number % 5 else fate.chance.choice(["host", "domain"]))
        if number % 25 == 24:
            is_whole(pair, fate.domain)
            pair.toolstack(pair.rigs[fate.place]).destroy(fate.domain)
            fate.place, fate.domain = 0, restless(pair)
    is_whole(pair, fate.domain)
