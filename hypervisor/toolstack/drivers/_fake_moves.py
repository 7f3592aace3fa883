"""One half of a migration as the fake driver remembers it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import MigrationMode, MigrationPhase, MigrationRole, MigrationStatus

PAGES_PER_MIB = 256
_TOLD = {field.name for field in dataclasses.fields(MigrationStatus)}


class Shut(Exception):
    """The link was cut. :ivar unresolved: and the source cannot go on either."""

    def __init__(self, *, unresolved: bool) -> None:
        super().__init__()
        self.unresolved = unresolved


@dataclasses.dataclass(slots=True)
class Move:
    """What `MigrationStatus` has, and besides

    :ivar token: the secret; `folder` state folder of the other host, on the target once a source has connected; `owner`
        the marker of the target.
    :ivar running: whether it ran when it was offered; `domid` that of this half.
    :ivar sent: the target is complete.
    :ivar began: seconds since the epoch.
    """

    ident: str
    uuid: str
    role: MigrationRole
    phase: MigrationPhase
    mode: MigrationMode
    token: str
    running: bool
    domid: int
    began: float
    peer: str = ""
    name: str = ""
    memory_mib: int = 0
    vcpus: int = 0
    folder: str = ""
    owner: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sent: bool = False
    rounds: int = 0
    pages_sent: int = 0
    bytes_sent: int = 0
    pages_total: int = 0
    dirty_pages: int = 0
    rate_bytes: float = 0.0
    downtime_estimate_ms: float = 0.0
    downtime_ms: float = 0.0
    total_s: float = 0.0
    epochs: int = 0
    pause_ms: float = 0.0
    lost_ms: float = 0.0
    error: dict[str, Any] | None = None
    detail: str = ""

    def end(self, phase: MigrationPhase, why: ToolstackError | None = None) -> None:
        self.phase = phase
        self.error = None if why is None else why.to_json()
        self.detail = ""
        self.memory_mib = self.vcpus = 0
        self.total_s = time.time() - self.began

    def commands(self) -> str:
        """How an operator decides for this half."""
        return f"reeve migration resolve {self.ident} --keep or --drop"

    def status(self) -> MigrationStatus:
        data = {name: value for name, value in self.to_json().items() if name in _TOLD}
        return MigrationStatus.from_json(data)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Move:
        fields = dict(data)
        fields["role"] = MigrationRole(fields["role"])
        fields["phase"] = MigrationPhase(fields["phase"])
        fields["mode"] = MigrationMode(fields["mode"])
        return cls(**fields)
