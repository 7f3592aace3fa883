"""Steps of `clone`: of one template domains are begun, let run, and the template goes again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Step, TooLate, own_domain
from agent.from_template import image_size, missing_disks, missing_nics
from agent.images.remote.disks import Place
from agent.images.remote.steps import sources_of
from hypervisor.errors import DomainNotFound, NameInUse, TemplateNotFound, ToolstackError
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, TemplateInfo
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec

LOG = logging.getLogger(__name__)

MARK = "reeve.clone"
"""Metadata that proves which instruction made a clone."""


@dataclasses.dataclass(frozen=True)
class CloneStep(Step):
    """:ivar ident: of the template.

    :ivar clones: of each ``uuid``, ``name``, and the JSON forms of its ``disks`` and ``nics``.
    """

    name: ClassVar[str] = "clone"
    title: ClassVar[str] = "build the new domains from it, paused"

    template: str
    ident: str
    clones: list[JsonDict]

    def run(self, ctx: Context) -> JsonDict | None:
        info = ctx.host.toolstack.template_get(self.template)
        if info.ident != self.ident:
            raise TemplateNotFound(f"template {self.template!r} is another one by now: look at `reeve template list`")
        there = {domain.uuid for domain in self._mine(ctx)}
        for clone in self.clones:
            if clone["uuid"] not in there:
                ctx.host.toolstack.clone(self.template, self._spec(ctx, info.spec, clone))
        return None

    def check(self, ctx: Context) -> Check:
        return Check.DONE if len(list(self._mine(ctx))) == len(self.clones) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        for domain in list(self._mine(ctx)):
            with contextlib.suppress(DomainNotFound):
                ctx.host.toolstack.destroy(domain.uuid)

    def _spec(self, ctx: Context, known: DomainSpec, clone: JsonDict) -> DomainSpec:
        return dataclasses.replace(
            known,
            uuid=clone["uuid"],
            name=clone["name"],
            owner=ctx.host.owner,
            disks=tuple(DiskSpec.from_json(disk) for disk in clone["disks"]),
            nics=tuple(NicSpec.from_json(nic) for nic in clone["nics"]),
            metadata=((MARK, ctx.instruction),),
        )

    def _mine(self, ctx: Context) -> Iterator[DomainInfo]:
        wanted = {clone["uuid"] for clone in self.clones}
        for domain in ctx.host.toolstack.list_domains():
            if domain.uuid in wanted and domain.owner == ctx.host.owner and (MARK, ctx.instruction) in domain.metadata:
                yield domain


@dataclasses.dataclass(frozen=True)
class RunStep(Step):
    """What it changes goes with the domains, when they are taken away."""

    name: ClassVar[str] = "run"
    title: ClassVar[str] = "let them run"
    changes: ClassVar[bool] = False

    uuids: list[str]

    def run(self, ctx: Context) -> JsonDict | None:
        for ident in self.uuids:
            own_domain(ctx.host, ident)
            ctx.host.toolstack.unpause(ident)
        return None

    def check(self, ctx: Context) -> Check:
        states = {ctx.host.toolstack.get_domain(ident).state for ident in self.uuids}
        if DomainState.UNKNOWN in states:
            return Check.UNKNOWN
        return Check.NOT_DONE if DomainState.PAUSED in states else Check.DONE


@dataclasses.dataclass(frozen=True)
class DropStep(Step):
    """The last one of its plan. Memory that domains run on stays until they have ended.

    It does not fail: without its template the plan could not be taken back any more, and the domains are there.
    """

    name: ClassVar[str] = "drop"
    title: ClassVar[str] = "remove the template; what is shared of it stays"
    commits: ClassVar[bool] = True

    template: str
    ident: str

    def run(self, ctx: Context) -> JsonDict | None:
        try:
            if not self._gone(ctx):
                ctx.host.toolstack.template_remove(self.template, force=True)
        except ToolstackError as exc:
            LOG.warning("template %s stays: %s", self.template, exc)
            return {"left": self.template}
        return None

    def check(self, ctx: Context) -> Check:
        return Check.DONE if self._gone(ctx) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        if self._gone(ctx):
            raise TooLate({})

    def _gone(self, ctx: Context) -> bool:
        try:
            return ctx.host.toolstack.template_get(self.template).ident != self.ident
        except TemplateNotFound:
            return True


def clones_of(
    spec: DomainSpec, names: Sequence[str], template: str, ident: str, host: Host
) -> tuple[list[JsonDict], list[JsonDict]]:
    """Of a domain's future clones what `CloneStep` takes, and the items of an `OverlayStep` for their disks.

    :raises NameInUse. :raises InstructionError: an image cannot be read, or only by this domain, there is no folder for
        overlays, or a nic may send from addresses of its own only.
    """
    taken = {domain.name: domain.uuid for domain in host.toolstack.list_domains()}
    for name in names:
        if name in taken:
            raise NameInUse(f"the name {name!r} belongs to domain {taken[name]}: give another name")
    if alone := [disk.id for disk in spec.disks if disk.readonly and not disk.shared]:
        raise InstructionError(
            "image.in_use",
            f"disk {alone[0]} of domain {spec.uuid} is attached for it alone: detach it and attach it shared, and each"
            " clone reads it, too",
        )
    info = TemplateInfo(template, ident, spec)
    read, written = missing_disks(info, ())
    clones, items = [], list[dict[str, Any]]()
    for name in names:
        domain, disks = str(uuid.uuid4()), list(read)
        for disk in written:
            path = str(sources_of(host).disks.path(domain, disk.id, DiskFormat.QCOW2))
            size = image_size(disk)
            place = Place(domain, disk.id, path, "overlay", DiskFormat.QCOW2, size, True, disk.format.value)
            items.append({"place": dataclasses.asdict(place), "base": disk.path})
            disks.append(dataclasses.replace(disk, path=path, format=DiskFormat.QCOW2))
        disks.sort(key=lambda disk: disk.id)
        nics = missing_nics(info, ())
        clones.append(
            {
                "uuid": domain,
                "name": name,
                "disks": [disk.to_json() for disk in disks],
                "nics": [nic.to_json() for nic in nics],
            }
        )
    return clones, items
