"""One half of a migration as the host process remembers it: ``<state>/migrations/<ident>.json``.

As a domain's record it survives SIGKILL of the host process by a rename. A phase is written before it is acted upon.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from hypervisor.errors import MigrationCancelled, ToolstackError
from hypervisor.host.records import write_atomically
from hypervisor.toolstack.api import MigrationMode, MigrationPhase, MigrationRole, MigrationStatus

LOG = logging.getLogger(__name__)

FORMAT = 1
_BEFORE = {MigrationPhase.MOVED: MigrationPhase.SWITCHING, MigrationPhase.RUNNING: MigrationPhase.COMPLETE}
_TOLD = {field.name for field in dataclasses.fields(MigrationStatus)}


@dataclasses.dataclass(slots=True)
class Move:
    """What `MigrationStatus` has, and besides

    :ivar domid: of the half here.
    :ivar secret: of the token, which itself is not kept; `ticket` what the target said of itself.
    :ivar running: whether the guest ran when it was offered, so that it shall run in the end.
    :ivar images: that were made here for its disks, and go when it does not come.
    :ivar began: seconds since the epoch.
    :ivar downtime: where the downtime went, milliseconds by step.
    :ivar ending: the phase is written, what follows from it is being done; until then the one before is told.
    """

    ident: str
    uuid: str
    role: MigrationRole
    phase: MigrationPhase
    secret: str
    mode: MigrationMode = MigrationMode.LIVE
    peer: str = ""
    name: str = ""
    running: bool = True
    began: float = 0.0
    memory_mib: int = 0
    vcpus: int = 0
    domid: int = 0
    rounds: int = 0
    pages_sent: int = 0
    bytes_sent: int = 0
    pages_total: int = 0
    dirty_pages: int = 0
    rate_bytes: float = 0.0
    dirty_rate_pages: float = 0.0
    downtime_estimate_ms: float = 0.0
    downtime_ms: float = 0.0
    total_s: float = 0.0
    epochs: int = 0
    pause_ms: float = 0.0
    lost_ms: float = 0.0
    error: dict[str, Any] | None = None
    detail: str = ""
    ticket: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: list[str] = dataclasses.field(default_factory=list)
    downtime: dict[str, float] = dataclasses.field(default_factory=dict)
    ending: bool = False

    def end(self, phase: MigrationPhase, why: ToolstackError | None = None) -> None:
        self.phase = phase
        self.error = None if why is None else why.to_json()
        self.detail = ""
        self.ending = False
        self.memory_mib = self.vcpus = 0
        self.total_s = time.time() - self.began

    def commands(self) -> str:
        """How an operator decides for this half."""
        return f"reeve migration resolve {self.ident} --keep or --drop"

    def cancelled(self) -> MigrationCancelled:
        return MigrationCancelled(f"migration {self.ident} was cancelled: the domain runs on")

    def status(self) -> MigrationStatus:
        data = {name: value for name, value in self.to_json().items() if name in _TOLD}
        if self.ending:
            data["phase"] = _BEFORE.get(self.phase, self.phase)
        if self.ending or not self.phase.ended:
            data["total_s"] = time.time() - self.began
        return MigrationStatus.from_json(data)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Move:
        """:raises ValueError, KeyError, TypeError: it is no record of ours."""
        fields = dict(data)
        fields["role"] = MigrationRole(fields["role"])
        fields["phase"] = MigrationPhase(fields["phase"])
        fields["mode"] = MigrationMode(fields["mode"])
        fields["ending"] = False
        return cls(**fields)


def secret_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class MoveStore:
    """:param root: the host's state folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "migrations"
        self._moves: dict[str, Move] = {}

    def load(self) -> None:
        """What cannot be read is left alone, and logged."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(self._folder.glob("*.json")):
            try:
                data = json.loads(path.read_text())
                if data.pop("format") != FORMAT:
                    raise ValueError(f"format is not {FORMAT}")
                move = Move.from_json(data)
                if move.ident != path.stem:
                    raise ValueError(f"it tells of {move.ident}")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
                LOG.error("record %s cannot be read (%s): it is left where it is", path, exc)
            else:
                self._moves[move.ident] = move

    def find(self, ident: str) -> Move | None:
        return self._moves.get(ident)

    def all(self) -> list[Move]:
        """Oldest first."""
        return sorted(self._moves.values(), key=lambda move: move.began)

    def save(self, move: Move) -> None:
        """:raises HostFailure: the disk does not take it; what was written before stays."""
        self._moves[move.ident] = move
        write_atomically(self._folder / f"{move.ident}.json", json.dumps({"format": FORMAT, **move.to_json()}))

    def forget(self, ident: str) -> None:
        self._moves.pop(ident, None)
        (self._folder / f"{ident}.json").unlink(missing_ok=True)
