"""A domain's configuration as libxl writes it in JSON, and our specs.

libxl's form is libxl_domain_config of Xen's tools/libs/light/libxl_types.idl.
What only Reeve knows goes along under a key of its own, ``reeve``: Xen's tools leave keys alone that they do not know,
and a round trip here loses nothing. Without that key the image is of another toolstack, and what it says is translated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from hypervisor.errors import SpecInvalid, StreamInvalid, StreamUnsupported
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec
from hypervisor.toolstack.spec import DomainSpec, KernelBoot, OnEvent

KEY, FORM = "reeve", 1
NO_KERNEL = "(the saved image named no kernel)"
"""Of a domain that comes from another toolstack's image, which need not say what it was started from: it cannot be
restarted, only saved, restored and destroyed."""

_ACTIONS = {
    "destroy": OnEvent.DESTROY,
    "restart": OnEvent.RESTART,
    "rename_restart": OnEvent.RESTART,
    "preserve": OnEvent.PRESERVE,
    "coredump_destroy": OnEvent.DESTROY,
    "coredump_restart": OnEvent.RESTART,
    "soft_reset": OnEvent.RESTART,
}
_FORMATS = {"raw": DiskFormat.RAW, "qcow2": DiskFormat.QCOW2}
_MIB = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class SavedConfig:
    """What an image says of its domain.

    :ivar spec: what it is made from when it starts anew.
    :ivar vcpus, memory_mib: of the run that was saved; `max_vcpus` and `max_memory_mib` their bounds.
    :ivar pages: that it had; 0: unknown.
    """

    spec: DomainSpec
    vcpus: int
    max_vcpus: int
    memory_mib: int
    max_memory_mib: int
    pages: int = 0

    def named(self, *, owner: str, name: str = "", uuid: str = "") -> SavedConfig:
        """The same for another owner, and under another name. :raises SpecInvalid."""
        spec = dataclasses.replace(self.spec, owner=owner, name=name or self.spec.name, uuid=uuid or self.spec.uuid)
        spec.validate()
        return dataclasses.replace(self, spec=spec)


def write(saved: SavedConfig) -> dict[str, Any]:
    """libxl's form, with our own key."""
    spec = saved.spec
    info: dict[str, Any] = {
        "max_vcpus": saved.max_vcpus,
        "avail_vcpus": list(range(saved.vcpus)),
        "max_memkb": saved.max_memory_mib * _MIB,
        "target_memkb": saved.memory_mib * _MIB,
        "video_memkb": 0,
        "claim_mode": "True",
        "sched_params": {"weight": spec.weight, "cap": spec.cap},
        "kernel": spec.boot.kernel,
        "cmdline": spec.boot.cmdline,
        "type.pv": {},
        "arch_x86": {"msr_relaxed": "False"},
    }
    if spec.boot.ramdisk is not None:
        info["ramdisk"] = spec.boot.ramdisk
    config: dict[str, Any] = {
        "c_info": {"type": "pv", "name": spec.name, "uuid": spec.uuid, "run_hotplug_scripts": "True"},
        "b_info": info,
        "on_poweroff": spec.on_poweroff.value,
        "on_reboot": spec.on_reboot.value,
        "on_crash": spec.on_crash.value,
        "on_soft_reset": "soft_reset",
    }
    if spec.disks:
        config["disks"] = [_disk(disk) for disk in spec.disks]
    if spec.nics:
        config["nics"] = [
            {"devid": nic.id, "mac": nic.mac, "bridge": nic.network, "nictype": "vif"} for nic in spec.nics
        ]
    run = {name: getattr(saved, name) for name in ("vcpus", "max_vcpus", "memory_mib", "max_memory_mib", "pages")}
    config[KEY] = {"form": FORM, "spec": spec.to_json(), "run": run}
    return config


def _disk(disk: DiskSpec) -> dict[str, Any]:
    return {
        "pdev_path": disk.path,
        "vdev": disk.id,
        "format": disk.format.value,
        "readwrite": 0 if disk.readonly else 1,
        "discard_enable": "True" if disk.discard else "False",
    }


def read(config: Mapping[str, Any]) -> SavedConfig:
    """:raises StreamInvalid, StreamUnsupported: it is no PV domain's, or not usable."""
    own = config.get(KEY)
    try:
        return _foreign(config) if own is None else _own(own)
    except SpecInvalid as exc:
        raise StreamInvalid(f"the image's domain configuration is not usable: {exc.message}") from exc


