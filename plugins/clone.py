"""``clone``: begin new domains from a running one, which goes on; they share its memory until they write to it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import NAME_SCHEMA, UUID_SCHEMA, WAIT_SCHEMA, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from agent.cloning import CloneStep, DropStep, RunStep, clones_of
from agent.from_template import OverlayStep
from agent.snapshots import GoOnStep, TemplateStep, going_on
from agent.steps import ClaimStep, StartStep

MAX_CLONES = 64


class Clone(Plugin):
    verb = "clone"
    summary = "Begin new domains from a running one, memory and disks shared copy-on-write; it goes on."
    step_kinds = (ClaimStep, OverlayStep, TemplateStep, GoOnStep, StartStep, CloneStep, RunStep, DropStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "names"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "names": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_CLONES,
                "uniqueItems": True,
                "items": NAME_SCHEMA,
                "description": "Of the new domains, one for each.",
            },
            "start": {"type": "boolean", "default": True, "description": "Let them run; otherwise they stay paused."},
            "wait_seconds": {**WAIT_SCHEMA, "description": "What the guest has to suspend."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info, names, ident = own_domain(host, args["uuid"]), args["names"], str(uuid.uuid4())
        spec, template = host.toolstack.get_spec(info.uuid), f"clone-{ident}"
        clones, items = clones_of(spec, names, template, ident, host)
        uuids = [clone["uuid"] for clone in clones]
        steps: list[Step] = [ClaimStep(uuids[0], info.memory_mib * len(names), info.vcpus * len(names))]
        # Nothing may write to the images below the clones' overlays: then it goes on with overlays of its own.
        writes = bool(items)
        overlays, go_on = going_on(spec, host, template, ident, ident[:8])
        steps += [OverlayStep([*items, *overlays[0].items])] if writes else []
        steps.append(TemplateStep(info.uuid, template, ident, not writes, args.get("wait_seconds", 60)))
        steps += [go_on, StartStep(info.uuid)] if writes else []
        steps.append(CloneStep(template, ident, clones))
        if args.get("start", True):
            steps.append(RunStep(uuids))
        steps.append(DropStep(template, ident))
        return Plan(tuple(steps), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        names = set(args["names"])
        clones = [domain.to_json() for domain in ctx.host.toolstack.list_domains() if domain.name in names]
        stood, left = (
            ctx.outputs.get("template", {}).get("downtime_ms", 0.0),
            ctx.outputs.get("drop", {}).get("left", ""),
        )
        return {"domains": clones, "downtime_ms": stood, "template_left": left}
