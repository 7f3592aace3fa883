"""Makes the shared helpers importable: `harness` and `pv_rig`, and what lies beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
for _folder in (_TESTS / "support", _TESTS / "guests", _TESTS / "fuzz"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
