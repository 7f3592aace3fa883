"""An instruction under way in a worker."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from agent.api import Plan, Step
from agent.context import StepContext
from agent.errors import AgentError
from agent.journal import Entry, StepState
from agent.loader import Verb
from agent.plain import one_line
from hypervisor.errors import ToolstackError

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Work:
    """An instruction under way. `states` and `seconds` are per step of the plan."""

    entry: Entry
    verb: Verb
    ctx: StepContext
    plan: Plan
    states: list[StepState | None]
    seconds: list[float]

    @property
    def journalled(self) -> bool:
        return not self.verb.plugin.read_only

    @property
    def name(self) -> str:
        return self.entry.instruction.verb

    @property
    def committed(self) -> bool:
        """Past the point of no return."""
        done = zip(self.plan.steps, self.states, strict=True)
        return any(step.commits and state is StepState.DONE for step, state in done)


def request_id(entry: Entry) -> str:
    """What the sender calls this request, fit for a log line."""
    value = entry.instruction.context.get("request_id")
    return value if isinstance(value, str) and re.fullmatch(r"[!-~]{1,128}", value) else ""


def remains(step: Step, state: StepState | None) -> bool:
    """Whether the step may have left something in the world. One without an undo of its own has."""
    if state is None or not step.changes:
        return False
    return state is not StepState.UNDONE or type(step).undo is Step.undo


def failure(entry: Entry, exc: BaseException, step: Step | None = None) -> dict[str, Any]:
    """What went wrong, as a reply tells it; a mistake of a plugin is logged with its traceback."""
    if isinstance(exc, ToolstackError | AgentError):
        return {"code": exc.code, "message": one_line(exc.message), "retryable": exc.retryable}
    where = f"{entry.instruction.verb!r}" if step is None else f"step {step.name!r} of {entry.instruction.verb!r}"
    LOG.error("a mistake in %s", where, exc_info=exc)
    return {
        "code": "plugin.failed",
        "message": one_line(f"a mistake in the plugin: {where} raised {exc!r}; report it with the agent's log"),
        "retryable": False,
    }
