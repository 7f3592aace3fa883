"""The durable memory of the agent: what was asked, what was done about it, what was answered.

``schema`` opens and checks the file, ``records`` are the rows, ``group`` commits, ``store`` is the journal itself.
"""

from __future__ import annotations

from agent.journal.records import Accepted, Entry, OutboxRow, Phase, Refused, StepRecord, StepState, Waiter
from agent.journal.store import Journal

__all__ = [
    "Accepted",
    "Entry",
    "Journal",
    "OutboxRow",
    "Phase",
    "Refused",
    "StepRecord",
    "StepState",
    "Waiter",
]
