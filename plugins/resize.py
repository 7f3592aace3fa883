"""``resize``: more or fewer vCPUs and memory, larger disks, another share of the CPU; live, or by a restart.

Live, each thing that can fail comes before the ones that can be taken back least: the share of the CPU, vCPUs,
memory (the guest must give it), and last the disks, which never become smaller again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    MAX_MEMORY_MIB,
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
from agent.resizing import (
    SIZES,
    Pending,
    RedefineStep,
    RestartStep,
    SettleStep,
    check_least,
    cold_steps,
    held_mib,
    sizes,
    without_pending,
)
from agent.steps import ClaimStep
from hypervisor.errors import (
    DeviceNotFound,
    DomainNotFound,
    OperationTimeout,
    SpecInvalid,
    WrongState,
)
from hypervisor.toolstack.api import MAX_VCPUS, DomainInfo, DomainSpec, DomainState
from hypervisor.toolstack.devices import MAX_DISK_BYTES, SECTOR

SLACK_MIB = 1
"""How far from its target a balloon may stay: a guest counts pages, we count MiB."""


@dataclasses.dataclass(frozen=True)
class ScheduleStep(Step):
    """:ivar weight, cap: see `DomainSpec`; `old_weight`, `old_cap` what they were."""

    name: ClassVar[str] = "schedule"
    title: ClassVar[str] = "set its share of the CPU"

    uuid: str
    weight: int
    cap: int
    old_weight: int
    old_cap: int

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.set_scheduling(self.uuid, self.weight, self.cap)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE  # setting it again changes nothing

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound, WrongState):  # ended: nothing is left to put back
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.set_scheduling(self.uuid, self.old_weight, self.old_cap)


@dataclasses.dataclass(frozen=True)
class VcpusStep(Step):
    """:ivar seconds: what the guest has to follow; `old`: how many there were."""

    name: ClassVar[str] = "vcpus"
    title: ClassVar[str] = "have the guest take vCPUs on or off line"

    uuid: str
    vcpus: int
    old: int
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.set_vcpus(self.uuid, self.vcpus)
        if not ctx.poll(lambda _left: self._followed(ctx), self.seconds):
            now = ctx.host.toolstack.get_domain(self.uuid).vcpus
            raise OperationTimeout(
                f"domain {self.uuid} has {now} vCPUs online and not {self.vcpus} after {self.seconds:g} s: wait "
                "longer, or see that its guest brings added CPUs on line (Linux: a udev rule)"
            )
        return {"vcpus": self.vcpus}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE  # asking again changes nothing, and the wait may not be over

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound, WrongState):  # ended: nothing is left to put back
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.set_vcpus(self.uuid, self.old)

    def _followed(self, ctx: Context) -> bool:
        now = _running(ctx, self.uuid).vcpus
        ctx.progress(abs(now - self.old), abs(self.vcpus - self.old), "vCPUs")
        return now == self.vcpus


@dataclasses.dataclass(frozen=True)
class MemoryStep(Step):
    """:ivar memory_mib: MiB; `old` likewise. `seconds`: what the guest has to follow."""

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "move the balloon's target and wait for the guest"

    uuid: str
    memory_mib: int
    old: int
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.set_memory(self.uuid, self.memory_mib)
        if not ctx.poll(lambda _left: self._followed(ctx), self.seconds):
            now = ctx.host.toolstack.get_domain(self.uuid).memory_mib
            raise OperationTimeout(
                f"domain {self.uuid} has {now} MiB and not {self.memory_mib} after {self.seconds:g} s: its guest "
                "cannot give more, or has no balloon driver; ask for more memory, or wait longer"
            )
        return {"memory_mib": self.memory_mib}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE  # asking again changes nothing, and the wait may not be over

    def undo(self, ctx: Context) -> None:
        # The claim still holds what the guest gave back: nobody else has it.
        with contextlib.suppress(DomainNotFound, WrongState):  # ended: nothing is left to put back
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.set_memory(self.uuid, self.old)

    def _followed(self, ctx: Context) -> bool:
        now = _running(ctx, self.uuid).memory_mib
        ctx.progress(min(abs(now - self.old), abs(self.memory_mib - self.old)), abs(self.memory_mib - self.old), "MiB")
        return now <= self.memory_mib + SLACK_MIB if self.memory_mib < self.old else now >= self.memory_mib - SLACK_MIB


@dataclasses.dataclass(frozen=True)
class DisksStep(Step):
    """The last step: it cannot be undone.

    :ivar disks: id, size before and size to be, bytes.
    """

    name: ClassVar[str] = "disks"
    title: ClassVar[str] = "make disks larger"

    uuid: str
    disks: list[list[Any]]

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        for number, (ident, _old, size) in enumerate(self.disks):
            ctx.progress(number, len(self.disks), "disks")
            ctx.host.toolstack.resize_disk(self.uuid, ident, size)
        ctx.progress(len(self.disks), len(self.disks), "disks")
        return {"disks": {ident: size for ident, _old, size in self.disks}}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE  # a disk that has its size already stays as it is

    def undo(self, ctx: Context) -> None:
        """:raises InstructionError: ``resize.disk_grown``: a disk has grown, and cannot be made smaller."""
        with contextlib.suppress(DomainNotFound):
            have = _disk_sizes(ctx.host, self.uuid)
            grown = [ident for ident, old, _size in self.disks if have.get(ident, 0) > old]
            if grown:
                raise InstructionError(
                    "resize.disk_grown", f"disks {', '.join(grown)} have grown and stay so: no disk is made smaller"
                )


class Resize(Plugin):
    verb = "resize"
    summary = "Change a domain's vCPUs, memory, disks and share of the CPU."
    step_kinds = (ClaimStep, ScheduleStep, VcpusStep, MemoryStep, RedefineStep, RestartStep, SettleStep, DisksStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "vcpus": {"type": "integer", "minimum": 1, "maximum": MAX_VCPUS, "description": "vCPUs online."},
            "memory_mib": {"type": "integer", "minimum": 1, "maximum": MAX_MEMORY_MIB, "description": "Memory, MiB."},
            "max_vcpus": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_VCPUS,
                "description": "Most vCPUs it may ever have; needs a restart.",
            },
            "max_memory_mib": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_MEMORY_MIB,
                "description": "Most memory it may ever have, MiB; needs a restart.",
            },
            "weight": {"type": "integer", "minimum": 1, "maximum": 65535, "description": "As for create."},
            "cap": {"type": "integer", "minimum": 0, "maximum": 100 * MAX_VCPUS, "description": "As for create."},
            "disks": {
                "type": "object",
                "maxProperties": 16,
                "propertyNames": {"pattern": "^xvd[a-p]$"},
                "additionalProperties": {"type": "integer", "minimum": SECTOR, "maximum": MAX_DISK_BYTES},
                "description": "Sizes in bytes by disk id, none smaller than it is.",
            },
            "mode": {
                "type": "string",
                "enum": ["live", "cold", "auto"],
                "default": "live",
                "description": "live: while it runs, or not at all; cold: by a restart; auto: by a restart if need be.",
            },
            "wait_seconds": {**WAIT_SCHEMA, "description": "Seconds the guest has to follow, for each thing."},
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Cold: end a guest that does not stop in time, or that is paused.",
            },
            "confirm": {
                "type": "boolean",
                "default": True,
                "description": "Cold: keep the old size until confirm_resize; false: there is no way back.",
            },
            "confirm_seconds": {
                "type": "integer",
                "minimum": 0,
                "maximum": 31536000,
                "description": "Cold: it counts as confirmed after so long; 0: never by itself.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        now = host.toolstack.get_spec(info.uuid)
        _check_state(info)
        disks = _larger_disks(args.get("disks", {}), host, info.uuid)
        new = _wanted(args, info, now)
        cold = args.get("mode") == "cold" or (args.get("mode") == "auto" and _beyond(args, info, new) != "")
        seconds = float(args.get("wait_seconds", 60))
        more = ClaimStep(
            info.uuid, max(held_mib(info), now.memory_mib, new.memory_mib), max(info.vcpus, now.vcpus, new.vcpus)
        )
        steps: list[Step] = []
        if cold and sizes(new) != sizes(now):
            if info.state is DomainState.PAUSED and not args.get("force", False):
                raise WrongState(f"domain {info.uuid} is paused and cannot stop by itself: unpause it, or give force")
            new = _noted(args, host, info, now, new)
            steps += [more, *cold_steps(info, now, new, seconds=seconds, force=bool(args.get("force", False)))]
        elif not cold:
            if beyond := _beyond(args, info, new):
                raise SpecInvalid(f"{beyond}: ask for less, or give mode cold (the domain is restarted then)")
            live = _live_steps(host, info, now, new, seconds)
            steps += [more, *live] if live else []
        if disks:
            steps.append(DisksStep(info.uuid, disks))
        return Plan(tuple(steps), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        info = ctx.host.toolstack.get_domain(plan.domain)
        pending = Pending.of(info.metadata)
        result: JsonDict = {
            "domain": info.to_json(),
            "mode": "cold" if any(isinstance(step, RestartStep) for step in plan.steps) else "live",
            "pending": dataclasses.asdict(pending) if pending else None,
        }
        if any(isinstance(step, DisksStep) for step in plan.steps):
            result["disks"] = _disk_sizes(ctx.host, plan.domain)
        return result


def _check_state(info: DomainInfo) -> None:
    pending = Pending.of(info.metadata)
    if pending is not None and pending.open():
        raise InstructionError(
            "resize.pending", f"domain {info.uuid} has a cold resize that is open: send confirm_resize or revert_resize"
        )
    if info.state not in (DomainState.RUNNING, DomainState.PAUSED):
        raise WrongState(f"domain {info.uuid} is {info.state.value}: only one that runs can be resized")


def _wanted(args: Mapping[str, Any], info: DomainInfo, now: DomainSpec) -> DomainSpec:
    """The spec with what `args` asks for. :raises SpecInvalid: it does not fit together."""
    wanted = sizes(now) | {name: args[name] for name in SIZES if name in args}
    # A maximum that was not asked for gives way; one that was does not.
    if "max_vcpus" not in args:
        wanted["max_vcpus"] = max(wanted["max_vcpus"], wanted["vcpus"])
    if "max_memory_mib" not in args:
        wanted["max_memory_mib"] = max(wanted["max_memory_mib"], wanted["memory_mib"])
    new = dataclasses.replace(without_pending(now), **wanted)
    new.validate()
    return new


def _beyond(args: Mapping[str, Any], info: DomainInfo, new: DomainSpec) -> str:
    """Why this cannot be done while it runs; "" when it can."""
    for name, unit in (("vcpus", ""), ("memory_mib", " MiB")):
        most, wanted, now = getattr(info, f"max_{name}"), getattr(new, name), getattr(info, name)
        if most and wanted > most and wanted != now:
            return f"{name} is {wanted}: in its present run the domain can have {most}{unit} at most"
        asked = args.get(f"max_{name}", most)
        if most and asked != most:
            return f"max_{name} is {asked}: in its present run the domain has {most}{unit}"
    return ""


def _live_steps(host: Host, info: DomainInfo, now: DomainSpec, new: DomainSpec, seconds: float) -> list[Step]:
    steps: list[Step] = []
    if (new.weight, new.cap) != (now.weight, now.cap):
        steps.append(ScheduleStep(info.uuid, new.weight, new.cap, now.weight, now.cap))
    if new.vcpus != info.vcpus or new.vcpus != now.vcpus:
        steps.append(VcpusStep(info.uuid, new.vcpus, now.vcpus, seconds))
    old = info.memory_target_mib or now.memory_mib
    if new.memory_mib != old:
        if new.memory_mib < old:
            check_least(host, info, new.memory_mib)
        steps.append(MemoryStep(info.uuid, new.memory_mib, old, seconds))
    if info.state is DomainState.PAUSED and any(not isinstance(step, ScheduleStep) for step in steps):
        raise WrongState(f"domain {info.uuid} is paused and its guest cannot follow: unpause it")
    return steps


def _larger_disks(wanted: Mapping[str, int], host: Host, uuid: str) -> list[list[Any]]:
    """Id, old and new size of each disk that is to grow.

    :raises DeviceNotFound, SpecInvalid: no such disk, or it would have to shrink.
    """
    if not wanted:
        return []
    there = {device.id: device for device in host.toolstack.list_devices(uuid) if device.kind == "disk"}
    grown: list[list[Any]] = []
    for ident, size in sorted(wanted.items()):
        device = there.get(ident)
        if device is None:
            raise DeviceNotFound(f"domain {uuid} has no disk {ident}: it has {', '.join(there) or 'none'}")
        if size % SECTOR:
            raise SpecInvalid(f"disk {ident}: {size} bytes are no whole sectors: give a multiple of {SECTOR}")
        if size < device.size_bytes:
            raise SpecInvalid(f"disk {ident} has {device.size_bytes} bytes, not {size}: a disk cannot be made smaller")
        if size > device.size_bytes:
            if device.spec.get("readonly"):
                raise SpecInvalid(f"disk {ident} is read-only: attach it writable to make it larger")
            grown.append([ident, device.size_bytes, size])
    return grown


def _noted(args: Mapping[str, Any], host: Host, info: DomainInfo, now: DomainSpec, new: DomainSpec) -> DomainSpec:
    """`new`, with the way back in its metadata if one is wanted."""
    if not args.get("confirm", True):
        return new
    after = args.get("confirm_seconds", int(host.settings.get("resize_confirm_seconds") or 0))
    since = time.time()
    return Pending(since, since + after if after else 0.0, sizes(now)).applied(new)


def _disk_sizes(host: Host, uuid: str) -> dict[str, int]:
    return {device.id: device.size_bytes for device in host.toolstack.list_devices(uuid) if device.kind == "disk"}


def _running(ctx: Context, uuid: str) -> DomainInfo:
    """:raises WrongState: the guest has ended; it will not follow."""
    info = ctx.host.toolstack.get_domain(uuid)
    if info.state in (DomainState.SHUTDOWN, DomainState.CRASHED):
        raise WrongState(f"domain {uuid} ended meanwhile ({info.state.value})")
    return info
