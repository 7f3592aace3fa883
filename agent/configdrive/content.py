"""What a guest learns at its first boot, and the files that say it."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from agent.errors import InstructionError

MAX_USER_DATA = 1 << 20
MAX_KEYS = 64

_HOSTNAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_KEY = re.compile(r"(ssh-[a-z0-9-]+|ecdsa-[a-z0-9-]+|sk-[a-z0-9@.-]+) [A-Za-z0-9+/]+={0,3}( [^\r\n]*)?")


class ConfigDriveFormat(enum.StrEnum):
    NOCLOUD = "nocloud"
    CONFIGDRIVE = "configdrive"

    @property
    def label(self) -> str:
        """The file system's label, by which cloud-init finds the disk."""
        return "cidata" if self is ConfigDriveFormat.NOCLOUD else "config-2"


@dataclasses.dataclass(frozen=True, slots=True)
class GuestNetwork:
    """How the guest sets up one of its nics.

    :ivar mac: which one.
    :ivar addresses: static ones with their prefix length, ``10.0.0.2/24``; empty: DHCP.
    :ivar gateways: of the default routes, at most one for IPv4 and one for IPv6.
    :ivar dns: name servers.
    """

    mac: str
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()

    def validate(self) -> None:
        """:raises InstructionError: an address is none, or no address can reach the gateway."""
        try:
            networks = [ipaddress.ip_interface(item).network for item in self.addresses]
            gateways = [ipaddress.ip_address(item) for item in self.gateways]
            for server in self.dns:
                ipaddress.ip_address(server)
        except ValueError as exc:
            raise _bad(f"network of {self.mac}: {exc}") from None
        if any("/" not in item for item in self.addresses):
            raise _bad(f"network of {self.mac}: give addresses with their prefix length, like 10.0.0.2/24")
        for gateway in gateways:
            if not any(gateway in network for network in networks):
                raise _bad(f"network of {self.mac}: gateway {gateway} is in no network of its addresses")
        if len({gateway.version for gateway in gateways}) != len(gateways):
            raise _bad(f"network of {self.mac}: give one gateway for IPv4 and one for IPv6 at most")


