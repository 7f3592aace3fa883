"""``dump_core``: write a guest's memory and registers to a file on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    NAME_SCHEMA,
    UUID_SCHEMA,
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
from hypervisor.errors import HostFailure


@dataclasses.dataclass(frozen=True)
class DumpStep(Step):
    """:ivar path: nothing was there when the plan was made, so that what is there is this step's."""

    name: ClassVar[str] = "dump"
    title: ClassVar[str] = "write memory and registers to a file"

    uuid: str
    path: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        except OSError as exc:
            raise HostFailure(f"{os.path.dirname(self.path)} cannot be made: {exc.strerror}: give core_dir") from exc
        ctx.host.toolstack.dump_core(self.uuid, self.path)
        return None

    def check(self, ctx: Context) -> Check:
        # The driver lets the file appear when it is whole.
        return Check.DONE if os.path.lexists(self.path) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class DumpCore(Plugin):
    verb = "dump_core"
    summary = "Write the guest's memory and registers to a file on the host."
    step_kinds = (DumpStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "name": {**NAME_SCHEMA, "description": "Of the file, in the folder [agent] core_dir; a new one."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        path = os.path.join(host.settings["core_dir"], args["name"])
        if os.path.lexists(path):
            raise InstructionError("instruction.bad_args", f"args.name: {path} exists: give another name")
        return Plan((DumpStep(info.uuid, path),), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        step = plan.steps[0]
        assert isinstance(step, DumpStep)
        return {"uuid": step.uuid, "path": step.path, "bytes": os.stat(step.path).st_size}
