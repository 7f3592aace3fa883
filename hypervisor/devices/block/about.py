"""Whether a disk that is found after a restart of the host process is the one that was there before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

ABOUT_NAME = "disk.json"


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What makes a disk the same disk over a restart of the host process."""

    domid: int
    path: str
    format: str
    readonly: bool
    direct: bool

    def save(self, folder: Path) -> None:
        (folder / ABOUT_NAME).write_text(json.dumps(dataclasses.asdict(self)))

    def matches(self, folder: Path) -> bool:
        try:
            return bool(json.loads((folder / ABOUT_NAME).read_text()) == dataclasses.asdict(self))
        except (OSError, ValueError):
            return False
