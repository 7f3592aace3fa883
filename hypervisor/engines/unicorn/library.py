"""The ``unicorn`` distribution, imported once and untyped (it ships incomplete annotations)."""

from __future__ import annotations

import importlib
from typing import Any

unicorn: Any = importlib.import_module("unicorn")
uc_const: Any = importlib.import_module("unicorn.unicorn_const")
uc_x86: Any = importlib.import_module("unicorn.x86_const")

GPR_NAMES = (*["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"], *(f"R{i}" for i in range(8, 16)))
