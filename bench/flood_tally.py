"""The verb of bench/flood.py: leaves a mark that can be counted. A plugin of its own distribution."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step


@dataclasses.dataclass(frozen=True)
class MarkStep(Step):
    """:ivar n: the instruction's number. :ivar file: where marks are added, never taken away."""

    name: ClassVar[str] = "mark"
    title: ClassVar[str] = "add a mark to the file"

    n: int
    file: str

    def run(self, ctx: Context) -> JsonDict | None:
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, b"%08d\n" % self.n)
        finally:
            os.close(handle)
        return None

    def check(self, ctx: Context) -> Check:
        marks = Path(self.file).read_bytes() if Path(self.file).exists() else b""
        return Check.DONE if b"%08d\n" % self.n in marks else Check.NOT_DONE


class Tally(Plugin):
    verb = "tally"
    summary = "Add a mark to a file."
    step_kinds = (MarkStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["n", "file"],
        "properties": {"n": {"type": "integer"}, "file": {"type": "string"}},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((MarkStep(args["n"], args["file"]),))

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"n": args["n"]}
