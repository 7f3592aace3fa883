"""The fake driver's verbs of migration; what happens in between is in `hypervisor.toolstack.drivers._fake_mover`."""

from __future__ import annotations

import contextlib
import dataclasses
import time

from hypervisor.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationNotTransparent,
    MigrationRefused,
    MigrationUnresolved,
    SpecInvalid,
    ToolstackError,
    Unsupported,
    WrongState,
)
from hypervisor.toolstack.api import (
    DomainState,
    DomainType,
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationStatus,
    MigrationTicket,
)
from hypervisor.toolstack.drivers._fake_mover import Mover, Phase, Role, alone, drop, go
from hypervisor.toolstack.drivers._fake_moves import PAGES_PER_MIB, Move
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store
from hypervisor.toolstack.drivers._fake_templates import TemplateVerbs
from hypervisor.toolstack.migration import check_ident

BUILD = "fake-1"
POINTS = ("starting", "copying", "standby", "switching", "complete", "moved")


class MovingVerbs(Mover, TemplateVerbs):
    """Part of `hypervisor.toolstack.drivers.fake.FakeToolstack`."""

    state_dir: str | None

    # source

    def migration_offer(self, uuid: str) -> MigrationOffer:
        with self._verb("migration_offer"):
            domain = self._live(uuid, "move")
            return MigrationOffer(
                driver=self.name,
                build=BUILD,
                spec=domain.spec,
                domid=domain.domid,
                memory_mib=max(domain.held_mib, 1),
                vcpus=domain.online,
                running=domain.state is DomainState.RUNNING,
            )

    def migration_start(
        self,
        uuid: str,
        *,
        ident: str,
        token: str,
        ticket: MigrationTicket,
        options: MigrationOptions,
        peer: str = "",
    ) -> None:
        with self._verb("migration_start"):
            check_ident(ident)
            options.validate()
            known = self.found(ident)
            if known is not None:
                if known.role is not Role.SOURCE or known.uuid != uuid:
                    raise MigrationRefused(f"migration {ident} is another one on this host: give each its own ident")
                return
            if (ticket.ident, ticket.uuid) != (ident, uuid):
                raise SpecInvalid(f"the ticket is for migration {ticket.ident} of domain {ticket.uuid}, not for this")
            domain = self._live(uuid, "move")
            running = domain.state is DomainState.RUNNING
            if ticket.mode is MigrationMode.IMAGE and not running:
                raise WrongState(f"domain {uuid} is paused, its guest cannot suspend: unpause it or move it live")
            domain.migration = ident
            self.store.put(domain)
            self.put_move(
                Move(
                    ident=ident,
                    uuid=uuid,
                    role=Role.SOURCE,
                    phase=Phase.STARTING,
                    mode=ticket.mode,
                    peer=peer,
                    name=domain.spec.name,
                    memory_mib=domain.held_mib,
                    vcpus=domain.online,
                    token=token,
                    running=running,
                    domid=domain.domid,
                    folder=ticket.address,
                    options=options.to_json(),
                    pages_total=domain.memory_mib * PAGES_PER_MIB,
                    began=time.time(),
                )
            )

    # target

    def migration_prepare(
        self,
        offer: MigrationOffer,
        *,
        ident: str,
        token: str,
        owner: str,
        mode: MigrationMode = MigrationMode.LIVE,
        peer: str = "",
    ) -> MigrationTicket:
        if self.state_dir is None:
            raise Unsupported("a fake host without a state folder cannot be reached: give it a state_dir")
        with self._verb("migration_prepare"):
            check_ident(ident)
            known = self.found(ident)
            if known is not None:
                if known.role is not Role.TARGET or known.uuid != offer.uuid or known.token != token:
                    raise MigrationRefused(f"migration {ident} is another one on this host: give each its own ident")
                if known.phase.ended:
                    raise MigrationRefused(f"migration {ident} has ended here ({known.phase.value}): begin a new one")
                return MigrationTicket(ident, known.uuid, known.mode, self.state_dir, 0)
            domain = self._half(offer, ident, owner, mode)
            self.store.put(domain)
            self.put_move(
                Move(
                    ident=ident,
                    uuid=offer.uuid,
                    role=Role.TARGET,
                    phase=Phase.WAITING,
                    mode=mode,
                    peer=peer,
                    name=domain.spec.name,
                    memory_mib=domain.held_mib,
                    vcpus=domain.online,
                    token=token,
                    running=offer.running,
                    domid=domain.domid,
                    owner=owner,
                    began=time.time(),
                )
            )
            return MigrationTicket(ident, offer.uuid, mode, self.state_dir, 0)

    def _half(self, offer: MigrationOffer, ident: str, owner: str, mode: MigrationMode) -> FakeDomain:
        """What is set aside for the domain. :raises ToolstackError: why it cannot come here."""
        if offer.driver != self.name:
            raise MigrationRefused(f"a domain of driver {offer.driver!r} cannot come to driver {self.name!r}: save it")
        spec = dataclasses.replace(offer.spec, owner=owner)
        spec.validate()
        if spec.type is not DomainType.PV or offer.memory_mib < 1:
            raise MigrationRefused(f"type {spec.type.value}, {offer.memory_mib} MiB: this host has no such domains")
        self.check_room(spec, offer.memory_mib)
        used = {domain.domid for domain in self.store.domains()}
        if mode is not MigrationMode.IMAGE and (offer.build != BUILD or offer.domid in used):
            what = (
                f"domid {offer.domid} is in use here" if offer.domid in used else f"build {offer.build!r} is not ours"
            )
            raise MigrationNotTransparent(f"{what}: move it with mode image")
        domid = offer.domid if mode is not MigrationMode.IMAGE else self.store.next_domid()
        domain = FakeDomain(
            spec=spec, domid=domid, created_at=time.time(), devices=self.new_devices(spec), migration=ident, hidden=True
        )
        domain.memory_mib = domain.target_mib = offer.memory_mib
        return domain

    # either

    def migration_status(self, ident: str) -> MigrationStatus:
        self.advance(ident)
        with self._verb("migration_status"):
            return self.move(ident).status()

    def migration_list(self) -> list[MigrationStatus]:
        with self.store.transaction():
            idents = [doc["ident"] for doc in self.store.migrations()]
        for ident in idents:
            self.advance(ident)
        with self._verb("migration_list"):
            return [Move.from_json(doc).status() for doc in self.store.migrations()]

    def migration_cancel(self, ident: str) -> None:
        with self._verb("migration_cancel"):
            move = self.move(ident)
            if move.phase in (Phase.KEPT, Phase.DROPPED):
                return
            if move.role is Role.SOURCE:
                if move.phase in (Phase.MOVED, Phase.UNRESOLVED):
                    raise WrongState(f"migration {ident} is {move.phase.value} here, too late to cancel: {move.detail}")
                self.keep(move, MigrationCancelled(f"migration {ident} was cancelled: the domain runs on"))
            else:
                if move.phase not in (Phase.WAITING, Phase.RECEIVING, Phase.STANDBY):
                    raise WrongState(f"migration {ident} is {move.phase.value} here: {move.detail or 'too late'}")
                drop(self.store, move, MigrationCancelled(f"migration {ident} was cancelled on the target"))
        if move.role is Role.SOURCE:
            self.hang_up(move)

    def migration_resolve(self, ident: str, *, keep: bool) -> None:
        with self._verb("migration_resolve"):
            move = self.move(ident)
            source = move.role is Role.SOURCE
            reached = (Phase.KEPT if keep else Phase.MOVED) if source else (Phase.RUNNING if keep else Phase.DROPPED)
            if move.phase is reached:
                return
            if move.phase not in (Phase.UNRESOLVED, Phase.COMPLETE):
                raise WrongState(f"migration {ident} is {move.phase.value} here: there is nothing to resolve")
            if source and keep:
                self.keep(move, MigrationUnresolved(f"migration {ident} was resolved: the domain runs on"))
            elif source:
                self.gone(move)
            elif keep:
                go(self.store, ident)
            else:
                drop(self.store, move, MigrationFailed(f"migration {ident} was resolved: it does not run here"))

    def migration_takeover(self, ident: str, *, force: bool = False) -> None:
        with self._verb("migration_takeover"):
            move = self.move(ident)
            if move.role is not Role.TARGET or move.mode is not MigrationMode.STANDBY:
                raise WrongState(f"migration {ident} is no standby that this host could take over")
            if move.phase is Phase.RUNNING:
                return
            if move.phase not in (Phase.STANDBY, Phase.COMPLETE):
                raise WrongState(f"migration {ident} is {move.phase.value} here: there is no whole epoch to run")
            if move.phase is Phase.COMPLETE and not force:
                raise WrongState(f"the source cannot be asked: {move.detail}")
            if force:
                if move.phase is Phase.STANDBY:
                    alone(self.store, move)
                go(self.store, ident)
        with contextlib.suppress(ToolstackError), contextlib.closing(Store(move.folder)) as network:
            source = Mover()
            source.store, source.state_dir = network, move.folder
            if force:
                source.was_taken(ident)
            else:
                source.hand_over(ident)
        with self._verb("migration_takeover"):
            if self.move(ident).phase is not Phase.RUNNING:
                raise WrongState(f"the source does not hand domain {move.uuid} over: take it over by force, or wait")

    def migration_forget(self, ident: str) -> None:
        with self._verb("migration_forget"):
            move = self.found(ident)
            if move is not None and not move.phase.ended:
                raise WrongState(f"migration {ident} is {move.phase.value} here: it has to end before it is forgotten")
            self.store.forget_migration(ident)

    # test hooks

    def inject_link(self, point: str, what: str = "cut", times: int = 1) -> None:
        """At `point` the link is ``cut``; or the source cannot let its guest run again: ``unresolved``."""
        if point not in POINTS or what not in ("cut", "unresolved"):
            raise ValueError(f"{point!r}, {what!r}: give one of {POINTS} and cut or unresolved")
        with self.store.transaction():
            self.store.add_fault(f"link:{point}", {"kind": what, "when": "before", "times": times})
