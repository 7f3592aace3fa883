"""Takes secrets out of what is logged or kept. Pure."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(
    r"token|passw(or)?d|passphrase|secret|credential|private|signature|cookie|(^|[_-])(auth|key|pw)([_-]|$)",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """A copy of JSON data in which every value whose name suggests a secret is `HIDDEN`."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if _SECRET.search(name) and item not in (None, "") else redact(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [redact(item) for item in value]
    return value
