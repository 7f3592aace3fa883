"""What a domain is made from: a frozen spec with a JSON form. Part of `hypervisor.toolstack.api`."""

from __future__ import annotations

import dataclasses
import enum
import uuid as uuid_module
from typing import Any

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.devices import DiskSpec, NicSpec, check_devices

MAX_VCPUS = 32
"""Most vCPUs of one domain (the white paper's bound; the legacy vcpu_info slots of shared_info)."""
MAX_NAME = 63


class DomainType(enum.StrEnum):
    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class OnEvent(enum.StrEnum):
    """What happens when a guest ends by itself."""

    DESTROY = "destroy"
    RESTART = "restart"
    PRESERVE = "preserve"


@dataclasses.dataclass(frozen=True, slots=True)
class KernelBoot:
    """Direct kernel boot.

    :ivar kernel: path of an ELF or bzImage kernel on this host.
    :ivar ramdisk: path of an initial ramdisk, or None.
    :ivar cmdline: kernel command line, at most 1023 bytes (MAX_GUEST_CMDLINE - 1).
    """

    kernel: str
    ramdisk: str | None = None
    cmdline: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainSpec:
    """Everything needed to build a domain. Immutable; checked by `validate`.

    :ivar uuid: canonical lower-case text form.
    :ivar name: unique on the host, 1..63 characters of ``[A-Za-z0-9._-]``, starting with a letter or digit.
    :ivar memory_mib: memory at boot, MiB, >= 1.
    :ivar max_memory_mib: static maximum, MiB, >= memory_mib; 0 means the same as memory_mib.
    :ivar vcpus: vCPUs online at boot, 1..32.
    :ivar max_vcpus: most vCPUs, >= vcpus; 0 means the same as vcpus.
    :ivar owner: marker that proves the domain is the agent's (ours); empty means foreign.
    :ivar disks, nics: devices at boot; ids, MACs and unshared paths are unique.
    :ivar weight: share of the CPU against others under load, 1..65535, 256 being usual (credit scheduler).
    :ivar cap: most CPU it gets, percent of one CPU; 0 means no cap.
    """

    uuid: str
    name: str
    boot: KernelBoot
    memory_mib: int
    vcpus: int = 1
    max_vcpus: int = 0
    max_memory_mib: int = 0
    type: DomainType = DomainType.PV
    on_poweroff: OnEvent = OnEvent.DESTROY
    on_reboot: OnEvent = OnEvent.RESTART
    on_crash: OnEvent = OnEvent.PRESERVE
    owner: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    weight: int = 256
    cap: int = 0

    def validate(self) -> None:
        """:raises SpecInvalid: with the field, what is wrong and what would be right."""
        _check_uuid(self.uuid)
        _check_name(self.name)
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise SpecInvalid(f"vcpus is {self.vcpus}: give 1 to {MAX_VCPUS}")
        if self.max_vcpus and not self.vcpus <= self.max_vcpus <= MAX_VCPUS:
            raise SpecInvalid(
                f"max_vcpus is {self.max_vcpus}: give {self.vcpus} (vcpus) to {MAX_VCPUS}, or 0 for vcpus"
            )
        if self.memory_mib < 1:
            raise SpecInvalid(f"memory_mib is {self.memory_mib}: give at least 1")
        if self.max_memory_mib and self.max_memory_mib < self.memory_mib:
            raise SpecInvalid(
                f"max_memory_mib is {self.max_memory_mib}: give at least memory_mib ({self.memory_mib}), or 0"
            )
        if not self.boot.kernel:
            raise SpecInvalid("boot.kernel is empty: give the path of a kernel image")
        if len(self.boot.cmdline.encode()) > 1023:
            raise SpecInvalid("boot.cmdline is longer than 1023 bytes: Xen's start_info holds no more")
        if "\0" in self.boot.cmdline:
            raise SpecInvalid("boot.cmdline holds a NUL byte: remove it")
        check_scheduling(self.weight, self.cap)
        check_devices(self.disks, self.nics)

    @property
    def effective_max_vcpus(self) -> int:
        return self.max_vcpus or self.vcpus

    @property
    def effective_max_memory_mib(self) -> int:
        return self.max_memory_mib or self.memory_mib

    def with_vcpus(self, vcpus: int) -> DomainSpec:
        """So many online; the most it may have stays, also where it was not spelt out."""
        return dataclasses.replace(self, vcpus=vcpus, max_vcpus=max(vcpus, self.effective_max_vcpus))

    def with_memory(self, memory_mib: int) -> DomainSpec:
        """So much memory; the static maximum stays, also where it was not spelt out."""
        most = max(memory_mib, self.effective_max_memory_mib)
        return dataclasses.replace(self, memory_mib=memory_mib, max_memory_mib=most)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["metadata"] = dict(self.metadata)
        data["disks"] = [disk.to_json() for disk in self.disks]
        data["nics"] = [nic.to_json() for nic in self.nics]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DomainSpec:
        """:raises SpecInvalid: for a missing, unknown or ill-typed field."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise SpecInvalid(f"unknown field {unknown[0]!r}: known are {', '.join(sorted(known))}")
        fields = dict(data)
        try:
            fields["boot"] = KernelBoot(**fields["boot"])
            fields["type"] = DomainType(fields.get("type", DomainType.PV))
            for name in ("on_poweroff", "on_reboot", "on_crash"):
                if name in fields:
                    fields[name] = OnEvent(fields[name])
            metadata = fields.get("metadata", {})
            fields["metadata"] = tuple(sorted((str(k), str(v)) for k, v in dict(metadata).items()))
            fields["disks"] = tuple(DiskSpec.from_json(item) for item in fields.get("disks", ()))
            fields["nics"] = tuple(NicSpec.from_json(item) for item in fields.get("nics", ()))
            spec = cls(**fields)
        except (KeyError, TypeError, ValueError) as exc:
            raise SpecInvalid(f"domain spec is not usable: {exc}") from exc
        for name, kind in (
            ("uuid", str),
            ("name", str),
            ("owner", str),
            ("memory_mib", int),
            ("vcpus", int),
            ("max_vcpus", int),
            ("max_memory_mib", int),
            ("weight", int),
            ("cap", int),
        ):
            value = getattr(spec, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise SpecInvalid(f"{name} is {value!r}: give a {'number' if kind is int else 'string'}")
        for name in ("kernel", "cmdline"):
            if not isinstance(getattr(spec.boot, name), str):
                raise SpecInvalid(f"boot.{name} is not a string")
        if spec.boot.ramdisk is not None and not isinstance(spec.boot.ramdisk, str):
            raise SpecInvalid("boot.ramdisk is not a string")
        return spec


def check_scheduling(weight: int, cap: int) -> None:
    """:raises SpecInvalid: out of range."""
    if not 1 <= weight <= 65535:
        raise SpecInvalid(f"weight is {weight}: give 1 to 65535, 256 being usual")
    if not 0 <= cap <= 100 * MAX_VCPUS:
        raise SpecInvalid(f"cap is {cap}: give percent of one CPU, at most {100 * MAX_VCPUS}, or 0 for none")


def _check_uuid(text: str) -> None:
    try:
        canonical = str(uuid_module.UUID(text))
    except (ValueError, AttributeError, TypeError):
        canonical = ""
    if not text or canonical != text:
        raise SpecInvalid(f"uuid {text!r} is not a UUID in canonical form: give one like {uuid_module.UUID(int=1)}")


def _check_name(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not name or len(name) > MAX_NAME or not set(name) <= allowed or not name[0].isalnum():
        raise SpecInvalid(
            f"name {name!r} is not usable: give 1 to {MAX_NAME} letters, digits, '.', '_' or '-', letter or digit first"
        )
