"""An instruction's plan carried out on this machine, without agent, journal and broker.

For commands whose meaning is a plugin's. What the agent would journal is kept in memory: a failure or Ctrl-C takes
back what was done, a killed command does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from agent.api import BootImage, Host, InstructionError, JsonDict, Plan, Step
from agent.cli.base import CliError, progress
from agent.context import StepContext
from agent.errors import AgentError
from agent.loader import load_verbs
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainInfo, Toolstack

Tell = Callable[[Step, JsonDict], None]


class NoClaims:
    """The driver itself refuses what the host has not got; nobody else is to be kept away here."""

    def take(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> None: ...

    def holds(self, instruction: str) -> bool:
        return True

    def release(self, instruction: str) -> None: ...


class NoImages:
    def find(self, name: str) -> BootImage:
        raise InstructionError("image.not_found", f"no image {name!r} here")

    def verify(self, image: str, files: Any) -> None: ...


def carry_out(verb: str, args: JsonDict, toolstack: Toolstack, info: DomainInfo, tell: Tell) -> JsonDict:
    """Run the plan of `verb` for one domain, whoever's it is; undo it when it fails.

    :param tell: hears the progress of the step under way.
    :raises AgentError, ToolstackError: why it was not done.
    """
    verbs, broken = load_verbs()
    if verb not in verbs:
        raise CliError(f"there is no plugin for {verb!r}: {broken.get(verb, 'install the package again')}")
    found = verbs[verb]
    found.check(args)
    host = Host(info.name, info.owner, toolstack, NoClaims(), NoImages(), {})
    plan = found.plugin.plan(args, host)
    ctx = StepContext(host, "command line", threading.Event())
    _run(plan, ctx, tell)
    return found.plugin.result(args, plan, ctx)


def _run(plan: Plan, ctx: StepContext, tell: Tell) -> None:
    begun: list[Step] = []
    try:
        for step in plan.steps:
            begun.append(step)
            ctx.tell = lambda data, step=step: tell(step, data)  # type: ignore[misc]
            tell(step, {})
            ctx.outputs[step.name] = step.run(ctx) or {}
    except BaseException as exc:
        left = _taken_back(begun, ctx)
        if left and isinstance(exc, ToolstackError | AgentError):
            exc.message = "; ".join([exc.message, *left])
        raise


def _taken_back(begun: list[Step], ctx: StepContext) -> list[str]:
    """Undo, newest first; what cannot be undone, and why."""
    left = []
    with progress("taking back what was done"):
        for step in reversed(begun):
            try:
                step.undo(ctx)
            except (ToolstackError, AgentError) as exc:
                left.append(f"step {step.name} not undone: {exc.message}")
    return left
