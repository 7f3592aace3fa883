"""What bench/clone.py makes of a process's numbers, and its table."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
import clone
from common import BenchFailed


def test_memory_of_a_process() -> None:
    own = clone.smaps(os.getpid())
    assert 0 < own["uss"] <= own["pss"] + (1 << 20) and own["tables"] > 0
    with pytest.raises(OSError):
        clone.smaps(1 << 22)


class Events:
    """A queue of events, empty at the end."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = list(kinds)

    def get(self, timeout: float) -> Any:
        if not self.kinds:
            raise clone.queue.Empty
        return clone.DomainEvent(self.kinds.pop(0), "some", 0.0)


def test_events_are_awaited() -> None:
    told = list(clone._until(Events("destroyed", "created", "unpaused"), "created", 1.0))
    assert [event.kind for event, _ in told] == ["destroyed", "created"]
    with pytest.raises(BenchFailed, match="created within 1 s"):
        list(clone._until(Events("destroyed"), "created", 1.0))


def test_the_table_has_every_figure() -> None:
    result = {
        "clones": 3, "memory_mib": 256, "shell_ms": 80.0, "shell_ms_range": [70.0, 99.0], "mib_per_clone": 9.5,
        "steps_ms": {"there": 40.0, "step_build": 30.0}, "of_which_mib": {"pss": 10.0, "daemons_growth": -1.0},
    }  # fmt: skip
    text = str(clone.table(result))
    for figure in ("80.0", "70.0 to 99.0", "9.5", "40.0", "30.0", "10.0", "-1.0"):
        assert figure in text
