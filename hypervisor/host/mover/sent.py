"""What a mover says of pages that it sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, slots=True)
class PagesSent:
    """A round of pages.

    :ivar pages: whose bits were set, or that had to be sent again; of these `zero`, `duplicate` and `unchanged` cost
        next to nothing. :ivar bytes: on the network. :ivar seconds: until the target had written them; in the last
        round until they were handed to the network.
    """

    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    zero: int = 0
    duplicate: int = 0
    unchanged: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})
