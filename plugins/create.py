"""``create``: claim resources, verify the image, build the domain paused and marked, let it run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    DISK_SCHEMA,
    FILE_SCHEMA,
    MAX_MEMORY_MIB,
    METADATA_SCHEMA,
    NAME_SCHEMA,
    NIC_SCHEMA,
    UUID_SCHEMA,
    Check,
    Context,
    Host,
    InstructionError,
    JsonDict,
    Plan,
    Plugin,
    Step,
)
from agent.configdrive.request import CONFIG_DRIVE_SCHEMA, drive_disk, first_boot
from agent.configdrive.steps import WriteDriveStep, drives_of
from agent.from_template import OverlayStep, begin
from agent.images.remote.steps import FetchStep, PlaceStep, local_files
from agent.steps import ClaimStep, nic_spec
from hypervisor.errors import DomainExists, DomainNotFound, NameInUse
from hypervisor.toolstack.api import MAX_VCPUS, DomainInfo, DomainSpec, DomainState, OnEvent
from hypervisor.toolstack.devices import MAX_DISKS, MAX_NICS

INSTRUCTION_KEY = "reeve.instruction"
"""Metadata that proves which instruction built a domain; what makes undo safe."""

LOADERS = {"pv-grub": "grub_x86_64", "pv-grub-i386": "grub_i386"}
"""Loaders by name, with the setting that says where each is."""

APPEAR_SECONDS = 60.0
_ON_EVENT = {"enum": [event.value for event in OnEvent]}


@dataclasses.dataclass(frozen=True)
class VerifyStep(Step):
    """:ivar files: path to SHA-256 in hexadecimal."""

    name: ClassVar[str] = "verify"
    title: ClassVar[str] = "verify the image's checksums"
    changes: ClassVar[bool] = False

    image: str
    files: dict[str, str]

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.host.images.verify(self.image, self.files)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


@dataclasses.dataclass(frozen=True)
class BuildStep(Step):
    """:ivar spec: JSON form of the `DomainSpec`, without what only the agent knows.

    :ivar template: name of the template it begins from; "": it boots.
    """

    name: ClassVar[str] = "build"
    title: ClassVar[str] = "build the domain, paused"

    spec: JsonDict
    template: str = ""

    def run(self, ctx: Context) -> JsonDict | None:
        spec = DomainSpec.from_json(self.spec)
        spec = dataclasses.replace(
            spec,
            owner=ctx.host.owner,
            metadata=tuple(sorted((*spec.metadata, (INSTRUCTION_KEY, ctx.instruction)))),
        )
        toolstack = ctx.host.toolstack
        try:
            return (toolstack.clone(self.template, spec) if self.template else toolstack.create(spec)).to_json()
        except DomainExists:
            # An interrupted run of this very step may still be building it on the host.
            info = ctx.poll(lambda _seconds: self._found(ctx), APPEAR_SECONDS)
            if info is None or not self._mine(ctx, info):
                raise
            return dict(info.to_json())

    def check(self, ctx: Context) -> Check:
        info = self._found(ctx)
        if info is None or not self._mine(ctx, info):
            return Check.NOT_DONE
        return Check.UNKNOWN if info.state is DomainState.UNKNOWN else Check.DONE

    def undo(self, ctx: Context) -> None:
        info = self._found(ctx)
        if info is not None and self._mine(ctx, info):
            with contextlib.suppress(DomainNotFound):
                ctx.host.toolstack.destroy(info.uuid)

    def _found(self, ctx: Context) -> DomainInfo | None:
        try:
            return ctx.host.toolstack.get_domain(self.spec["uuid"])
        except DomainNotFound:
            return None

    def _mine(self, ctx: Context, info: DomainInfo) -> bool:
        return info.owner == ctx.host.owner and (INSTRUCTION_KEY, ctx.instruction) in info.metadata


@dataclasses.dataclass(frozen=True)
class StartStep(Step):
    name: ClassVar[str] = "start"
    title: ClassVar[str] = "let it run"
    changes: ClassVar[bool] = False  # what it changes goes with the domain, when the build is undone

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.host.toolstack.unpause(self.uuid)
        return None

    def check(self, ctx: Context) -> Check:
        # Gone raises: a domain that nobody saw running is not reported as a success.
        state = ctx.host.toolstack.get_domain(self.uuid).state
        if state is DomainState.UNKNOWN:
            return Check.UNKNOWN
        return Check.NOT_DONE if state is DomainState.PAUSED else Check.DONE


class Create(Plugin):
    verb = "create"
    summary = "Build a domain and let it run."
    step_kinds = (VerifyStep, ClaimStep, FetchStep, PlaceStep, OverlayStep, WriteDriveStep, BuildStep, StartStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "uuid": {**UUID_SCHEMA, "description": "The domain's UUID; one is made when it is left out."},
            "name": NAME_SCHEMA,
            "memory_mib": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_MEMORY_MIB,
                "description": "Memory at boot, MiB; needed unless from_checkpoint is given.",
            },
            "max_memory_mib": {
                "type": "integer",
                "minimum": 0,
                "maximum": MAX_MEMORY_MIB,
                "default": 0,
                "description": "Most memory it may ever have, MiB; 0: the same as memory_mib.",
            },
            "vcpus": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_VCPUS,
                "default": 1,
                "description": "vCPUs at boot.",
            },
            "max_vcpus": {
                "type": "integer",
                "minimum": 0,
                "maximum": MAX_VCPUS,
                "default": 0,
                "description": "Most vCPUs it may ever have; 0: the same as vcpus.",
            },
            "image": {
                **NAME_SCHEMA,
                "description": "An image of the host's image store; instead of kernel and ramdisk.",
            },
            "kernel": {
                **FILE_SCHEMA,
                "description": "Full path of the kernel on the host, or where it is fetched from.",
            },
            "loader": {
                "type": "string",
                "enum": list(LOADERS),
                "description": "Boot from the first disk by GRUB, with the kernel of its own that is there; instead of "
                "image and kernel. pv-grub-i386 for guests of 32 bits.",
            },
            "from_checkpoint": {
                **NAME_SCHEMA,
                "description": "A template of the host: the domain begins as its guest was, already booted; instead of "
                "image, kernel and loader.",
            },
            "ramdisk": {**FILE_SCHEMA, "description": "The same of the initial ramdisk."},
            "cmdline": {
                "type": "string",
                "maxLength": 1023,
                "description": "Kernel command line; replaces the image's own.",
            },
            "disks": {
                "type": "array",
                "maxItems": MAX_DISKS,
                "items": DISK_SCHEMA,
                "description": "Disks; see attach_disk.",
            },
            "nics": {
                "type": "array",
                "maxItems": MAX_NICS,
                "items": NIC_SCHEMA,
                "description": "Nics; see attach_nic. An id that is left out is the place in this list.",
            },
            "weight": {
                "type": "integer",
                "minimum": 1,
                "maximum": 65535,
                "default": 256,
                "description": "Share of the CPU against others under load.",
            },
            "cap": {
                "type": "integer",
                "minimum": 0,
                "maximum": 100 * MAX_VCPUS,
                "default": 0,
                "description": "Most CPU it gets, percent of one CPU; 0: no cap.",
            },
            "start": {"type": "boolean", "default": True, "description": "Let it run; otherwise it stays paused."},
            "on_poweroff": {**_ON_EVENT, "default": "destroy", "description": "When the guest powers off."},
            "on_reboot": {**_ON_EVENT, "default": "restart", "description": "When the guest reboots."},
            "on_crash": {**_ON_EVENT, "default": "preserve", "description": "When the guest crashes."},
            "config_drive": CONFIG_DRIVE_SCHEMA,
            "metadata": METADATA_SCHEMA,
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        _check_origin(args)
        args = {"uuid": str(uuid.uuid4()), **args}
        args, fetch = local_files(args, host, args["uuid"])
        template = args.get("from_checkpoint", "")
        said, disks = begin(args, host, args["uuid"]) if template else ({}, ())
        args |= {"disks": said.pop("disks")} if template else {}
        steps: list[Step] = []
        boot = {"kernel": args.get("kernel"), "ramdisk": args.get("ramdisk"), "cmdline": args.get("cmdline", "")}
        if "image" in args:
            image = host.images.find(args["image"])
            cmdline = args.get("cmdline", image.cmdline)
            boot = {"kernel": image.kernel, "ramdisk": image.ramdisk, "cmdline": cmdline}
            steps.append(VerifyStep(image.name, dict(image.sha256)))
        elif "loader" in args:
            boot["kernel"] = _loader(args, host)
        taken = ("uuid", "name", "memory_mib", "max_memory_mib", "vcpus", "max_vcpus", "disks", "weight", "cap")
        kept = ("on_poweroff", "on_reboot", "on_crash", "metadata")
        data = {key: args[key] for key in (*taken, *kept) if key in args} | {"boot": boot}
        data |= said
        if not template:
            data["nics"] = [nic_spec(nic, index).to_json() for index, nic in enumerate(args.get("nics", ()))]
        drive = args.get("config_drive")
        if drive is not None:
            disk = drive_disk(drive, drives_of(host), data["uuid"], args.get("disks", ()))
            data["disks"] = [*args.get("disks", ()), disk.to_json()]
        spec = DomainSpec.from_json(data)
        spec.validate()
        _check_free(spec, host)
        steps += (ClaimStep(spec.uuid, spec.memory_mib, spec.vcpus), *fetch, *disks)
        if drive is not None:
            first = first_boot(drive, spec.uuid, spec.name, spec.nics)
            steps.append(WriteDriveStep(spec.uuid, drive.get("format", "nocloud"), first.to_json()))
        steps.append(BuildStep(spec.to_json(), template))
        if args.get("start", True):
            steps.append(StartStep(spec.uuid))
        return Plan(tuple(steps), spec.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        try:
            return {"domain": ctx.host.toolstack.get_domain(plan.domain).to_json()}
        except DomainNotFound:
            return {"domain": {"uuid": plan.domain, "name": args["name"], "state": "gone"}}


def _check_origin(args: Mapping[str, Any]) -> None:
    """:raises InstructionError: not one thing to begin from."""
    if sum(name in args for name in ("image", "kernel", "loader", "from_checkpoint")) != 1:
        text = "args: give exactly one of image, kernel, loader and from_checkpoint"
        raise InstructionError("instruction.bad_args", text)
    if "memory_mib" not in args and "from_checkpoint" not in args:
        raise InstructionError("instruction.bad_args", "args.memory_mib is missing: give the memory at boot, MiB")
    if "ramdisk" in args and "kernel" not in args:
        raise InstructionError("instruction.bad_args", "args: a ramdisk goes with kernel only")


def _loader(args: Mapping[str, Any], host: Host) -> str:
    """Path of GRUB. :raises InstructionError: it is not there, or it would have nothing to boot from."""
    if not args.get("disks"):
        raise InstructionError("instruction.bad_args", "args: a loader boots from a disk: give disks")
    path = host.settings.get(LOADERS[args["loader"]], "")
    if not os.path.isfile(path):
        raise InstructionError(
            "image.not_found",
            f"loader {args['loader']}: {path or 'no path'} is not there: apt-get install grub-xen-host",
        )
    return path


def _check_free(spec: DomainSpec, host: Host) -> None:
    """Refuse a UUID or name in use before anything is claimed; the driver checks again when it builds."""
    for domain in host.toolstack.list_domains():
        if domain.uuid == spec.uuid:
            raise DomainExists(f"a domain with UUID {spec.uuid} exists ({domain.name}): leave uuid out or give another")
        if domain.name == spec.name:
            raise NameInUse(f"the name {spec.name!r} belongs to domain {domain.uuid}: give another name")
