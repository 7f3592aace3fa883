"""The verbs of migration, and what a starting host process does about halves that it finds."""

from __future__ import annotations

import logging
import time
from typing import Any

from hypervisor.errors import (
    MigrationCancelled,
    MigrationFailed,
    MigrationNotFound,
    MigrationRefused,
    SpecInvalid,
    ToolstackError,
    Unsupported,
    WrongState,
)
from hypervisor.host.adoption import Fate
from hypervisor.host.backends import HostBackends
from hypervisor.host.ledger import PAGES_PER_MIB
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.migration import disks, source
from hypervisor.host.migration import offer as offers
from hypervisor.host.migration.hosting import Hosting
from hypervisor.host.migration.move import Move, MoveStore, secret_of
from hypervisor.host.migration.offer import Detail
from hypervisor.host.migration.source import Outgoing
from hypervisor.host.migration.standby_source import Standby
from hypervisor.host.migration.standby_target import StandbyTarget
from hypervisor.host.migration.target import Incoming
from hypervisor.host.records import DomainRecord
from hypervisor.host.records import Phase as RecordPhase
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import (
    DomainState,
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
    MigrationTicket,
)
from hypervisor.toolstack.migration import check_ident
from hypervisor.xenstore import moving
from hypervisor.xenstore.path import domain_path

LOG = logging.getLogger(__name__)

Phase, Role = MigrationPhase, MigrationRole
ARRIVING = (Phase.WAITING, Phase.RECEIVING, Phase.STANDBY)


