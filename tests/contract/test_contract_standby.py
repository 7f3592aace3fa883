"""A domain is kept on a second host too, on drivers with `Capability.STANDBY` whose kit has a second host."""

from __future__ import annotations

import pytest
from kit import SUSPENDS, Bench, assert_readable
from test_contract_migration import THERE, Pair, Phase, pair

from hypervisor.errors import MigrationNotFound, SpecInvalid, Unsupported, WrongState, from_json
from hypervisor.toolstack.api import Capability, DomainState, MigrationMode, MigrationOptions, MigrationRole
from hypervisor.toolstack.devices import DiskSpec

__all__ = ["pair"]


def kept(bench: Bench, pair: Pair) -> str:
    """A domain that the second host holds an epoch of."""
    bench.needs(Capability.STANDBY)
    guest = bench.booted(SUSPENDS)
    ticket = pair.start(guest.uuid, prepare={"mode": MigrationMode.STANDBY}, interval_ms=20)
    assert ticket.mode is MigrationMode.STANDBY
    epochs(bench, pair, 1)
    return guest.uuid


def epochs(bench: Bench, pair: Pair, wanted: int) -> None:
    for toolstack in (pair.here, pair.there):
        bench.until(lambda host=toolstack: host.migration_status(pair.ident).epochs >= wanted, "epochs")


def test_epoch_after_epoch_while_it_runs(bench: Bench, pair: Pair) -> None:
    domain = kept(bench, pair)
    epochs(bench, pair, 3)
    here, there = pair.here.migration_status(pair.ident), pair.there.migration_status(pair.ident)
    assert (here.phase, here.role, here.mode) == (Phase.STANDBY, MigrationRole.SOURCE, MigrationMode.STANDBY)
    assert (there.phase, there.role, there.mode) == (Phase.STANDBY, MigrationRole.TARGET, MigrationMode.STANDBY)
    assert here.pause_ms > 0 and here.error is None and there.memory_mib > 0 and there.lost_ms == 0
    assert pair.here.get_domain(domain).state is DomainState.RUNNING
    assert pair.there.list_domains() == [], "it is not there yet"
    bench.answers(domain)
    for call in (
        lambda: pair.here.pause(domain),
        lambda: pair.here.destroy(domain),
        lambda: pair.here.migration_forget(pair.ident),
        lambda: pair.there.migration_forget(pair.ident),
        lambda: pair.there.migration_resolve(pair.ident, keep=True),
        lambda: pair.here.migration_takeover(pair.ident),
    ):
        with pytest.raises(WrongState) as caught:
            call()
        assert_readable(caught.value)
        assert pair.ident in caught.value.message


@pytest.mark.parametrize("side", ["here", "there"])
def test_ended_on_either_side_it_runs_on(bench: Bench, pair: Pair, side: str) -> None:
    domain = kept(bench, pair)
    for _ in range(2):
        (pair.here if side == "here" else pair.there).migration_cancel(pair.ident)
    status = pair.ended(pair.here)
    assert status.phase is Phase.KEPT and status.error is not None
    assert side == "there" or from_json(status.error).code == "migration.cancelled"
    pair.dropped()
    with pytest.raises(WrongState):
        pair.there.migration_takeover(pair.ident)
    bench.answers(domain)
    pair.forget()
    pair.here.pause(domain)


def test_an_ordered_takeover(bench: Bench, pair: Pair) -> None:
    domain = kept(bench, pair)
    bench.answers(domain)
    said = pair.here.console_log(domain)
    for _ in range(2):
        pair.there.migration_takeover(pair.ident)
    assert pair.ended(pair.here).phase is Phase.MOVED
    came = pair.ended(pair.there)
    assert (came.phase, came.lost_ms) == (Phase.RUNNING, 0)
    assert pair.here.list_domains() == []
    (info,) = pair.there.list_domains()
    assert (info.uuid, info.state, info.detail) == (domain, DomainState.RUNNING, "")
    assert pair.there.get_spec(domain).owner == THERE
    assert said in pair.there.console_log(domain), "nothing is lost"
    bench.answers(domain, pair.there)
    pair.forget()


def test_a_takeover_by_force_leaves_a_source_that_hears_of_it_paused(bench: Bench, pair: Pair) -> None:
    domain = kept(bench, pair)
    for _ in range(2):
        pair.there.migration_takeover(pair.ident, force=True)
    assert pair.there.migration_status(pair.ident).phase is Phase.RUNNING
    bench.until(lambda: pair.here.migration_status(pair.ident).phase is Phase.UNRESOLVED, "the source to know")
    info = pair.here.get_domain(domain)
    assert info.state is DomainState.PAUSED and pair.ident in info.detail
    bench.answers(domain, pair.there)
    pair.here.migration_resolve(pair.ident, keep=False)
    assert pair.here.list_domains() == []
    pair.forget()


def test_what_cannot_be_kept_or_taken(bench: Bench, pair: Pair) -> None:
    bench.needs(Capability.STANDBY)
    with pytest.raises(MigrationNotFound):
        pair.there.migration_takeover(pair.ident)
    for wrong in (0.0, 1e9):
        with pytest.raises(SpecInvalid, match="interval_ms"):
            MigrationOptions(interval_ms=wrong).validate()
    guest = bench.booted(SUSPENDS)
    pair.start(guest.uuid)
    pair.ended(pair.here)
    pair.ended(pair.there)
    with pytest.raises(WrongState) as caught:
        pair.there.migration_takeover(pair.ident)
    assert_readable(caught.value)


def test_a_domain_with_disks(bench: Bench, pair: Pair) -> None:
    bench.needs(Capability.STANDBY)
    bench.needs(Capability.DISK)
    guest = bench.booted(SUSPENDS, disks=(DiskSpec("xvda", bench.image()),))
    try:
        pair.start(guest.uuid, prepare={"mode": MigrationMode.STANDBY})
    except Unsupported as exc:
        assert_readable(exc)
        assert pair.there.migration_list() == []
    else:
        pair.here.migration_cancel(pair.ident)
    bench.answers(guest.uuid)
