"""``destroy``: end one of our domains now and free what it held."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import ONE_DOMAIN_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from agent.configdrive.steps import RemoveDriveStep, remove_drive_steps
from agent.images.remote.steps import RemoveFilesStep, remove_file_steps
from hypervisor.errors import DomainNotFound


@dataclasses.dataclass(frozen=True)
class DestroyStep(Step):
    name: ClassVar[str] = "destroy"
    title: ClassVar[str] = "end it and free what it held"

    uuid: str
    domain_name: str

    def run(self, ctx: Context) -> JsonDict | None:
        with contextlib.suppress(DomainNotFound):  # it ended by itself since the plan was made: the goal is reached
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.destroy(self.uuid)
        return None

    def check(self, ctx: Context) -> Check:
        try:
            ctx.host.toolstack.get_domain(self.uuid)
        except DomainNotFound:
            return Check.DONE
        return Check.NOT_DONE


class Destroy(Plugin):
    verb = "destroy"
    summary = "End a domain at once, without asking its guest, and free what it held."
    step_kinds = (DestroyStep, RemoveDriveStep, RemoveFilesStep)
    args_schema = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        rest = (*remove_drive_steps(host, info.uuid), *remove_file_steps(host, info.uuid))
        return Plan((DestroyStep(info.uuid, info.name), *rest), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        step = plan.steps[0]
        assert isinstance(step, DestroyStep)
        return {"domain": {"uuid": step.uuid, "name": step.domain_name, "state": "gone"}}
