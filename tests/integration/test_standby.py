"""A micro-guest is kept on a second host by continuous checkpoints, and runs there when it has to."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from build import available, build_guest
from host_rig import until
from moving_pair import Pair, Phase, Standby, dies, is_whole, kill_all, moving_pair, processes

from hypervisor.errors import WrongState
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, OnEvent

if why := available():
    pytest.skip(why, allow_module_level=True)

MEMORY = 16


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with moving_pair(tmp_path_factory.mktemp("pair"), traps=True) as pair:
        yield pair


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.clear()


def started(pair: Pair, kernel: str, cmdline: str, line: bytes) -> str:
    ident = str(uuid.uuid4())
    boot = KernelBoot(kernel=str(build_guest(kernel)), cmdline=cmdline)
    keep = {"on_poweroff": OnEvent.PRESERVE, "on_crash": OnEvent.PRESERVE}
    spec = DomainSpec(boot=boot, uuid=ident, name=f"s-{ident[:8]}", memory_mib=MEMORY, owner="tests", **keep)
    toolstack = pair.toolstack(pair.rigs[0])
    toolstack.create(spec)
    toolstack.unpause(ident)
    until(lambda: line in toolstack.console_log(ident), "the guest to boot")
    return ident


def restless(pair: Pair) -> str:
    """A guest that writes all its memory over and over, and looks whether it is there."""
    return started(pair, "memtouch", "forever", b"memtouch:")


def test_the_source_dies_and_its_last_epoch_runs(pair: Pair) -> None:
    domain = restless(pair)
    move = Standby(pair, domain, 0, interval_ms=20).start()
    move.epochs()
    here = move.here.migration_status(move.ident)
    assert here.phase is Phase.STANDBY and here.pause_ms > 0
    assert pair.places(domain) == {0: DomainState.RUNNING}
    dies(move)
    move.complete()
    assert move.there.migration_status(move.ident).lost_ms > 0
    with pytest.raises(WrongState, match=f"silent.*{move.ident}"):
        move.there.migration_takeover(move.ident)
    move.target.kill()
    move.target.start()
    assert move.there.migration_status(move.ident).phase is Phase.COMPLETE, "the copy outlives its host process"
    assert move.there.get_domain(domain).state is DomainState.PAUSED
    for _ in range(2):
        move.there.migration_takeover(move.ident, force=True)
    move.source.start()
    assert move.here.migration_status(move.ident).phase is Phase.KEPT
    assert pair.places(domain) == {0: DomainState.CRASHED, 1: DomainState.RUNNING}
    move.here.destroy(domain)
    is_whole(pair, domain)


def test_an_ordered_takeover_loses_nothing(pair: Pair) -> None:
    domain = started(pair, "hello", "", b"hello: ready")
    move = Standby(pair, domain, 0, interval_ms=20).start()
    move.epochs()
    console = move.here.open_console(domain)
    console.write(b"are you there\n")
    until(lambda: b"echo: are you there" in move.here.console_log(domain), "its answer")
    console.close()
    move.there.migration_takeover(move.ident)
    move.moved()
    assert pair.places(domain) == {1: DomainState.RUNNING}
    assert move.there.migration_status(move.ident).lost_ms == 0
    said = move.there.console_log(domain)
    assert said.count(b"hello: ready") == 1 and said.count(b"echo: are you there") == 1
    console = move.there.open_console(domain)
    console.write(b"and now\n")
    until(lambda: b"echo: and now" in move.there.console_log(domain), "its answer there")
    console.close()


def test_a_source_that_hears_of_a_forced_takeover_does_not_run_on(pair: Pair) -> None:
    """Nor does it when its host process is replaced; unless somebody says so."""
    domain = restless(pair)
    move = Standby(pair, domain, 0, interval_ms=20).start()
    move.epochs()
    move.there.migration_takeover(move.ident, force=True)
    until(lambda: move.here.migration_status(move.ident).phase is Phase.UNRESOLVED, "the source to know")
    move.source.kill()
    move.source.start()
    assert move.here.migration_status(move.ident).phase is Phase.UNRESOLVED
    assert pair.places(domain) == {0: DomainState.PAUSED, 1: DomainState.RUNNING}
    move.there.destroy(domain)
    move.here.migration_resolve(move.ident, keep=True)
    is_whole(pair, domain)


def test_a_link_that_breaks_leaves_the_guest_where_it_is(pair: Pair) -> None:
    domain = restless(pair)
    move = Standby(pair, domain, 0, interval_ms=20).start()
    move.epochs()
    kill_all(processes(move.source, "mover"))
    move.complete()
    assert move.ended(move.here).phase is Phase.KEPT
    assert pair.places(domain) == {0: DomainState.RUNNING, 1: DomainState.PAUSED}
    move.there.migration_resolve(move.ident, keep=False)
    is_whole(pair, domain)


def test_it_ends_when_told_to_on_either_side(pair: Pair) -> None:
    domain = restless(pair)
    for number in range(2):
        move = Standby(pair, domain, 0, interval_ms=20).start()
        move.epochs()
        (move.there if number else move.here).migration_cancel(move.ident)
        assert move.settle() == (Phase.KEPT, Phase.DROPPED)
        move.forget()
    is_whole(pair, domain)


def test_a_host_process_that_dies_ends_it_and_the_guest_runs_on(pair: Pair) -> None:
    """With either one: that of the source may die at any moment of an epoch."""
    domain = restless(pair)
    for number, there in enumerate((Phase.COMPLETE, Phase.DROPPED)):
        move = Standby(pair, domain, 0, interval_ms=10).start()
        move.epochs()
        rig = pair.rigs[number]
        rig.kill()
        rig.start()
        assert move.ended(move.here).phase is Phase.KEPT
        until(
            lambda m=move, wanted=there: m.there.migration_status(m.ident).phase is wanted,
            "what the target makes of it",
        )
        move.settle()
        move.forget()
    is_whole(pair, domain)
