"""The configuration file of a domain (xl.cfg(5) of Xen 4.17), generated from its spec.

Every end of the guest is ``preserve``: the driver does what the spec says about it, so that a new run is marked before
it runs, and no daemon of ``xl`` waits for each domain (``xl create -e``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from hypervisor.errors import NetworkUnknown, SpecInvalid, Unsupported
from hypervisor.toolstack.api import DomainSpec, DomainType
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec


def render(spec: DomainSpec, networks: Mapping[str, str]) -> str:
    """The text of the file.

    :param networks: of each network's name the bridge that it is.
    :raises SpecInvalid: a text that the file cannot hold. :raises Unsupported: ``xl`` has nothing of the kind.
    :raises NetworkUnknown: a nic's network is not among `networks`.
    """
    values: dict[str, str | int | list[str]] = {
        "name": spec.name,
        "uuid": spec.uuid,
        "type": spec.type.value,
        "kernel": spec.boot.kernel,
        "memory": spec.memory_mib,
        "maxmem": spec.effective_max_memory_mib,
        "vcpus": spec.vcpus,
        "maxvcpus": spec.effective_max_vcpus,
        "cpu_weight": spec.weight,
        "cap": spec.cap,
        "on_poweroff": "preserve",
        "on_reboot": "preserve",
        "on_crash": "preserve",
        "on_watchdog": "preserve",
    }
    if spec.boot.ramdisk is not None:
        values["ramdisk"] = spec.boot.ramdisk
    if spec.boot.cmdline:
        values["cmdline"] = spec.boot.cmdline
    if spec.type is DomainType.HVM:
        values |= {"serial": "pty", "vga": "none", "vnc": 0}
    if spec.disks:
        values["disk"] = [disk(item) for item in spec.disks]
    if spec.nics:
        values["vif"] = [",".join(nic_words(item, networks)) for item in spec.nics]
    return "".join(f"{key} = {_value(key, value)}\n" for key, value in values.items())


def disk(spec: DiskSpec) -> str:
    """One disk as ``xl`` takes it, in a file or for ``block-attach`` (xl-disk-configuration(5)).

    :raises Unsupported: it has limits: block back ends of Xen have none.
    """
    if spec.limits.bytes_per_second or spec.limits.iops:
        raise Unsupported(f"disk {spec.id}: the xl driver cannot limit a disk: leave limits out")
    words = [f"format={spec.format.value}", f"vdev={spec.id}", f"access={'ro' if spec.readonly else 'rw'}"]
    if spec.format is DiskFormat.QCOW2:
        words.append("backendtype=qdisk")
    words.append("discard" if spec.discard else "no-discard")
    if spec.direct:
        words.append("direct-io-safe")
    # The last one takes the rest of the text as it is, commas included.
    return ", ".join([*words, f"target={_plain(f'disk {spec.id}', spec.path)}"])


def nic_words(spec: NicSpec, networks: Mapping[str, str]) -> list[str]:
    """One nic, as ``network-attach`` takes it (xl-network-configuration(5)); a file has them with commas between.

    :raises NetworkUnknown, Unsupported: it cannot be.
    """
    if spec.network not in networks:
        known = ", ".join(sorted(networks)) or "none"
        raise NetworkUnknown(f"nic {spec.id}: network {spec.network!r} is not configured: configured are {known}")
    if spec.queues != 1 or spec.limits.iops:
        raise Unsupported(f"nic {spec.id}: the xl driver sets neither queues nor packets a second: leave them out")
    words = [f"mac={spec.mac}", f"bridge={networks[spec.network]}", f"devid={spec.id}"]
    if spec.limits.bytes_per_second:
        words.append(f"rate={spec.limits.bytes_per_second}B/s")
    if spec.addresses:
        words.append(f"ip={' '.join(spec.addresses)}")
    return words


def _value(key: str, value: str | int | list[str]) -> str:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "[ " + ", ".join(_value(key, item) for item in value) + " ]"
    return '"' + _plain(key, value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(key: str, text: str) -> str:
    """Text without what would end a line or a string of the file."""
    bad = [char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    if bad:
        raise SpecInvalid(f"{key} holds the character {bad[0]!r}: xl's configuration cannot, remove it")
    return text
