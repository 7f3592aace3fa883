"""Steps of templates and snapshots: a guest is kept as a template, and a domain goes on from one as the domain it was.

A snapshot of a domain is a template of it (its memory, and what it was) and its disks as they were at that moment: the
images it wrote to stay as they are from then on, and the domain goes on with overlays on them. To revert is to keep it
as it is now in the same way, and to go on from the snapshot with new overlays. No image is ever removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Step, own_domain
from agent.from_template import OverlayStep, image_size
from agent.images.remote.disks import Place
from agent.steps import is_here
from hypervisor.errors import DomainNotFound, TemplateExists, TemplateNotFound
from hypervisor.toolstack.api import DomainSpec, TemplateInfo
from hypervisor.toolstack.devices import DiskFormat


def check_new(name: str, host: Host) -> None:
    """:raises TemplateExists."""
    with contextlib.suppress(TemplateNotFound):
        host.toolstack.template_get(name)
        raise TemplateExists(f"there is a template {name!r} already: remove it, or give another name")


@dataclasses.dataclass(frozen=True)
class TemplateStep(Step):
    """:ivar ident: made with the plan: a template that has it is this step's."""

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "have the guest suspend and keep it as a template"

    uuid: str
    template: str
    ident: str
    keep_running: bool
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        made = ctx.host.toolstack.template_create(
            self.uuid,
            self.template,
            ident=self.ident,
            keep_running=self.keep_running,
            timeout=ctx.seconds_left(self.seconds),
        )
        return {"downtime_ms": made.downtime_ms}

    def check(self, ctx: Context) -> Check:
        if self._mine(ctx) is None:
            return Check.NOT_DONE
        # Whole, and its domain still here: the host process is about to take it away.
        return Check.UNKNOWN if is_here(ctx.host, self.uuid) and not self.keep_running else Check.DONE

    def undo(self, ctx: Context) -> None:
        made = self._mine(ctx)
        if made is None:
            return
        if not is_here(ctx.host, self.uuid):
            ctx.host.toolstack.clone(self.template, dataclasses.replace(made.spec, owner=ctx.host.owner))
            ctx.host.toolstack.unpause(self.uuid)
        with contextlib.suppress(TemplateNotFound):
            ctx.host.toolstack.template_remove(self.template, force=True)

    def _mine(self, ctx: Context) -> TemplateInfo | None:
        try:
            found = ctx.host.toolstack.template_get(self.template)
        except TemplateNotFound:
            return None
        return found if found.ident == self.ident else None


@dataclasses.dataclass(frozen=True)
class EndStep(Step):
    """:ivar spec: of the domain; by it undo starts it anew, for its memory is lost."""

    name: ClassVar[str] = "end"
    title: ClassVar[str] = "end it as it is; its disks stay"

    uuid: str
    spec: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.destroy(self.uuid)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE if is_here(ctx.host, self.uuid) else Check.DONE

    def undo(self, ctx: Context) -> None:
        if not is_here(ctx.host, self.uuid):
            ctx.host.toolstack.create(DomainSpec.from_json(self.spec))
            ctx.host.toolstack.unpause(self.uuid)


@dataclasses.dataclass(frozen=True)
class GoOnStep(Step):
    """:ivar ident: of the template. :ivar disks: path of the image of each disk that it writes to."""

    name: ClassVar[str] = "go_on"
    title: ClassVar[str] = "build it from the snapshot, on its new disks"

    uuid: str
    template: str
    ident: str
    disks: dict[str, str]

    def run(self, ctx: Context) -> JsonDict | None:
        info = ctx.host.toolstack.template_get(self.template)
        if info.ident != self.ident or info.spec.uuid != self.uuid:
            raise TemplateNotFound(f"template {self.template!r} is another one by now: look at `reeve template list`")
        disks = tuple(
            dataclasses.replace(disk, path=self.disks[disk.id], format=DiskFormat.QCOW2)
            if disk.id in self.disks
            else disk
            for disk in info.spec.disks
        )
        ctx.host.toolstack.clone(self.template, dataclasses.replace(info.spec, owner=ctx.host.owner, disks=disks))
        return None

    def check(self, ctx: Context) -> Check:
        return Check.DONE if is_here(ctx.host, self.uuid) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.destroy(self.uuid)


def going_on(
    spec: DomainSpec, host: Host, template: str, ident: str, mark: str
) -> tuple[tuple[OverlayStep, ...], GoOnStep]:
    """Steps that make new overlays for a domain, and the one that builds it on them.

    :param spec: says which images lie below. :param mark: makes the overlays' names new.
    :raises InstructionError: an image cannot be read, or there is no folder for overlays.
    """
    items, paths = [], {}
    for disk in spec.disks:
        if disk.readonly:
            continue
        if host.sources is None:
            text = f"disk {disk.id}: this agent has no folder for an overlay on it: set [images] disk_dir"
            raise InstructionError("instruction.failed", text)
        disks, what = host.sources.disks, f"{disk.id}-{mark}"
        path = str(disks.path(spec.uuid, what, DiskFormat.QCOW2))
        goes = disks.goes(spec.uuid, disk.path)
        place = Place(spec.uuid, what, path, "overlay", DiskFormat.QCOW2, image_size(disk), goes, disk.format.value)
        items.append({"place": dataclasses.asdict(place), "base": disk.path})
        paths[disk.id] = path
    return ((OverlayStep(items),) if items else ()), GoOnStep(spec.uuid, template, ident, paths)


def snapshot_of(host: Host, uuid: str, name: str) -> TemplateInfo:
    """:raises TemplateNotFound. :raises InstructionError: it is another domain's."""
    found = host.toolstack.template_get(name)
    if found.spec.uuid != uuid:
        raise InstructionError(
            "instruction.bad_args",
            f"args.name: template {name!r} is of domain {found.spec.name} ({found.spec.uuid}): give a snapshot of this"
            " domain, or make a new one of it (`create` with from_checkpoint)",
        )
    return found


def result(uuid: str, host: Host, outputs: Mapping[str, Any]) -> JsonDict:
    """Of both instructions: the domain as it is now, and its disks' images."""
    spec = host.toolstack.get_spec(uuid)
    domain = outputs.get("start", {}).get("domain") or host.toolstack.get_domain(uuid).to_json()
    return {"domain": domain, "disks": {disk.id: disk.path for disk in spec.disks}}
