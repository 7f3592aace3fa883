"""Steps that several verbs take: claim, attach, wait for a device, detach, let a domain run on."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Step, own_domain
from hypervisor.errors import DeviceExists, DeviceNotFound, DomainNotFound, HostFailure, OperationTimeout, Unsupported
from hypervisor.toolstack.api import DomainState, Toolstack
from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskSpec, NicSpec

DETACH_CHUNK = 5.0
"""Seconds of one call of the driver: between two of them the agent can be stopped."""


def template_images(toolstack: Toolstack) -> set[str]:
    """Images on which guests of templates come back: they are needed, whatever becomes of the domains.

    :raises ToolstackError: nobody can tell.
    """
    try:
        return {disk.path for template in toolstack.template_list() for disk in template.spec.disks}
    except Unsupported:
        return set()


@dataclasses.dataclass(frozen=True)
class ClaimStep(Step):
    """:ivar memory_mib: what the domain is to have in all, MiB; `vcpus` likewise."""

    name: ClassVar[str] = "claim"
    title: ClassVar[str] = "set memory and vCPUs aside"

    domain: str
    memory_mib: int
    vcpus: int

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.host.claims.take(ctx.instruction, self.domain, self.memory_mib, self.vcpus)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.DONE if ctx.host.claims.holds(ctx.instruction) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        ctx.host.claims.release(ctx.instruction)


@dataclasses.dataclass(frozen=True)
class AttachStep(Step):
    """:ivar kind: ``disk`` or ``nic``; `spec`: its JSON form."""

    name: ClassVar[str] = "attach"
    title: ClassVar[str] = "attach the device"

    uuid: str
    kind: str
    spec: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        return attach(ctx.host, self.uuid, self.kind, self.spec).to_json()

    def check(self, ctx: Context) -> Check:
        # Not done also when it is: the driver takes it quietly, and the step's output is made by running it.
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        # The plan was made when there was no such device, and instructions of one domain do not overlap.
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            found = find_device(ctx.host, self.uuid, self.kind, str(self.spec["id"]))
            if found is not None and dict(found.spec) == self.spec:
                ctx.host.toolstack.detach_device(self.uuid, self.kind, found.id, DETACH_CHUNK, force=True)


@dataclasses.dataclass(frozen=True)
class ConnectStep(Step):
    """Wait until the guest has taken a device up. One that does not is no failure, a device that failed is."""

    name: ClassVar[str] = "connect"
    title: ClassVar[str] = "wait for the guest to take it up"
    changes: ClassVar[bool] = False

    uuid: str
    kind: str
    id: str
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.poll(lambda _left: self._over(ctx), self.seconds)
        found = find_device(ctx.host, self.uuid, self.kind, self.id)
        if found is None:
            raise DeviceNotFound(f"{self.kind} {self.id} of domain {self.uuid} is gone again: look at the domain")
        if found.state is DeviceState.FAILED:
            raise HostFailure(f"{self.kind} {self.id} of domain {self.uuid} failed: {found.detail or 'see the log'}")
        return found.to_json()

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _over(self, ctx: Context) -> bool:
        if ctx.host.toolstack.get_domain(self.uuid).state is not DomainState.RUNNING:
            return True  # nobody there to take it up
        found = find_device(ctx.host, self.uuid, self.kind, self.id)
        return found is None or found.state in (DeviceState.CONNECTED, DeviceState.FAILED)


@dataclasses.dataclass(frozen=True)
class DetachStep(Step):
    """:ivar spec: JSON form of the device, for putting it back.

    :ivar seconds: what the guest has to let go of it; `force`: then it is taken away.
    """

    name: ClassVar[str] = "detach"
    title: ClassVar[str] = "have the guest let go of it and take it away"

    uuid: str
    kind: str
    spec: JsonDict
    seconds: float
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        end = time.monotonic() + ctx.seconds_left(self.seconds)
        if not ctx.poll(lambda _left: self._detached(ctx, end - time.monotonic()), self.seconds):
            if not self.force:
                raise OperationTimeout(
                    f"the guest of domain {self.uuid} keeps {self.kind} {self.spec['id']} after {self.seconds:g} s: "
                    "unmount it there, wait longer, or give force"
                )
            ctx.host.toolstack.detach_device(self.uuid, self.kind, str(self.spec["id"]), 0.0, force=True)
            return {"forced": True}
        return {"forced": False}

    def check(self, ctx: Context) -> Check:
        try:
            found = find_device(ctx.host, self.uuid, self.kind, str(self.spec["id"]))
        except DomainNotFound:
            return Check.DONE
        return Check.DONE if found is None else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            if find_device(ctx.host, self.uuid, self.kind, str(self.spec["id"])) is None:
                attach(ctx.host, self.uuid, self.kind, self.spec)

    def _detached(self, ctx: Context, left: float) -> bool:
        seconds = max(0.0, min(DETACH_CHUNK, left))
        try:
            ctx.host.toolstack.detach_device(self.uuid, self.kind, str(self.spec["id"]), seconds)
        except OperationTimeout:
            return False
        return True


@dataclasses.dataclass(frozen=True)
class StartStep(Step):
    """The last of a plan that has built a domain."""

    name: ClassVar[str] = "start"
    title: ClassVar[str] = "let it run on"

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.unpause(self.uuid)
        return {"domain": ctx.host.toolstack.get_domain(self.uuid).to_json()}

    def check(self, ctx: Context) -> Check:
        state = ctx.host.toolstack.get_domain(self.uuid).state
        return Check.UNKNOWN if state is DomainState.UNKNOWN else Check.NOT_DONE  # the driver takes it quietly

    def undo(self, ctx: Context) -> None:
        """The step before it takes the domain away."""


def is_here(host: Host, uuid: str) -> bool:
    """Whether there is such a domain, of this agent. :raises ToolstackError: as `own_domain`, but for its absence."""
    try:
        own_domain(host, uuid)
    except DomainNotFound:
        return False
    return True


def find_device(host: Host, uuid: str, kind: str, ident: str) -> DeviceInfo | None:
    for device in host.toolstack.list_devices(uuid):
        if (device.kind, device.id) == (kind, ident):
            return device
    return None


def attach(host: Host, uuid: str, kind: str, spec: Mapping[str, Any]) -> DeviceInfo:
    if kind == "disk":
        return host.toolstack.attach_disk(uuid, DiskSpec.from_json(spec))
    return host.toolstack.attach_nic(uuid, NicSpec.from_json(spec))


def attach_steps(host: Host, uuid: str, device: DiskSpec | NicSpec, seconds: float) -> tuple[Step, ...]:
    """The plan of an attachment; without a step that changes anything when that very device is attached.

    :raises DomainNotFound, NotOurs, SpecInvalid: it cannot be.
    :raises DeviceExists: another device has the id.
    """
    info = own_domain(host, uuid)
    device.validate()
    kind = "disk" if isinstance(device, DiskSpec) else "nic"
    spec = device.to_json()
    connect = ConnectStep(info.uuid, kind, str(device.id), seconds)
    found = find_device(host, info.uuid, kind, str(device.id))
    if found is None:
        return AttachStep(info.uuid, kind, spec), connect
    if dict(found.spec) != spec:
        raise DeviceExists(
            f"{kind} {device.id} is attached to domain {uuid} already, with another spec: detach it or give another id"
        )
    return (connect,)


def detach_steps(
    host: Host, uuid: str, kind: str, ident: str, *, seconds: float, force: bool
) -> tuple[DetachStep, ...]:
    """:raises DomainNotFound, NotOurs, DeviceNotFound: it cannot be."""
    info = own_domain(host, uuid)
    found = find_device(host, info.uuid, kind, ident)
    if found is None:
        there = ", ".join(device.id for device in host.toolstack.list_devices(info.uuid) if device.kind == kind)
        raise DeviceNotFound(f"domain {uuid} has no {kind} {ident}: it has {there or 'none'}")
    return (DetachStep(info.uuid, kind, dict(found.spec), seconds, force),)


def nic_spec(data: Mapping[str, Any], default_id: int) -> NicSpec:
    """A nic as instructions give it: without an id the next free one, without a MAC one of Xen's (00:16:3e)."""
    mac = "00:16:3e:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
    return NicSpec.from_json({"id": default_id, "mac": mac, **data})


def devices_of(host: Host, kind: str, uuid: str) -> list[JsonDict]:
    """The devices of one domain, or of every domain on the host when `uuid` is "".

    :raises DomainNotFound: no such domain.
    """
    domains = [host.toolstack.get_domain(uuid)] if uuid else host.toolstack.list_domains()
    found: list[JsonDict] = []
    for domain in domains:
        try:
            devices = host.toolstack.list_devices(domain.uuid)
        except DomainNotFound:
            if uuid:
                raise
            continue  # it ended while the others were looked at
        about = {"domain": domain.uuid, "name": domain.name, "own": domain.owner == host.owner}
        found += [about | device.to_json() for device in devices if device.kind == kind]
    return found
