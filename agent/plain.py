"""What a plugin gave, in a form that any encoder takes."""

from __future__ import annotations

import json
from typing import Any


def one_line(text: str) -> str:
    """One line that any encoder takes."""
    return " ".join(text.encode(errors="replace").decode().split())[:1000]


def json_object(data: dict[str, Any]) -> dict[str, Any]:
    """What a plugin gave, as it will be read back. :raises ValueError, TypeError: it is no JSON object."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    text.encode()
    return dict(json.loads(text))
