"""What of a device outlives the host process, in the domain's record, and goes along when the domain moves."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True)
class DeviceMemory:
    """
    :ivar front: what the driver was told of the front end; None when it is not connected.
    :ivar broken: why the back end gave the device up, "" when it did not.
    :ivar leaving: it was asked to go.
    :ivar restarts: how often its driver process was replaced. :ivar counted: by drivers there are no more.
    :ivar carried: what came from another host with it (`Opened.leave`) and waits until it is open here; None: nothing.
    """

    front: dict[str, Any] | None = None
    broken: str = ""
    leaving: bool = False
    restarts: int = 0
    counted: dict[str, int] = dataclasses.field(default_factory=dict)
    carried: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceMemory:
        return cls(**data)

    def count(self, more: dict[str, int]) -> None:
        """What a driver that is gone had counted."""
        for name, value in more.items():
            self.counted[name] = self.counted.get(name, 0) + value
