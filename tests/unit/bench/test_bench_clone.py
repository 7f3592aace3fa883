"""What bench/clone.py makes of a process's numbers, and its table."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
import clone
import clonewhere
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
    events = Events("destroyed", "created", "unpaused")
    event, at = clone._until(events, "created", 1.0)
    assert event.kind == "created" and at > 0 and events.kinds == ["unpaused"]
    with pytest.raises(BenchFailed, match="created within 1 s"):
        clone._until(Events("destroyed"), "created", 1.0)


def test_the_table_has_every_figure() -> None:
    result = {
        "clones": 3, "memory_mib": 256, "shell_ms": 80.0, "shell_ms_range": [70.0, 99.0], "mib_per_clone": 9.5,
        "steps_ms": {"there": 40.0, "step_build": 30.0}, "of_which_mib": {"pss": 10.0, "daemons_growth": -1.0},
        "memory_mib_by_kind": {"heap": {"pss": 4.5, "dirty": 4.25}},
        "stages": [{"stage": "domain: engine", "after_ms": 12.5, "cpu_ms": 7.5}],
    }  # fmt: skip
    text = str(clone.table(result))
    for figure in ("80.0", "70.0 to 99.0", "9.5", "40.0", "30.0", "10.0", "-1.0", "4.5, 4.25", "after 12.5 ms, 7.5"):
        assert figure in text


def test_stages_are_taken_from_the_logs_of_both_processes(tmp_path: Path) -> None:
    host, domain = tmp_path / "host", tmp_path / "domain"
    host.write_text(
        "x DEBUG s: stage claimed 9.000000 1.0\ny stage claimed 10.100000 1.5\nstage built 10.300000 1.75\n"
    )
    domain.write_text("a stage engine 10.200000 0.125000\nstage torn 10.")
    found = clonewhere.stages({"host": host, "domain": domain}, 10.0, 11.0)
    assert [name for name, _, _ in found] == ["host: claimed", "domain: engine", "host: built"]
    rows = clonewhere.summed([found])
    assert [row["cpu_ms"] for row in rows] == [1500.0, 125.0, 250.0]
    assert rows[1]["after_ms"] == 200.0


def test_memory_of_a_process_by_kind() -> None:
    kinds = clonewhere.memory([os.getpid()])
    assert kinds["files"]["pss"] > 0 and kinds["anonymous"]["dirty"] > 0
    assert clonewhere.kind("rwxp", "") == "translations"
    assert clonewhere.kind("rw-p", "/var/lib/reeve/templates/web/memory") == "guest_private"
    assert clonewhere.kind("rw-s", "/memfd:reeve-x (deleted)") == "memfd"
