"""What a domain that begins from a template takes from it, and the step that makes its disks: overlays on those there.

The images below stay as they are, for all domains of the template: they must not be written to any more.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Step
from agent.images.remote.disks import Place
from agent.images.remote.steps import sources_of
from agent.steps import nic_spec
from hypervisor.toolstack.api import TemplateInfo
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec

_GIVEN = ("image", "kernel", "loader", "ramdisk", "cmdline", "memory_mib", "max_memory_mib", "vcpus", "max_vcpus")
"""What the guest has already."""
_KEPT = ("boot", "memory_mib", "max_memory_mib", "vcpus", "max_vcpus")
_DEFAULTS = ("on_poweroff", "on_reboot", "on_crash", "weight", "cap")
_QCOW2 = struct.Struct(">4sI16xQ")
"""Magic, version, size of the disk."""


@dataclasses.dataclass(frozen=True)
class OverlayStep(Step):
    """:ivar items: of each disk ``place`` (JSON form of a `Place`) and ``base``, the image below it."""

    name: ClassVar[str] = "overlay"
    title: ClassVar[str] = "make its disks, on top of the template's"

    items: list[JsonDict]

    def run(self, ctx: Context) -> JsonDict | None:
        disks = sources_of(ctx.host).disks
        for item in self.items:
            disks.make(Place(**item["place"]), Path(item["base"]), ctx.instruction)
        return None

    def check(self, ctx: Context) -> Check:
        disks = sources_of(ctx.host).disks
        done = all(disks.made_by(Place(**item["place"]), ctx.instruction) for item in self.items)
        return Check.DONE if done else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        for item in self.items:
            sources_of(ctx.host).disks.unmake(Place(**item["place"]), ctx.instruction)


def begin(args: Mapping[str, Any], host: Host, domain: str) -> tuple[JsonDict, tuple[Step, ...]]:
    """Of a domain with ``from_checkpoint``: what of its spec the template says, disks and nics included, and the steps.

    :param args: of ``create``; their disks and nics win. :param domain: its UUID.
    :raises InstructionError: arguments that say what the template says. :raises TemplateNotFound, StreamInvalid.
    """
    if said := [name for name in _GIVEN if name in args]:
        raise InstructionError(
            "instruction.bad_args", f"args.{said[0]}: a domain from a checkpoint has its guest's: leave it out"
        )
    template = host.toolstack.template_get(args["from_checkpoint"])
    known = template.spec.to_json()
    data = {name: known[name] for name in _KEPT} | {name: args.get(name, known[name]) for name in _DEFAULTS}
    disks, items = _disks(args, template, host, domain)
    nics = [nic_spec(nic, index) for index, nic in enumerate(args.get("nics", ()))]
    nics += missing_nics(template, {nic.id for nic in nics})
    data |= {"disks": disks, "nics": [nic.to_json() for nic in nics]}
    return data, (OverlayStep(items),) if items else ()


def missing_nics(template: TemplateInfo, given: Collection[int]) -> list[NicSpec]:
    """Those of the template's guest that are not given, with MACs of their own.

    :raises InstructionError: one may send from addresses of its own only.
    """
    made = []
    for nic in template.spec.nics:
        if nic.id in given:
            continue
        if nic.addresses:
            raise InstructionError(
                "instruction.bad_args",
                f"nics: nic {nic.id} of template {template.name} may send from its own addresses only: give one with"
                " addresses of this domain",
            )
        made.append(dataclasses.replace(nic, mac=nic_spec({}, nic.id).mac))
    return made


def missing_disks(template: TemplateInfo, given: Collection[str]) -> tuple[list[DiskSpec], list[DiskSpec]]:
    """Those of the template's guest that are not given: what all its domains read, and what each needs its own of."""
    missing = [disk for disk in template.spec.disks if disk.id not in given]
    read = [dataclasses.replace(disk, shared=True) for disk in missing if disk.readonly]
    return read, [disk for disk in missing if not disk.readonly]


def _disks(
    args: Mapping[str, Any], template: TemplateInfo, host: Host, domain: str
) -> tuple[list[JsonDict], list[JsonDict]]:
    """JSON forms of the disks, and the items of an `OverlayStep`."""
    disks, items = [dict(disk) for disk in args.get("disks", ())], []
    given = {str(disk.get("id")) for disk in disks} | {str(args.get("config_drive", {}).get("id"))}
    read, written = missing_disks(template, given)
    disks += [disk.to_json() for disk in read]
    for disk in written:
        path = str(sources_of(host).disks.path(domain, disk.id, DiskFormat.QCOW2))
        place = Place(domain, disk.id, path, "overlay", DiskFormat.QCOW2, image_size(disk), True, disk.format.value)
        items.append({"place": dataclasses.asdict(place), "base": disk.path})
        disks.append(dataclasses.replace(disk, path=path, format=DiskFormat.QCOW2).to_json())
    return sorted(disks, key=lambda disk: str(disk.get("id"))), items


def image_size(disk: DiskSpec) -> int:
    """Of the disk that an image holds, bytes. :raises InstructionError: it cannot be read."""
    try:
        with open(disk.path, "rb") as file:
            if disk.format == "raw":
                return file.seek(0, os.SEEK_END)
            magic, _, size = _QCOW2.unpack(file.read(_QCOW2.size))
    except (OSError, struct.error) as exc:
        raise InstructionError("image.not_found", f"disk {disk.id}: {disk.path}: {exc}: give another disk") from exc
    if magic != b"QFI\xfb":
        raise InstructionError("image.invalid", f"disk {disk.id}: {disk.path} is no qcow2 image: give another disk")
    return int(size)
