"""What a request says of a config drive: its schema, and what it comes to for a domain."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from agent.api import METADATA_SCHEMA
from agent.configdrive.content import MAX_KEYS, MAX_USER_DATA, ConfigDriveFormat, FirstBoot, GuestNetwork, documents
from agent.configdrive.drives import Drives
from agent.errors import InstructionError
from hypervisor.toolstack.devices import MAX_NICS, DiskSpec, NicSpec

_ADDRESSES: Mapping[str, Any] = {"type": "array", "maxItems": 16, "items": {"type": "string", "maxLength": 49}}
_NETWORK_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["nic"],
    "properties": {
        "nic": {"type": "integer", "minimum": 0, "maximum": MAX_NICS - 1},
        "addresses": _ADDRESSES,
        "gateways": {**_ADDRESSES, "maxItems": 2},
        "dns": _ADDRESSES,
    },
}
CONFIG_DRIVE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "format": {"type": "string", "enum": [item.value for item in ConfigDriveFormat], "default": "nocloud"},
        "id": {"type": "string", "pattern": "^xvd[a-p]$"},
        "hostname": {"type": "string", "minLength": 1, "maxLength": 253},
        "ssh_keys": {"type": "array", "maxItems": MAX_KEYS, "items": {"type": "string", "maxLength": 16384}},
        "user_data": {"type": "string", "maxLength": MAX_USER_DATA},
        "metadata": {**METADATA_SCHEMA, "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}},
        "networks": {"type": "array", "maxItems": MAX_NICS, "items": _NETWORK_SCHEMA},
    },
    "description": "A disk from which cloud-init configures the guest: format, id, hostname, ssh_keys, user_data, "
    "metadata, networks.",
}


def first_boot(args: Mapping[str, Any], domain: str, name: str, nics: Sequence[NicSpec]) -> FirstBoot:
    """What the guest is told.

    :param args: as `CONFIG_DRIVE_SCHEMA` has it.
    :param domain: its UUID; `name` is the host name if there is no other.
    :param nics: those without a network in `args` are set up by DHCP.
    :raises InstructionError: it makes no sense, by itself or for these nics.
    """
    networks: dict[int, Mapping[str, Any]] = {}
    for item in args.get("networks", ()):
        if item["nic"] in networks:
            raise _bad(f"two networks are for nic {item['nic']}: give one with all its addresses")
        networks[item["nic"]] = item
    if unknown := sorted(set(networks) - {nic.id for nic in nics}):
        raise _bad(f"a network is for nic {unknown[0]}, which the domain has not: correct nic, or give one in nics")
    first = FirstBoot(
        instance_id=domain,
        hostname=args.get("hostname", name.replace("_", "-")),
        ssh_keys=tuple(args.get("ssh_keys", ())),
        user_data=args.get("user_data", ""),
        networks=tuple(_network(nic, networks.get(nic.id, {})) for nic in nics),
        metadata=tuple(sorted(args.get("metadata", {}).items())),
    )
    first.validate()
    return first


def _network(nic: NicSpec, wanted: Mapping[str, Any]) -> GuestNetwork:
    lists = {field: tuple(wanted.get(field, ())) for field in ("addresses", "gateways", "dns")}
    for address in lists["addresses"]:
        if nic.addresses and address.partition("/")[0] not in nic.addresses:
            raise _bad(f"nic {nic.id} may not send from {address}: give the address in the nic's addresses, too")
    return GuestNetwork(nic.mac, **lists)


def drive_files(args: Mapping[str, Any], first: FirstBoot) -> tuple[str, dict[str, bytes]]:
    """The drive's label and its files. :raises InstructionError: see `FirstBoot.validate`."""
    form = ConfigDriveFormat(args.get("format", ConfigDriveFormat.NOCLOUD))
    return form.label, documents(first, form)


def drive_disk(args: Mapping[str, Any], drives: Drives, domain: str, disks: Sequence[Mapping[str, Any]]) -> DiskSpec:
    """The drive as a disk of the domain: read-only, with the last id that none of `disks` has.

    :raises InstructionError: there is none left.
    """
    taken = {disk["id"] for disk in disks}
    free = [f"xvd{letter}" for letter in string.ascii_lowercase[:16] if f"xvd{letter}" not in taken]
    ident = args.get("id") or (free or [""])[-1]
    if not ident:
        raise _bad("the domain has as many disks as it can have: leave one out")
    return DiskSpec(ident, str(drives.path(domain)), readonly=True, discard=False)


def _bad(text: str) -> InstructionError:
    return InstructionError("instruction.bad_args", f"args.config_drive: {text}")
