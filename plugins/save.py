"""``save``: have the guest suspend and write it to a file on the host; the domain is gone then, or goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    NAME_SCHEMA,
    UUID_SCHEMA,
    WAIT_SCHEMA,
    Check,
    Context,
    Host,
    InstructionError,
    JsonDict,
    Plan,
    Plugin,
    Step,
    own_domain,
)
from agent.configdrive.steps import drives_of
from agent.steps import is_here
from hypervisor.errors import HostFailure


@dataclasses.dataclass(frozen=True)
class SaveStep(Step):
    """:ivar path: nothing was there when the plan was made, so that what is there is this step's."""

    name: ClassVar[str] = "save"
    title: ClassVar[str] = "have the guest suspend and write it to a file"

    uuid: str
    path: str
    keep_running: bool
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        except OSError as exc:
            raise HostFailure(f"{os.path.dirname(self.path)} cannot be made: {exc.strerror}: give save_dir") from exc
        drives_of(ctx.host).keep_for(self.uuid, self.path)
        seconds = ctx.seconds_left(self.seconds)
        saved = ctx.host.toolstack.save(self.uuid, self.path, keep_running=self.keep_running, timeout=seconds)
        return saved.to_json()

    def check(self, ctx: Context) -> Check:
        whole = os.path.lexists(self.path)
        if is_here(ctx.host, self.uuid) and not self.keep_running:
            # Whole, and still here: the host process is about to take it away.
            return Check.UNKNOWN if whole else Check.NOT_DONE
        return Check.DONE if whole else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        if not os.path.lexists(self.path):
            return
        if not is_here(ctx.host, self.uuid):
            ctx.host.toolstack.restore(self.path, owner=ctx.host.owner)
            ctx.host.toolstack.unpause(self.uuid)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class Save(Plugin):
    verb = "save"
    summary = "Save a domain to a file on the host, memory and all."
    step_kinds = (SaveStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "name": {**NAME_SCHEMA, "description": "Of the file, in the folder [agent] save_dir; a new one."},
            "keep_running": {
                "type": "boolean",
                "default": False,
                "description": "A checkpoint: the guest goes on afterwards.",
            },
            "wait_seconds": {**WAIT_SCHEMA, "description": "What the guest has to suspend."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        path = os.path.join(host.settings["save_dir"], args["name"])
        if os.path.lexists(path):
            raise InstructionError("instruction.bad_args", f"args.name: {path} exists: give another name")
        step = SaveStep(info.uuid, path, args.get("keep_running", False), args.get("wait_seconds", 60))
        return Plan((step,), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        step = plan.steps[0]
        assert isinstance(step, SaveStep)
        return {
            "uuid": step.uuid,
            "path": step.path,
            "bytes": os.stat(step.path).st_size,
            **ctx.outputs.get("save", {}),
        }
