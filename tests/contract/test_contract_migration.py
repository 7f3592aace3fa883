"""A domain moves from one host to another, on drivers with `Capability.LIVE_MIGRATION` whose kit has a second host."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kit import RESTLESS, SUSPENDS, WAITS, Bench, assert_readable

from hypervisor.errors import (
    DomainExists,
    DomainNotFound,
    ImageInvalid,
    InsufficientMemory,
    MigrationNotFound,
    MigrationNotTransparent,
    MigrationRefused,
    NameInUse,
    SpecInvalid,
    ToolstackError,
    Unsupported,
    WrongState,
    from_json,
)
from hypervisor.toolstack.api import (
    Capability,
    DomainEvent,
    DomainInfo,
    DomainState,
    MigrationMode,
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
    MigrationStatus,
    MigrationTicket,
    Toolstack,
)
from hypervisor.toolstack.devices import DiskSpec

THERE = "owner-there"
SLOWLY = {"bandwidth_bytes": 4 << 20, "downtime_ms": 0.1, "max_rounds": 1000, "throttle": False}
"""Options with which a restless guest is not moved before long."""
Phase = MigrationPhase


@dataclasses.dataclass
class Pair:
    """Two hosts and one migration between them."""

    bench: Bench
    here: Toolstack
    there: Toolstack
    ident: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))

    def prepare(self, domain: str, **fields: Any) -> MigrationTicket:
        given = {"ident": self.ident, "token": self.token, "owner": THERE, "peer": "here", **fields}
        return self.there.migration_prepare(self.here.migration_offer(domain), **given)

    def start(self, domain: str, **fields: Any) -> MigrationTicket:
        ticket = self.prepare(domain, **fields.pop("prepare", {}))
        options = MigrationOptions(**fields)
        self.here.migration_start(
            domain, ident=self.ident, token=self.token, ticket=ticket, options=options, peer="there"
        )
        return ticket

    def ended(self, toolstack: Toolstack) -> MigrationStatus:
        self.bench.until(lambda: toolstack.migration_status(self.ident).phase.ended, "the migration to end")
        return toolstack.migration_status(self.ident)

    def forget(self) -> None:
        for toolstack in (self.here, self.there):
            toolstack.migration_forget(self.ident)
            toolstack.migration_forget(self.ident)
            with pytest.raises(MigrationNotFound):
                toolstack.migration_status(self.ident)
            assert toolstack.migration_list() == []

    def dropped(self) -> None:
        """Nothing of it is left on the target."""
        self.bench.until(
            lambda: self.there.migration_status(self.ident).phase is Phase.DROPPED, "the target to drop it"
        )
        assert self.there.list_domains() == []


@pytest.fixture
def pair(bench: Bench) -> Iterator[Pair]:
    bench.needs(Capability.LIVE_MIGRATION)
    if bench.kit.peer is None:
        pytest.skip(f"the {bench.kit.name} kit has no second host")
    there = bench.kit.peer()
    free = there.host_info().memory_free_mib
    made = Pair(bench, bench.toolstack, there)
    yield made
    for toolstack in (made.here, there):
        for status in toolstack.migration_list():
            _end(toolstack, status)
            toolstack.migration_forget(status.ident)
        for info in toolstack.list_domains():
            toolstack.destroy(info.uuid)
    bench.until(lambda: there.host_info().memory_free_mib == free, "the second host's memory to be free again")
    there.close()


def _end(toolstack: Toolstack, status: MigrationStatus) -> None:
    if status.phase.ended:
        return
    try:
        toolstack.migration_cancel(status.ident)
    except WrongState:
        toolstack.migration_resolve(status.ident, keep=False)


def test_a_running_domain_moves(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS, metadata=(("colour", "blue"),))
    spec = pair.here.get_spec(guest.uuid)
    offer = pair.here.migration_offer(guest.uuid)
    assert (offer.uuid, offer.spec, offer.domid, offer.running) == (guest.uuid, spec, guest.domid, True)
    pair.start(guest.uuid)
    left = pair.ended(pair.here)
    assert (left.phase, left.role, left.peer, left.name) == (Phase.MOVED, MigrationRole.SOURCE, "there", guest.name)
    assert left.error is None and left.pages_sent > 0 and left.bytes_sent > 0 and left.downtime_ms > 0
    came = pair.ended(pair.there)
    assert (came.phase, came.role, came.peer, came.uuid) == (Phase.RUNNING, MigrationRole.TARGET, "here", guest.uuid)
    assert pair.here.list_domains() == []
    (info,) = pair.there.list_domains()
    assert (info.uuid, info.name, info.domid, info.state) == (guest.uuid, guest.name, guest.domid, DomainState.RUNNING)
    assert pair.there.get_spec(guest.uuid) == dataclasses.replace(spec, owner=THERE)
    bench.answers(guest.uuid, pair.there)
    pair.forget()


def test_there_and_back_again(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    for _ in range(2):
        pair.start(guest.uuid)
        pair.ended(pair.here)
        pair.ended(pair.there)
        pair.forget()
        pair = Pair(bench, pair.there, pair.here)
    assert pair.here.get_domain(guest.uuid).domid == guest.domid
    bench.answers(guest.uuid)


def test_as_an_image(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    try:
        assert pair.start(guest.uuid, prepare={"mode": MigrationMode.IMAGE}).mode is MigrationMode.IMAGE
    except Unsupported as exc:
        assert_readable(exc)
        assert pair.there.migration_list() == []
        bench.answers(guest.uuid)
        pytest.skip(f"the {bench.kit.name} kit's hosts take no images over the network")
    assert pair.ended(pair.here).phase is Phase.MOVED
    assert pair.ended(pair.there).phase is Phase.RUNNING
    bench.answers(guest.uuid, pair.there)


def test_a_paused_domain_stays_paused(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    pair.here.pause(guest.uuid)
    pair.start(guest.uuid)
    assert pair.ended(pair.here).phase is Phase.MOVED
    pair.ended(pair.there)
    assert pair.there.get_domain(guest.uuid).state is DomainState.PAUSED
    pair.there.unpause(guest.uuid)
    bench.answers(guest.uuid, pair.there)


def test_every_call_may_be_repeated(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    ticket = pair.prepare(guest.uuid)
    assert pair.prepare(guest.uuid) == ticket
    for _ in range(2):
        pair.here.migration_start(
            guest.uuid, ident=pair.ident, token=pair.token, ticket=ticket, options=MigrationOptions(), peer="there"
        )
    pair.ended(pair.here)
    pair.here.migration_start(
        guest.uuid, ident=pair.ident, token=pair.token, ticket=ticket, options=MigrationOptions(), peer="there"
    )
    pair.ended(pair.there)
    pair.there.migration_resolve(pair.ident, keep=True)
    pair.here.migration_resolve(pair.ident, keep=False)
    for toolstack in (pair.here, pair.there):
        with pytest.raises(WrongState):
            toolstack.migration_cancel(pair.ident)
        with pytest.raises(WrongState):
            toolstack.migration_resolve(pair.ident, keep=toolstack is pair.here)
    bench.answers(guest.uuid, pair.there)


def test_cancel_leaves_the_source_untouched(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(RESTLESS)
    pair.start(guest.uuid, **SLOWLY)
    bench.until(lambda: pair.here.migration_status(pair.ident).rounds >= 2, "some rounds of copying")
    with pytest.raises(WrongState):
        pair.here.migration_forget(pair.ident)
    for _ in range(2):
        pair.here.migration_cancel(pair.ident)
    status = pair.ended(pair.here)
    assert status.phase is Phase.KEPT and status.error is not None
    assert from_json(status.error).code == "migration.cancelled"
    pair.dropped()
    now = pair.here.get_domain(guest.uuid)
    assert (now.state, now.domid, now.detail) == (DomainState.RUNNING, guest.domid, "")
    pair.forget()
    pair.here.pause(guest.uuid)


def test_too_slow_is_given_up(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(RESTLESS)
    pair.start(guest.uuid, **SLOWLY, timeout_s=0.3)
    status = pair.ended(pair.here)
    assert status.phase is Phase.KEPT and from_json(status.error).code == "migration.failed"
    assert pair.here.get_domain(guest.uuid).state is DomainState.RUNNING
    pair.dropped()


def test_the_target_may_be_told_to_drop_what_it_waits_for(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    free = pair.there.host_info().memory_free_mib
    ticket = pair.prepare(guest.uuid)
    status = pair.there.migration_status(pair.ident)
    assert (status.phase, status.memory_mib > 0, status.vcpus) == (Phase.WAITING, True, 1)
    assert pair.there.list_domains() == [], "it is not there yet"
    assert pair.there.host_info().memory_free_mib < free, "but its memory is set aside"
    with pytest.raises(DomainExists):
        pair.there.create(bench.spec(WAITS, uuid=guest.uuid))
    with pytest.raises(NameInUse):
        pair.there.create(bench.spec(WAITS, name=guest.name))
    with pytest.raises(DomainNotFound):
        pair.there.unpause(guest.uuid)
    for _ in range(2):
        pair.there.migration_cancel(pair.ident)
    assert pair.there.migration_status(pair.ident).phase is Phase.DROPPED
    assert pair.there.host_info().memory_free_mib == free
    with pytest.raises(MigrationRefused):
        pair.prepare(guest.uuid)
    pair.here.migration_start(
        guest.uuid, ident=pair.ident, token=pair.token, ticket=ticket, options=MigrationOptions(), peer="there"
    )
    status = pair.ended(pair.here)
    assert status.phase is Phase.KEPT and status.error is not None
    bench.answers(guest.uuid)


def test_a_wrong_token_opens_nothing(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    ticket = pair.prepare(guest.uuid)
    with pytest.raises(MigrationRefused):
        pair.prepare(guest.uuid, token="another")
    pair.here.migration_start(
        guest.uuid, ident=pair.ident, token="guessed", ticket=ticket, options=MigrationOptions(), peer="there"
    )
    status = pair.ended(pair.here)
    assert status.phase is Phase.KEPT and status.error is not None
    bench.answers(guest.uuid)
    assert pair.there.migration_status(pair.ident).phase is Phase.WAITING, "it waits for the right one"


def test_a_domain_on_its_way_is_left_alone(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(RESTLESS)
    pair.start(guest.uuid, **SLOWLY)
    calls = (
        lambda: pair.here.destroy(guest.uuid),
        lambda: pair.here.reset(guest.uuid),
        lambda: pair.here.pause(guest.uuid),
        lambda: pair.here.save(guest.uuid, bench.save_path()),
        lambda: pair.here.migration_offer(guest.uuid),
        lambda: pair.here.set_vcpus(guest.uuid, 1),
    )
    for call in calls:
        with pytest.raises(WrongState) as caught:
            call()
        assert_readable(caught.value)
        assert pair.ident in caught.value.message
    pair.here.migration_cancel(pair.ident)
    pair.here.destroy(guest.uuid)


def test_what_the_target_has_not_got(bench: Bench, pair: Pair) -> None:
    bench.needs(Capability.DISK)
    guest = bench.booted(SUSPENDS, disks=(DiskSpec("xvda", bench.image()),))
    offer = pair.here.migration_offer(guest.uuid)
    free = pair.there.host_info().memory_free_mib
    total = pair.there.host_info().memory_total_mib
    nowhere = dataclasses.replace(offer.spec, disks=(DiskSpec("xvda", bench.image() + ".gone"),))
    bad: tuple[tuple[type[ToolstackError], Any], ...] = (
        (InsufficientMemory, dataclasses.replace(offer, memory_mib=total + 1)),
        (MigrationRefused, dataclasses.replace(offer, driver="another")),
        (MigrationNotTransparent, dataclasses.replace(offer, build="another")),
        (SpecInvalid, dataclasses.replace(offer, spec=dataclasses.replace(offer.spec, name="no name"))),
    )
    for error, asked in bad:
        with pytest.raises(error) as caught:
            pair.there.migration_prepare(asked, ident=pair.ident, token=pair.token, owner=THERE)
        assert_readable(caught.value)
    assert pair.there.migration_list() == []
    assert pair.there.host_info().memory_free_mib == free
    with pytest.raises(SpecInvalid):
        pair.there.migration_prepare(offer, ident="no ident", token=pair.token, owner=THERE)
    # A disk that is not there is refused by a driver that cannot copy it.
    with contextlib.suppress(ImageInvalid):
        pair.there.migration_prepare(
            dataclasses.replace(offer, spec=nowhere), ident=pair.ident, token=pair.token, owner=THERE
        )
        pair.there.migration_cancel(pair.ident)
        pair.dropped()
    assert pair.there.host_info().memory_free_mib == free


def test_a_domid_that_is_taken_there(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    there = pair.there.create(bench.spec(WAITS))
    offer = dataclasses.replace(pair.here.migration_offer(guest.uuid), domid=there.domid)
    given = {"ident": pair.ident, "token": pair.token, "owner": THERE}
    with pytest.raises(MigrationNotTransparent) as caught:
        pair.there.migration_prepare(offer, **given)
    assert_readable(caught.value)
    with contextlib.suppress(Unsupported):
        assert pair.there.migration_prepare(offer, mode=MigrationMode.IMAGE, **given).mode is MigrationMode.IMAGE


def test_who_is_there_already(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    pair.there.create(bench.spec(WAITS, uuid=guest.uuid))
    with pytest.raises(DomainExists):
        pair.prepare(guest.uuid)
    pair.there.destroy(guest.uuid)
    pair.there.create(bench.spec(WAITS, name=guest.name))
    with pytest.raises(NameInUse):
        pair.prepare(guest.uuid)


def test_what_cannot_move(bench: Bench, pair: Pair) -> None:
    nobody = str(uuid.uuid4())
    with pytest.raises(DomainNotFound):
        pair.here.migration_offer(nobody)
    for call in (pair.here.migration_status, pair.here.migration_cancel):
        with pytest.raises(MigrationNotFound) as caught:
            call(nobody)
        assert_readable(caught.value)
    with pytest.raises(MigrationNotFound):
        pair.here.migration_resolve(nobody, keep=True)
    guest, other = bench.booted(SUSPENDS), bench.booted(SUSPENDS)
    ticket = pair.prepare(guest.uuid)
    with pytest.raises(SpecInvalid):
        pair.here.migration_start(
            other.uuid, ident=pair.ident, token=pair.token, ticket=ticket, options=MigrationOptions()
        )
    with pytest.raises(SpecInvalid):
        pair.here.migration_start(
            guest.uuid, ident=pair.ident, token=pair.token, ticket=ticket, options=MigrationOptions(max_rounds=0)
        )
    assert pair.here.migration_list() == []


def test_progress_is_told(bench: Bench, pair: Pair) -> None:
    guest = bench.booted(SUSPENDS)
    told: list[DomainEvent] = []
    unsubscribe = pair.here.subscribe(told.append)
    try:
        pair.start(guest.uuid)
        pair.ended(pair.here)

        def phases() -> list[str]:
            events = [event for event in list(told) if event.kind == "migration" and event.uuid == guest.uuid]
            return [MigrationStatus.from_json(json.loads(event.detail)).phase for event in events]

        bench.until(lambda: Phase.MOVED in phases(), "the event of its end")
        seen = list(dict.fromkeys(phases()))
        order = [Phase.STARTING, Phase.COPYING, Phase.SWITCHING, Phase.MOVED]
        assert seen == [phase for phase in order if phase in seen]
    finally:
        unsubscribe()


def test_halves_survive_their_host_processes(bench: Bench, pair: Pair) -> None:
    bench.needs(Capability.ADOPTION)
    assert bench.kit.restart_host is not None and bench.kit.restart_peer is not None
    guest: DomainInfo = bench.booted(SUSPENDS)
    pair.start(guest.uuid)
    pair.ended(pair.here)
    pair.ended(pair.there)
    bench.kit.restart_host()
    bench.kit.restart_peer()
    assert pair.here.migration_status(pair.ident).phase is Phase.MOVED
    assert pair.there.migration_status(pair.ident).phase is Phase.RUNNING
    assert pair.here.list_domains() == []
    bench.answers(guest.uuid, pair.there)