class Migrations:
    """All halves of this host."""

    def __init__(self, life: Lifecycle, backends: HostBackends) -> None:
        self._host = Hosting(life, backends, MoveStore(life.settings.state_dir))
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[str, Incoming] = {}
        life.leaving = self._leaving

    # -- the start of the host process ----------------------------------------------------------------------------

    def load(self) -> None:
        """Before domains are adopted."""
        self._host.moves.load()

    def fate(self, record: DomainRecord) -> Fate:
        if record.phase is RecordPhase.ARRIVING:
            return Fate.REMOVE
        if not record.migration:
            return Fate.ADOPT
        move = self._host.moves.find(record.migration)
        if move is None:
            LOG.error(
                "domain %s: the record of its migration %s cannot be read: it stays paused until it is",
                record.spec.uuid,
                record.migration,
            )
            return Fate.HOLD
        if move.phase is Phase.MOVED:
            return Fate.REMOVE
        if move.mode is MigrationMode.STANDBY and move.phase is Phase.UNRESOLVED:
            return Fate.HOLD  # taken over elsewhere: what lies in its rings must not be seen
        if move.role is Role.SOURCE or move.phase is Phase.RUNNING:
            return Fate.ADOPT
        return Fate.HOLD if move.phase is Phase.COMPLETE else Fate.REMOVE

    async def recover(self) -> None:
        """After domains were adopted: every half that was under way comes to an end, or waits for a decision."""
        for move in self._host.moves.all():
            domain = self._host.life.table.find(move.uuid)
            if domain is not None and domain.record.migration != move.ident:
                domain = None
            try:
                if move.role is Role.SOURCE:
                    await self._recover_source(move, domain)
                else:
                    await self._recover_target(move, domain)
            except ToolstackError as exc:
                LOG.error("migration %s: %s", move.ident, exc)

    async def _recover_source(self, move: Move, domain: Domain | None) -> None:
        if move.phase not in source.BEGUN:
            if move.phase is Phase.UNRESOLVED and domain is not None:
                self._outgoing[move.ident] = Outgoing(self._host, move, domain)
                domain.record.detail = move.detail
            return
        why = MigrationFailed(
            f"the host process ended while the domain was moved ({move.phase}): it runs on, try again"
        )
        if domain is None:
            move.end(Phase.KEPT, why)
            self._host.write(move, Phase.KEPT)
            return
        outgoing = self._outgoing[move.ident] = Outgoing(self._host, move, domain)
        async with domain.lock:
            await outgoing.keep(why)

    async def _recover_target(self, move: Move, domain: Domain | None) -> None:
        if move.phase in ARRIVING:
            disks.remove(move.images)
            move.images = []
            moving.forget(self._host.backends.server, move.domid, move.uuid)
            move.end(Phase.DROPPED, MigrationFailed("the target's host process ended before the domain was whole"))
            self._host.write(move, Phase.DROPPED)
        elif domain is not None:
            incoming = self._incoming[move.ident] = Incoming(self._host, move, domain)
            if move.phase is Phase.RUNNING:
                await incoming.go()
            else:
                domain.record.detail = move.detail

    def stop(self) -> None:
        for outgoing in self._outgoing.values():
            outgoing.stop()
        for incoming in self._incoming.values():
            incoming.stop()

    # -- verbs ----------------------------------------------------------------------------------------------------

    async def offer(self, domain: Domain) -> dict[str, Any]:
        """With the domain's lock held. :raises WrongState: it has ended, or is on its way."""
        offers.check_ours(domain, "offer")
        self._host.life.check_alive(domain, "move")
        self._host.tls()
        facts = await self._host.life.zygote.start()
        return (await offers.make(domain, self._host.life.settings, facts)).to_json()

    async def prepare(
        self, offer: MigrationOffer, *, ident: str, token: str, owner: str, mode: MigrationMode, peer: str
    ) -> dict[str, Any]:
        check_ident(ident)
        if (known := self._host.moves.find(ident)) is not None:
            return self._again(known, offer, token)
        if not token:
            raise SpecInvalid("migration token is empty: give a secret that only both hosts know")
        offers.check_driver(offer)
        life = self._host.life
        detail = Detail.from_json(offer.detail)
        record = offers.new_record(offer, detail, ident, owner)
        record.spec.validate()
        self._host.tls()
        facts = await life.zygote.start()
        life.check(record.spec, facts)
        life.table.check_free(record.spec)
        life.ledger.check_free(offer.memory_mib * PAGES_PER_MIB)
        if mode is MigrationMode.IMAGE:
            raise Unsupported("this host takes no images over the network: save the domain and restore it here")
        taken = life.table.domids() | frozenset(self._host.backends.server.domains)
        if self._host.backends.handle.exists(domain_path(offer.domid)):
            taken |= {offer.domid}
        offers.check_live(offer, offers.build_of(life.settings, facts), taken)
        domain = life.new_domain(record, life.records.prepare(record.spec.uuid))
        life.table.add(domain)
        move = Move(
            ident=ident,
            uuid=offer.uuid,
            role=Role.TARGET,
            phase=Phase.WAITING,
            secret=secret_of(token),
            mode=mode,
            peer=peer,
            name=record.spec.name,
            running=offer.running,
            began=time.time(),
            memory_mib=offer.memory_mib,
            vcpus=offer.vcpus,
            domid=offer.domid,
            pages_total=detail.frames,
        )
        incoming = (StandbyTarget if mode is MigrationMode.STANDBY else Incoming)(self._host, move, domain)
        async with domain.lock:
            try:
                ticket = await incoming.prepare(offer, detail, token)
            except BaseException:
                await incoming.hang_up()
                await life.forget(domain)
                raise
        self._incoming[ident] = incoming
        return ticket.to_json()

    def _again(self, move: Move, offer: MigrationOffer, token: str) -> dict[str, Any]:
        if move.role is not Role.TARGET or move.uuid != offer.uuid or move.secret != secret_of(token):
            raise MigrationRefused(f"migration {move.ident} is another one on this host: give each its own ident")
        if move.phase.ended:
            raise MigrationRefused(f"migration {move.ident} has ended here ({move.phase}): begin a new one")
        return move.ticket

    async def start(
        self,
        domain: Domain | None,
        uuid: str,
        *,
        ident: str,
        token: str,
        ticket: MigrationTicket,
        options: MigrationOptions,
        peer: str,
    ) -> None:
        """:param domain: with its lock held; None: there is none."""
        check_ident(ident)
        if (known := self._host.moves.find(ident)) is not None:
            if known.role is not Role.SOURCE or known.uuid != uuid:
                raise MigrationRefused(f"migration {ident} is another one on this host: give each its own ident")
            return
        if domain is None:
            self._host.life.table.get(uuid)
            raise WrongState(f"domain {uuid} is being made: try again")
        options.validate()
        if (ticket.ident, ticket.uuid) != (ident, uuid):
            raise SpecInvalid(f"the ticket is for migration {ticket.ident} of domain {ticket.uuid}, not for this")
        if ticket.mode is MigrationMode.IMAGE:
            raise Unsupported("this host sends no images over the network: save the domain and restore it there")
        offers.check_ours(domain, "move")
        self._host.life.check_alive(domain, "move")
        self._host.tls()
        record = domain.record
        assert record.claim is not None
        move = Move(
            ident=ident,
            uuid=uuid,
            role=Role.SOURCE,
            phase=Phase.STARTING,
            secret=secret_of(token),
            mode=ticket.mode,
            peer=peer,
            name=record.spec.name,
            running=record.state is DomainState.RUNNING,
            began=time.time(),
            memory_mib=record.run.memory_mib,
            vcpus=record.run.vcpus,
            domid=record.domid,
            pages_total=record.claim.frames,
        )
        self._host.write(move, Phase.STARTING)
        record.migration = ident
        self._host.life.records.save(record)
        kind = Standby if ticket.mode is MigrationMode.STANDBY else Outgoing
        outgoing = self._outgoing[ident] = kind(self._host, move, domain, token, ticket, options)
        outgoing.start()

    def status(self, ident: str) -> dict[str, Any]:
        return self._move(ident).status().to_json()

    def list(self) -> list[dict[str, Any]]:
        return [move.status().to_json() for move in self._host.moves.all()]

    async def cancel(self, ident: str) -> None:
        move = self._move(ident)
        if move.phase in (Phase.KEPT, Phase.DROPPED):
            return
        if move.role is Role.SOURCE:
            if move.phase not in source.BEGUN:
                raise WrongState(f"migration {ident} is {move.phase} here, too late to cancel it: {move.detail}")
            await self._outgoing[ident].cancel(move.cancelled())
        else:
            if move.phase not in ARRIVING:
                raise WrongState(f"migration {ident} is {move.phase} here: {move.detail or 'too late to cancel it'}")
            await self._incoming[ident].cancel(
                MigrationCancelled(f"migration {ident} was cancelled on the target: the domain runs on at its source")
            )
            if self._move(ident).phase is not Phase.DROPPED:
                raise WrongState(f"migration {ident} is {move.phase} here: {move.detail or 'too late to cancel it'}")

    async def resolve(self, ident: str, *, keep: bool) -> None:
        move = self._move(ident)
        ours = move.role is Role.SOURCE
        reached = (Phase.KEPT if keep else Phase.MOVED) if ours else (Phase.RUNNING if keep else Phase.DROPPED)
        if move.phase is reached:
            return
        if move.phase is not (Phase.UNRESOLVED if ours else Phase.COMPLETE):
            raise WrongState(f"migration {ident} is {move.phase} here: there is nothing to resolve")
        if ours:
            await self._outgoing[ident].resolve(keep=keep)
        elif keep:
            incoming = self._incoming[ident]
            await incoming.go()
            await incoming.hang_up()
        else:
            why = MigrationFailed(f"migration {ident} was resolved: the domain does not run here")
            await self._incoming[ident].drop(why)

    async def takeover(self, ident: str, *, force: bool) -> None:
        move = self._move(ident)
        if move.role is not Role.TARGET or move.mode is not MigrationMode.STANDBY:
            raise WrongState(f"migration {ident} is no standby that this host could take over")
        if move.phase is Phase.RUNNING:
            return
        incoming = self._incoming.get(ident)
        if move.phase is Phase.COMPLETE and force:
            await self.resolve(ident, keep=True)
        elif move.phase is Phase.COMPLETE:
            raise WrongState(f"the source cannot be asked: {move.detail}")
        elif move.phase is Phase.STANDBY and isinstance(incoming, StandbyTarget):
            await incoming.takeover(force=force)
        else:
            raise WrongState(f"migration {ident} is {move.phase} here: there is no whole epoch to run")

    def forget(self, ident: str) -> None:
        move = self._host.moves.find(ident)
        if move is None:
            return
        if not move.phase.ended or move.ending:
            raise WrongState(f"migration {ident} is {move.phase} here: it has to end before it is forgotten")
        self._host.moves.forget(ident)
        self._outgoing.pop(ident, None)
        self._incoming.pop(ident, None)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _move(self, ident: str) -> Move:
        move = self._host.moves.find(ident)
        if move is None:
            raise MigrationNotFound(
                f"no migration {ident[:60]} on this host: list the migrations to see which there are"
            )
        return move

    async def _leaving(self, domain: Domain) -> None:
        """A guest ended by itself: its migration ends first, if it had one."""
        outgoing = self._outgoing.get(domain.record.migration)
        if outgoing is None:
            return
        why = WrongState(f"domain {domain.uuid} ended or restarted by itself while it was moved")
        try:
            await outgoing.cancel(why)
        except WrongState as exc:
            LOG.info("domain %s: %s", domain.uuid, exc)
