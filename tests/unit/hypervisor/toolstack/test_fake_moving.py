"""Faults of the fake driver's migrations: the link cut at each point, two lookers at once, a kill between two looks."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import MigrationNotFound, SpecInvalid, StreamUnsupported, Unsupported, WrongState
from hypervisor.toolstack.api import (
    Capability,
    DomainSpec,
    DomainState,
    KernelBoot,
    MigrationMode,
    MigrationOptions,
    MigrationPhase,
    ShutdownReason,
)
from hypervisor.toolstack.drivers import load
from hypervisor.toolstack.drivers._fake_moving import POINTS
from hypervisor.toolstack.drivers.fake import FakeToolstack

IDENT = str(uuid.UUID(int=5))
TOKEN = "secret"
Phase = MigrationPhase
BEFORE = ("starting", "copying", "switching", "complete")


@dataclasses.dataclass
class Hosts:
    here: FakeToolstack
    there: FakeToolstack
    uuid: str = ""

    def begin(self, mode: MigrationMode = MigrationMode.LIVE) -> None:
        offer = self.here.migration_offer(self.uuid)
        ticket = self.there.migration_prepare(offer, ident=IDENT, token=TOKEN, owner="there", mode=mode)
        self.here.migration_start(self.uuid, ident=IDENT, token=TOKEN, ticket=ticket, options=MigrationOptions())

    def look(self, until: MigrationPhase | None = None) -> MigrationPhase:
        """Look at the source until it is in that phase, or ended or unresolved."""
        for _ in range(50):
            phase = self.here.migration_status(IDENT).phase
            if phase is until or phase.ended or phase is Phase.UNRESOLVED:
                return phase
        raise AssertionError("it does not end")

    def states(self) -> tuple[str, str]:
        """Of the domain here and there; "" where there is none."""
        found = [[d.state.value for d in host.list_domains()] for host in (self.here, self.there)]
        return tuple(states[0] if states else "" for states in found)  # type: ignore[return-value]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(FakeToolstack(str(tmp_path / "here")), FakeToolstack(str(tmp_path / "there"), first_domid=1000))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(600))
    made.uuid = made.here.create(DomainSpec(str(uuid.uuid4()), "web", KernelBoot(str(kernel)), 64)).uuid
    made.here.unpause(made.uuid)
    yield made
    made.here.close()
    made.there.close()


@pytest.mark.parametrize("point", BEFORE)
def test_the_link_is_cut_before_the_point_of_no_return(hosts: Hosts, point: str) -> None:
    hosts.here.inject_link(point)
    hosts.begin()
    assert hosts.look() is Phase.KEPT
    error = hosts.here.migration_status(IDENT).error
    assert error is not None and (error["code"], error["retryable"]) == ("migration.failed", True)
    there = hosts.there.migration_status(IDENT).phase
    left = {"starting": Phase.WAITING, "complete": Phase.COMPLETE}
    assert there is left.get(point, Phase.DROPPED)
    assert hosts.states() == ("running", "paused" if point == "complete" else "")
    if point == "complete":
        info = hosts.there.get_domain(hosts.uuid)
        assert f"reeve migration resolve {IDENT}" in info.detail
        with pytest.raises(WrongState):
            hosts.there.unpause(hosts.uuid)
        with pytest.raises(WrongState):
            hosts.there.migration_cancel(IDENT)
        hosts.there.migration_resolve(IDENT, keep=False)
    elif point == "starting":
        hosts.there.migration_cancel(IDENT)
    assert hosts.states() == ("running", "")


def test_the_link_is_cut_after_it(hosts: Hosts) -> None:
    hosts.here.inject_link("moved")
    hosts.begin()
    assert hosts.look() is Phase.MOVED
    assert hosts.states() == ("", "paused")
    hosts.there.migration_resolve(IDENT, keep=True)
    assert hosts.states() == ("", "running")
    assert hosts.there.get_domain(hosts.uuid).detail == ""


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("point", ["switching", "complete"])
def test_nobody_knows(hosts: Hosts, point: str, keep: bool) -> None:
    hosts.here.inject_link(point, "unresolved")
    hosts.begin()
    assert hosts.look() is Phase.UNRESOLVED
    status = hosts.here.migration_status(IDENT)
    assert "reeve migration resolve" in status.detail and status.error is not None
    assert hosts.states() == ("paused", "paused" if point == "complete" else "")
    for call in (hosts.here.migration_cancel, hosts.here.migration_forget):
        with pytest.raises(WrongState):
            call(IDENT)
    hosts.here.migration_resolve(IDENT, keep=keep)
    assert hosts.here.migration_status(IDENT).phase is (Phase.KEPT if keep else Phase.MOVED)
    if point == "complete":
        hosts.there.migration_resolve(IDENT, keep=not keep)
        assert hosts.states() == (("running", "") if keep else ("", "running"))


@pytest.mark.parametrize("looks", range(8))
def test_cancelled_at_any_look(hosts: Hosts, looks: int) -> None:
    hosts.begin()
    for _ in range(looks):
        hosts.here.migration_status(IDENT)
    before = hosts.states()
    try:
        hosts.here.migration_cancel(IDENT)
    except WrongState:
        assert before == ("", "running")
        return
    there = hosts.there.migration_status(IDENT).phase
    if there is Phase.COMPLETE:
        hosts.there.migration_resolve(IDENT, keep=False)
    assert hosts.states() == ("running", "")


def test_the_guest_ends_by_itself_on_the_way(hosts: Hosts) -> None:
    hosts.begin()
    hosts.look(Phase.COPYING)
    hosts.here.guest_exit(hosts.uuid)
    assert hosts.look() is Phase.KEPT
    assert hosts.states() == ("", "") and hosts.there.migration_status(IDENT).phase is Phase.DROPPED


def test_the_guest_reboots_on_the_way(hosts: Hosts) -> None:
    hosts.begin()
    hosts.look(Phase.COPYING)
    hosts.here.guest_exit(hosts.uuid, ShutdownReason.REBOOT)
    assert hosts.look() is Phase.KEPT
    assert hosts.states() == ("running", "")
    hosts.here.pause(hosts.uuid)


def test_two_connections_look_at_once(hosts: Hosts, tmp_path: Path) -> None:
    second = FakeToolstack(str(tmp_path / "here"))
    hosts.begin()
    for _ in range(10):
        second.migration_list()
        hosts.here.migration_status(IDENT)
    second.close()
    assert hosts.states() == ("", "running")
    assert hosts.there.get_domain(hosts.uuid).owner == "there"


def test_what_was_printed_and_typed_comes_along(hosts: Hosts) -> None:
    log = hosts.here.console_log(hosts.uuid)
    hosts.begin(MigrationMode.IMAGE)
    hosts.look()
    assert hosts.there.console_log(hosts.uuid).startswith(log)
    assert hosts.there.get_domain(hosts.uuid).domid >= 1000


def test_a_host_without_a_state_folder_moves_nothing() -> None:
    host = FakeToolstack(None)
    assert Capability.LIVE_MIGRATION not in host.capabilities() and Capability.SAVE in host.capabilities()
    with pytest.raises(MigrationNotFound):
        host.migration_status(IDENT)
    offer = None
    with pytest.raises(Unsupported):
        host.migration_prepare(offer, ident=IDENT, token=TOKEN, owner="x")  # type: ignore[arg-type]
    host.close()


def test_domids_that_came_along_are_not_given_again(hosts: Hosts, tmp_path: Path) -> None:
    hosts.begin()
    hosts.look()
    low = FakeToolstack(str(tmp_path / "low"))
    offer = hosts.there.migration_offer(hosts.uuid)
    assert low.migration_prepare(offer, ident=IDENT, token=TOKEN, owner="x").address == str(tmp_path / "low")
    made = low.create(dataclasses.replace(offer.spec, uuid=str(uuid.uuid4()), name="other"))
    assert made.domid == 2 and made.state is DomainState.PAUSED
    low.close()


def test_points_are_checked(hosts: Hosts) -> None:
    assert set(BEFORE) < set(POINTS)
    for point, what in (("nowhere", "cut"), ("copying", "melted")):
        with pytest.raises(ValueError, match="give one of"):
            hosts.here.inject_link(point, what)


def test_first_domid_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid):
        load("fake", {"first_domid": "x"})
    host = load("fake", {"state_dir": str(tmp_path), "first_domid": "7"})
    host.close()


def test_a_save_file_of_another_form(hosts: Hosts, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    hosts.here.save(hosts.uuid, str(path))
    path.write_bytes(path.read_bytes().replace(b"domain 1\n", b"domain 9\n", 1))
    with pytest.raises(StreamUnsupported):
        hosts.here.restore(str(path), owner="")