@dataclasses.dataclass(frozen=True, slots=True)
class FirstBoot:
    """:ivar instance_id: the domain's UUID; cloud-init configures anew when it changes.
    :ivar hostname: of the guest.
    :ivar ssh_keys: public keys, one line each, for the image's default user.
    :ivar user_data: cloud-config (``#cloud-config``), a script (``#!``) or another form cloud-init knows; or "".
    :ivar networks: in the order of the nics.
    :ivar metadata: further texts for the guest.
    """

    instance_id: str
    hostname: str
    ssh_keys: tuple[str, ...] = ()
    user_data: str = ""
    networks: tuple[GuestNetwork, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FirstBoot:
        networks = tuple(
            GuestNetwork(item["mac"], tuple(item["addresses"]), tuple(item["gateways"]), tuple(item["dns"]))
            for item in data["networks"]
        )
        return cls(
            data["instance_id"],
            data["hostname"],
            tuple(data["ssh_keys"]),
            data["user_data"],
            networks,
            tuple(sorted(data["metadata"].items())),
        )

    def validate(self) -> None:
        """:raises InstructionError: cloud-init would not take it."""
        if not _HOSTNAME.fullmatch(self.hostname):
            raise _bad(f"hostname {self.hostname!r} is none: give letters, digits and '-', parts joined by '.'")
        if len(self.ssh_keys) > MAX_KEYS:
            raise _bad(f"{len(self.ssh_keys)} SSH keys: give at most {MAX_KEYS}")
        for key in self.ssh_keys:
            if not _KEY.fullmatch(key):
                raise _bad(f"SSH key {key[:40]!r} is no public key: give a line like those of ~/.ssh/*.pub")
        if len(self.user_data.encode()) > MAX_USER_DATA:
            raise _bad(f"user data is longer than {MAX_USER_DATA} bytes: let it fetch the rest")
        if self.user_data and not self.user_data.startswith(("#", "Content-Type:", "MIME-Version:")):
            raise _bad("user data begins with none of '#cloud-config', '#!', 'Content-Type:': cloud-init would skip it")
        for network in self.networks:
            network.validate()
        macs = [network.mac for network in self.networks]
        if len(set(macs)) != len(macs):
            raise _bad("two networks are for the same mac")


def documents(first: FirstBoot, form: ConfigDriveFormat) -> dict[str, bytes]:
    """The disk's files by path. :raises InstructionError: see `FirstBoot.validate`."""
    first.validate()
    return _nocloud(first) if form is ConfigDriveFormat.NOCLOUD else _config_drive(first)


def _nocloud(first: FirstBoot) -> dict[str, bytes]:
    meta: dict[str, Any] = {
        **dict(first.metadata),
        "instance-id": first.instance_id,
        "local-hostname": first.hostname,
        "public-keys": list(first.ssh_keys),
    }
    files = {"meta-data": _json(meta), "user-data": (first.user_data or "#cloud-config\n{}\n").encode()}
    if first.networks:
        ethernets = {f"nic{number}": _netplan(network) for number, network in enumerate(first.networks)}
        files["network-config"] = _json({"version": 2, "ethernets": ethernets})
    return files


def _netplan(network: GuestNetwork) -> dict[str, Any]:
    """One interface in cloud-init's network config version 2; found by its MAC, its name left alone."""
    result: dict[str, Any] = {"match": {"macaddress": network.mac}}
    if network.addresses:
        result["addresses"] = list(network.addresses)
    else:
        result["dhcp4"] = True
    for gateway in network.gateways:
        result[f"gateway{ipaddress.ip_address(gateway).version}"] = gateway
    if network.dns:
        result["nameservers"] = {"addresses": list(network.dns)}
    return result


def _config_drive(first: FirstBoot) -> dict[str, bytes]:
    meta: dict[str, Any] = {
        "uuid": first.instance_id,
        "hostname": first.hostname,
        "name": first.hostname,
        "public_keys": {f"key{number}": key for number, key in enumerate(first.ssh_keys)},
        "meta": dict(first.metadata),
    }
    files = {"openstack/latest/meta_data.json": _json(meta)}
    if first.user_data:
        files["openstack/latest/user_data"] = first.user_data.encode()
    if first.networks:
        files["openstack/latest/network_data.json"] = _json(_network_data(first.networks))
    return files


def _network_data(networks: tuple[GuestNetwork, ...]) -> dict[str, Any]:
    links = [
        {"id": f"nic{n}", "type": "phy", "ethernet_mac_address": item.mac, "vif_id": f"nic{n}", "mtu": None}
        for n, item in enumerate(networks)
    ]
    layers = [layer for number, item in enumerate(networks) for layer in _layers(number, item)]
    servers = sorted({server for item in networks for server in item.dns})
    return {"links": links, "networks": layers, "services": [{"type": "dns", "address": item} for item in servers]}


def _layers(number: int, network: GuestNetwork) -> Iterator[dict[str, Any]]:
    """What OpenStack calls the networks of a link: one for each address."""
    if not network.addresses:
        yield {"id": f"net{number}", "link": f"nic{number}", "type": "ipv4_dhcp", "network_id": ""}
    gateways = [ipaddress.ip_address(item) for item in network.gateways]
    for index, text in enumerate(network.addresses):
        interface = ipaddress.ip_interface(text)
        nowhere = ipaddress.ip_network("0.0.0.0/0" if interface.version == 4 else "::/0")
        here = [gateway for gateway in gateways if gateway in interface.network]
        gateways = [gateway for gateway in gateways if gateway not in here]
        yield {
            "id": f"net{number}.{index}",
            "link": f"nic{number}",
            "type": f"ipv{interface.version}",
            "ip_address": str(interface.ip),
            "netmask": str(interface.network.netmask),
            "network_id": "",
            "routes": [
                {"network": str(nowhere.network_address), "netmask": str(nowhere.netmask), "gateway": str(gateway)}
                for gateway in here
            ],
        }


def _json(data: Mapping[str, Any]) -> bytes:
    """JSON is YAML too, which is what NoCloud's files are."""
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def _bad(text: str) -> InstructionError:
    return InstructionError("instruction.bad_args", f"config drive: {text}")
