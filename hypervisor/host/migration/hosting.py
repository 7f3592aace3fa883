"""What both roles of a migration need of their host process."""

from __future__ import annotations

import dataclasses
import json

from hypervisor.errors import Unsupported
from hypervisor.host.backends import HostBackends
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.migration.move import Move, MoveStore
from hypervisor.host.mover import TlsFiles
from hypervisor.toolstack.api import MigrationPhase


def reached(move: Move) -> None:
    """A phase was written down, and not acted upon yet: tests stop the process here."""


@dataclasses.dataclass(slots=True)
class Hosting:
    life: Lifecycle
    backends: HostBackends
    moves: MoveStore

    def tls(self) -> TlsFiles:
        """:raises Unsupported: this host is not set up for migration."""
        settings = self.life.settings
        if not settings.can_migrate:
            raise Unsupported(
                "this host is not set up for migration: set migration_ca, migration_certificate and migration_key"
            )
        return TlsFiles(settings.migration_ca, settings.migration_certificate, settings.migration_key)

    def write(self, move: Move, phase: MigrationPhase, detail: str = "", *, tell: bool = True) -> None:
        """Write a phase down, then tell of it. :raises HostFailure: the disk does not take it; nothing has changed."""
        before = move.phase, move.detail
        move.phase, move.detail = phase, detail
        try:
            self.moves.save(move)
        except BaseException:
            move.phase, move.detail = before
            raise
        reached(move)
        if tell:
            self.tell(move)

    def tell(self, move: Move) -> None:
        self.life.table.emit("migration", move.uuid, json.dumps(move.status().to_json()), loud=False)
