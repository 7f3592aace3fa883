"""How a fake domain moves. The network between two fake hosts is the target's state folder.

Nothing happens behind anybody's back: each look of the source at a migration (`migration_status`, `migration_list`)
takes it one step further, whichever process looks. A step acts on the target first and then on the source, each in a
transaction of its own that looks again: so a process may be killed between the two, as a link may be cut.

Faults (``inject_link`` of the driver) are met at these points of the source:

=============  =========================================================================================
``starting``   before it has connected
``copying``    before a round of copying
``standby``    before an epoch
``switching``  the guest is paused, the rest is not sent yet
``complete``   the target has everything and has said so; the source has not heard it
``moved``      the source has written down that it is gone, and has not told the target
=============  =========================================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

from hypervisor.errors import (
    MigrationFailed,
    MigrationNotFound,
    MigrationRefused,
    MigrationUnresolved,
    OperationTimeout,
    ToolstackError,
    WrongState,
)
from hypervisor.toolstack.api import (
    DomainState,
    MigrationMode,
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
)
from hypervisor.toolstack.drivers import _fake_guest as guest
from hypervisor.toolstack.drivers._fake_moves import Move, Shut
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store
from hypervisor.toolstack.migration import WAIT_SECONDS

ROUNDS = 3
"""Rounds of copying until a guest has converged, unless ``fake.rounds`` on its command line says otherwise."""

Phase = MigrationPhase
Role = MigrationRole


class Mover:
    """Part of `hypervisor.toolstack.drivers.fake.FakeToolstack`: what happens to a migration once it was begun."""

    store: Store
    state_dir: str | None

    # one step of the source

    def advance(self, ident: str) -> None:
        with self.store.transaction():
            move = self.found(ident)
            if move is not None and move.phase is Phase.WAITING and time.time() - move.began > WAIT_SECONDS:
                drop(self.store, move, MigrationFailed(f"no source has connected within {WAIT_SECONDS:g} s"))
        steps = {
            Phase.STARTING: self._connect,
            Phase.COPYING: self._copy,
            Phase.STANDBY: self._epoch,
            Phase.SWITCHING: self._switch,
        }
        if move is None or move.role is not Role.SOURCE or move.phase not in steps:
            return
        try:
            steps[move.phase](move)
        except Shut as shut:
            self._broke(move, shut.unresolved)
        except ToolstackError as exc:
            with self.store.transaction():
                if self._same(move):
                    self.keep(move, exc)
            self.hang_up(move)

    def _connect(self, move: Move) -> None:
        self._meet("starting")
        with contextlib.closing(Store(move.folder)) as network, network.transaction():
            doc = network.migration(move.ident)
            half = Move.from_json(doc) if doc is not None else None
            if half is None or half.token != move.token or half.phase not in (Phase.WAITING, Phase.RECEIVING):
                raise MigrationRefused(f"the target does not wait for migration {move.ident}: prepare it there first")
            half.phase, half.folder = Phase.RECEIVING, self.state_dir or ""
            put(network, half)
        self._next(move, phase=Phase.COPYING)

    def _copy(self, move: Move) -> None:
        self._meet("copying")
        options = MigrationOptions.from_json(move.options)
        with self.store.transaction():
            domain = self.store.find(move.uuid)
        if domain is None or domain.ended or domain.domid != move.domid:
            raise WrongState(f"domain {move.uuid} ended or restarted by itself while it was copied")
        if time.time() - move.began > options.timeout_s:
            raise MigrationFailed(f"not done within {options.timeout_s:g} s: give more time, or let it be slowed down")
        words = guest.option(domain, "rounds")
        wanted = options.max_rounds if words == "never" else int(words or ROUNDS)
        if move.mode is MigrationMode.IMAGE and guest.option(domain, "shutdown") == "ignore":
            raise OperationTimeout(f"the guest of domain {move.uuid} did not suspend: it runs on")
        after = Phase.STANDBY if move.mode is MigrationMode.STANDBY else Phase.SWITCHING
        last = move.rounds + 1 >= min(wanted, options.max_rounds) and words != "never"
        left = max(0, wanted - move.rounds - 1) * move.pages_total // max(1, wanted)
        self._next(
            move,
            phase=after if last else Phase.COPYING,
            rounds=move.rounds + 1,
            pages_sent=move.pages_sent + max(1, move.dirty_pages or move.pages_total),
            bytes_sent=move.bytes_sent + (max(1, move.dirty_pages or move.pages_total) << 12),
            dirty_pages=left,
            rate_bytes=float(1 << 30),
            downtime_estimate_ms=left / 1000,
        )

    def _epoch(self, move: Move) -> None:
        self._meet("standby")
        with self.store.transaction():
            domain = self.store.find(move.uuid)
            printed = self.store.console(move.uuid) or (b"", 0)
            typed = self.store.typed_input(move.uuid)
        if domain is None or domain.ended or domain.domid != move.domid:
            raise WrongState(f"domain {move.uuid} ended or restarted by itself while it had a standby")
        with contextlib.closing(Store(move.folder)) as network, network.transaction():
            _whole(network, move, domain, printed, typed)
        self._next(move, epochs=move.epochs + 1, rounds=move.rounds + 1, pause_ms=1.0)

    def hand_over(self, ident: str) -> None:
        """The target asks for the domain that it is the standby of."""
        with self.store.transaction():
            move = self.found(ident)
        if move is not None and move.phase is Phase.STANDBY:
            self._next(move, phase=Phase.SWITCHING)
        for _ in range(2):
            self.advance(ident)

    def was_taken(self, ident: str) -> None:
        """The target says that it runs the domain."""
        with self.store.transaction():
            move = self.found(ident)
            if move is None or move.phase.ended:
                return
            why = MigrationUnresolved("the target runs the domain's last epoch, it was told that this host is dead")
            self._stuck(move, why, f"paused, {why}: {move.commands()}")

    def _switch(self, move: Move) -> None:
        """Two looks: the target becomes complete; the source has moved and says so."""
        if not move.sent:
            self._meet("switching")
            with self.store.transaction():
                domain = self.store.get(move.uuid)
                if domain.ended:
                    raise WrongState(f"domain {move.uuid} ended while it was moved")
                printed = self.store.console(move.uuid) or (b"", 0)
                typed = self.store.typed_input(move.uuid)
            with contextlib.closing(Store(move.folder)) as network, network.transaction():
                _complete(network, move, domain, printed, typed)
            self._meet("complete")
            self._next(move, sent=True, dirty_pages=0, downtime_ms=1.0)
            return
        with self.store.transaction():
            if not self._same(move):
                return
            self.gone(move)
        with contextlib.suppress(Shut, ToolstackError):  # the agents see to it then
            self._meet("moved")
            with contextlib.closing(Store(move.folder)) as network, network.transaction():
                go(network, move.ident)

    def _next(self, move: Move, **changes: Any) -> None:
        """The step is done, unless somebody was quicker."""
        with self.store.transaction():
            if not self._same(move):
                return
            for name, value in changes.items():
                setattr(move, name, value)
            if move.phase is Phase.SWITCHING and not move.sent:
                domain = self.store.get(move.uuid)
                domain.state = DomainState.PAUSED
                domain.detail = f"on its way to {move.peer or 'another host'} (migration {move.ident})"
                self.store.put(domain)
            self.put_move(move)

    def _meet(self, point: str) -> None:
        """:raises Shut: a fault waits here."""
        for fault in self.store.take_faults(f"link:{point}", "before"):
            raise Shut(unresolved=fault["kind"] == "unresolved")

    def _broke(self, move: Move, unresolved: bool) -> None:
        """The link was cut: the source keeps the domain, if it can."""
        with self.store.transaction():
            if not self._same(move):
                return
            if unresolved:
                why = MigrationUnresolved(f"migration {move.ident}: the guest cannot go on here by itself")
                self._stuck(move, why, f"paused on both sides: {move.commands()}")
            else:
                self.keep(move, MigrationFailed(f"the connection to the target was lost ({move.phase.value})"))
        self.hang_up(move, said=False)

    def _stuck(self, move: Move, why: MigrationUnresolved, detail: str) -> None:
        move.phase, move.error, move.detail = Phase.UNRESOLVED, why.to_json(), detail
        domain = self.store.get(move.uuid)
        domain.state, domain.detail = DomainState.PAUSED, move.detail
        self.store.put(domain)
        self.put_move(move)

    def hang_up(self, move: Move, *, said: bool = True) -> None:
        """The target sees that the connection has ended. :param said: and was told that the source keeps the domain."""
        with (
            contextlib.suppress(ToolstackError),
            contextlib.closing(Store(move.folder)) as network,
            network.transaction(),
        ):
            doc = network.migration(move.ident)
            if doc is not None and (doc["phase"] == Phase.RECEIVING or (said and doc["phase"] == Phase.STANDBY)):
                drop(network, Move.from_json(doc), MigrationFailed("the source ended the connection"))
            elif doc is not None and doc["phase"] == Phase.STANDBY:
                alone(network, Move.from_json(doc))

    # ends of a half; inside a transaction

    def keep(self, move: Move, why: ToolstackError) -> None:
        domain = self.store.find(move.uuid)
        if domain is not None and domain.migration == move.ident:
            paused = domain.state is DomainState.PAUSED
            domain.migration, domain.detail = "", "" if paused else domain.detail
            domain.state = DomainState.RUNNING if paused and move.running else domain.state
            self.store.put(domain)
            if domain.state is DomainState.RUNNING:
                guest.run(self.store, domain)
        self._end(move, Phase.KEPT, why)

    def gone(self, move: Move) -> None:
        self.store.delete(move.uuid)
        self._end(move, Phase.MOVED)
        self.store.emit("destroyed", move.uuid, f"moved to {move.peer or 'another host'}")

    def _end(self, move: Move, phase: MigrationPhase, why: ToolstackError | None = None) -> None:
        move.end(phase, why)
        self.put_move(move)

    # records

    def found(self, ident: str) -> Move | None:
        doc = self.store.migration(ident)
        return Move.from_json(doc) if doc is not None else None

    def move(self, ident: str) -> Move:
        found = self.found(ident)
        if found is None:
            raise MigrationNotFound(f"no migration {ident} on this host: list the migrations to see which there are")
        return found

    def _same(self, move: Move) -> bool:
        return self.store.migration(move.ident) == move.to_json()

    def put_move(self, move: Move) -> None:
        put(self.store, move)


def put(store: Store, move: Move) -> None:
    store.put_migration(move.ident, move.to_json())
    store.emit("migration", move.uuid, json.dumps(move.status().to_json()))


def _complete(store: Store, source: Move, domain: FakeDomain, printed: tuple[bytes, int], typed: bytes) -> None:
    """The target has everything and keeps it paused."""
    doc = store.migration(source.ident)
    if doc is None or doc["phase"] not in (Phase.RECEIVING, Phase.STANDBY, Phase.COMPLETE):
        raise MigrationRefused(f"the target has given migration {source.ident} up")
    move = Move.from_json(doc)
    domain.spec = dataclasses.replace(domain.spec, owner=move.owner)
    domain.domid = move.domid
    domain.state, domain.migration, domain.hidden = DomainState.PAUSED, move.ident, False
    move.phase = Phase.COMPLETE
    move.detail = f"whole and paused until it is known that it left its source: {move.commands()}"
    domain.detail = move.detail
    store.put(domain)
    store.set_console(move.uuid, *printed)
    store.set_input(move.uuid, typed)
    put(store, move)


def _whole(store: Store, source: Move, domain: FakeDomain, printed: tuple[bytes, int], typed: bytes) -> None:
    """The target has an epoch. :raises MigrationRefused: it does not want it any more."""
    doc = store.migration(source.ident)
    if doc is None or doc["phase"] not in (Phase.RECEIVING, Phase.STANDBY):
        raise MigrationRefused(f"the target has given migration {source.ident} up")
    move = Move.from_json(doc)
    domain.spec = dataclasses.replace(domain.spec, owner=move.owner)
    domain.state, domain.migration, domain.hidden = DomainState.PAUSED, move.ident, True
    store.put(domain)
    store.set_console(move.uuid, *printed)
    store.set_input(move.uuid, typed)
    move.phase, move.epochs = Phase.STANDBY, move.epochs + 1
    put(store, move)


def alone(store: Store, move: Move) -> None:
    """The source of a standby is silent: its last epoch is here, paused."""
    domain = next(domain for domain in store.domains() if domain.uuid == move.uuid)
    move.phase, move.lost_ms = Phase.COMPLETE, 1.0
    move.detail = f"paused at epoch {move.epochs}: the source is silent; know that it runs there no more, then "
    move.detail += move.commands()
    domain.hidden, domain.detail = False, move.detail
    store.put(domain)
    put(store, move)


def drop(store: Store, move: Move, why: ToolstackError) -> None:
    store.delete(move.uuid)
    move.end(Phase.DROPPED, why)
    put(store, move)


def go(store: Store, ident: str) -> None:
    """The target may run it. Nothing happens when it is not complete, or does already."""
    doc = store.migration(ident)
    if doc is None or doc["phase"] not in (Phase.COMPLETE, Phase.UNRESOLVED):
        return
    move = Move.from_json(doc)
    domain = store.get(move.uuid)
    domain.migration = domain.detail = ""
    domain.state = DomainState.RUNNING if move.running else DomainState.PAUSED
    store.put(domain)
    move.end(Phase.RUNNING)
    put(store, move)
    if move.running:
        guest.run(store, domain)