def _own(own: object) -> SavedConfig:
    if not isinstance(own, Mapping):
        _bad(f"{KEY} is no object")
    if own.get("form") != FORM:
        raise StreamUnsupported(f"the image's domain configuration has form {own.get('form')!r}, known is {FORM}")
    spec, run = own.get("spec"), own.get("run")
    if not isinstance(spec, Mapping) or not isinstance(run, Mapping):
        _bad(f"{KEY} lacks spec or run")
    parsed = DomainSpec.from_json(dict(spec))
    parsed.validate()
    numbers = {name: _number(run, name, 0) for name in ("vcpus", "max_vcpus", "memory_mib", "max_memory_mib", "pages")}
    return _checked(SavedConfig(parsed, **numbers))


def _foreign(config: Mapping[str, Any]) -> SavedConfig:
    created, built = _object(config, "c_info"), _object(config, "b_info")
    kind = created.get("type", built.get("type"))
    if kind != "pv":
        raise StreamUnsupported(f"the image is of a domain of type {str(kind)[:20]!r}: only pv is restored here")
    most = _number(built, "max_vcpus", 1)
    available = built.get("avail_vcpus")
    vcpus = len(available) if isinstance(available, list) and 0 < len(available) <= most else most
    max_kib = _number(built, "max_memkb", 0)
    target = _number(built, "target_memkb", max_kib) or max_kib
    memory, max_memory = -(-target // _MIB), -(-max(target, max_kib) // _MIB)
    pv, scheduling = _object(built, "type.pv"), _object(built, "sched_params")
    ramdisk = _text(built, "ramdisk") or _text(pv, "ramdisk")
    boot = KernelBoot(
        kernel=_text(built, "kernel") or _text(pv, "kernel") or NO_KERNEL,
        ramdisk=ramdisk or None,
        cmdline=_text(built, "cmdline") or _text(pv, "cmdline"),
    )
    weight, cap = _number(scheduling, "weight", 256), _number(scheduling, "cap", 0)
    spec = DomainSpec(
        uuid=_text(created, "uuid"),
        name=_text(created, "name"),
        boot=boot,
        memory_mib=memory,
        max_memory_mib=max_memory,
        vcpus=vcpus,
        max_vcpus=most,
        on_poweroff=_ACTIONS.get(_text(config, "on_poweroff"), OnEvent.DESTROY),
        on_reboot=_ACTIONS.get(_text(config, "on_reboot"), OnEvent.RESTART),
        on_crash=_ACTIONS.get(_text(config, "on_crash"), OnEvent.PRESERVE),
        disks=tuple(_foreign_disk(item) for item in _list(config, "disks")),
        nics=tuple(_foreign_nic(item, number) for number, item in enumerate(_list(config, "nics"))),
        weight=weight or 256,
        cap=cap,
    )
    spec.validate()
    return _checked(SavedConfig(spec, vcpus, most, memory, max_memory))


def _foreign_disk(item: object) -> DiskSpec:
    if not isinstance(item, Mapping):
        _bad("a disk is no object")
    kind = _text(item, "format") or "raw"
    if kind not in _FORMATS:
        raise StreamUnsupported(f"a disk of the image has format {kind!r}: raw and qcow2 are known")
    return DiskSpec(
        id=_text(item, "vdev"),
        path=_text(item, "pdev_path"),
        format=_FORMATS[kind],
        readonly=not _number(item, "readwrite", 0),
    )


def _foreign_nic(item: object, number: int) -> NicSpec:
    if not isinstance(item, Mapping):
        _bad("a nic is no object")
    bridge = _text(item, "bridge")
    return NicSpec(id=_number(item, "devid", number), mac=_text(item, "mac").lower(), network=bridge or "default")


def _checked(saved: SavedConfig) -> SavedConfig:
    sizes = dataclasses.replace(
        saved.spec,
        vcpus=saved.vcpus,
        max_vcpus=saved.max_vcpus,
        memory_mib=saved.memory_mib,
        max_memory_mib=saved.max_memory_mib,
    )
    sizes.validate()
    if not 0 <= saved.pages <= saved.max_memory_mib * 256:
        _bad(f"{saved.pages} pages of {saved.max_memory_mib} MiB")
    return saved


def _object(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, Mapping):
        _bad(f"{name} is no object")
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name, [])
    if not isinstance(value, list):
        _bad(f"{name} is no list")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        _bad(f"{name} is no text")
    return value


def _number(data: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = data.get(name, otherwise)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        _bad(f"{name} is no usable number")
    return value


def _bad(why: str) -> NoReturn:
    raise StreamInvalid(f"the image's domain configuration is damaged: {why}; give another")
