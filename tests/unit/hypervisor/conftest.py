"""Makes the shared helpers importable: `pv_rig` (a domain on a fake engine) and `harness` (micro-guests)."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[2]
for _folder in (_TESTS / "support", _TESTS / "guests"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
