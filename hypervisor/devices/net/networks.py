"""The networks of a host, as the option ``networks`` names them: ``NAME TYPE [KEY=VALUE ...]``."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.errors import SpecInvalid

INTERNAL, TAP, USER = "internal", "tap", "user"

DEFAULT = ("default user",)
DEFAULT_CIDR = "10.0.2.0/24"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:-]{1,15}")
_FORWARD = re.compile(r"(?:(tcp|udp):)?(?:([0-9.]+):)?([0-9]{1,5})-([0-9.]+):([0-9]{1,5})")
_KEYS = {
    INTERNAL: frozenset[str](),
    TAP: frozenset(("interface", "bridge", "ovs", "offload")),
    USER: frozenset(("cidr", "forward", "host_loopback", "mtu", "ipv6", "dns")),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads to a guest's."""

    protocol: str
    host_address: str
    host_port: int
    guest_address: str
    guest_port: int


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkConfig:
    """
    :ivar kind: ``internal`` (nothing but the host's own domains), ``tap`` or ``user`` (slirp4netns, no privileges).
    :ivar interface: the TAP's name; `bridge` or `ovs` the bridge that it is made a port of.
    :ivar offload: what is behind the TAP takes large frames and frames without a checksum, as the kernel does.
    :ivar cidr: of a user network: host at .2, name server at .3, DHCP from .15 on. :ivar mtu: of frames there.
    :ivar host_loopback: guests reach what listens on 127.0.0.1 of the host at .2.
    """

    name: str
    kind: str
    interface: str = ""
    bridge: str = ""
    ovs: str = ""
    offload: bool = True
    cidr: str = DEFAULT_CIDR
    forwards: tuple[Forward, ...] = ()
    host_loopback: bool = False
    ipv6: bool = False
    dns: bool = True
    mtu: int = 1500


def parse(lines: Iterable[str]) -> dict[str, NetworkConfig]:
    """:raises SpecInvalid: a line that makes no sense, with what would."""
    networks: dict[str, NetworkConfig] = {}
    for line in lines:
        network = _parse_line(line)
        if network.name in networks:
            raise SpecInvalid(f"network {network.name} is configured twice: give each name once")
        networks[network.name] = network
    taps = [network.interface for network in networks.values() if network.kind == TAP]
    if len(set(taps)) != len(taps):
        raise SpecInvalid("two networks have the same interface: give each TAP to one network")
    return networks


def _parse_line(line: str) -> NetworkConfig:
    words = line.split()
    name, kind = (*words, "", "")[:2]
    if not _NAME.fullmatch(name) or kind not in _KEYS:
        raise SpecInvalid(f"networks: {line!r} is not usable: give NAME internal, NAME tap ... or NAME user ...")
    values: dict[str, list[str]] = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS[kind]:
            known = ", ".join(sorted(_KEYS[kind])) or "none"
            raise SpecInvalid(f"network {name}: {word!r} is not known: options of {kind} are {known}, as KEY=VALUE")
        values.setdefault(key, []).append(value)
    twice = [key for key, found in values.items() if len(found) > 1 and key != "forward"]
    if twice:
        raise SpecInvalid(f"network {name}: {twice[0]} is given twice: only forward may be")
    if kind == TAP:
        return _tap(name, {key: found[0] for key, found in values.items()})
    return _user(name, values) if kind == USER else NetworkConfig(name, kind)


def _tap(name: str, values: Mapping[str, str]) -> NetworkConfig:
    interface = values.get("interface", "")
    for key in ("interface", "bridge", "ovs"):
        if key in values and not _INTERFACE.fullmatch(values[key]):
            raise SpecInvalid(f"network {name}: {key}={values[key]!r} is no interface name of at most 15 characters")
    if not interface:
        raise SpecInvalid(f"network {name}: interface is missing: give interface=TAPNAME")
    if "bridge" in values and "ovs" in values:
        raise SpecInvalid(f"network {name}: give bridge= or ovs=, not both")
    offload = _yes_or_no(name, "offload", values.get("offload", "yes"))
    return NetworkConfig(name, TAP, interface, values.get("bridge", ""), values.get("ovs", ""), offload)


def _user(name: str, values: Mapping[str, list[str]]) -> NetworkConfig:
    fields: dict[str, Any] = {}
    if "cidr" in values:
        fields["cidr"] = _cidr(name, values["cidr"][0])
    for key in ("host_loopback", "ipv6", "dns"):
        if key in values:
            fields[key] = _yes_or_no(name, key, values[key][0])
    if "mtu" in values:
        text = values["mtu"][0]
        if not text.isdecimal() or not 576 <= int(text) <= 65520:
            raise SpecInvalid(f"network {name}: mtu={text!r}: give 576 to 65520")
        fields["mtu"] = int(text)
    forwards = tuple(_forward(name, text) for text in values.get("forward", ()))
    subnet = ipaddress.ip_network(fields.get("cidr", DEFAULT_CIDR))
    for forward in forwards:
        if ipaddress.ip_address(forward.guest_address) not in subnet:
            raise SpecInvalid(
                f"network {name}: {forward.guest_address} is not in {subnet}: forward to an address there"
            )
    return NetworkConfig(name, USER, forwards=forwards, **fields)


def _yes_or_no(name: str, key: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise SpecInvalid(f"network {name}: {key}={text!r}: give yes or no")
    return text == "yes"


def _cidr(name: str, text: str) -> str:
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError as exc:
        raise SpecInvalid(f"network {name}: cidr={text!r} is not usable ({exc}): give one like 10.0.2.0/24") from None
    if not 8 <= subnet.prefixlen <= 25:
        raise SpecInvalid(f"network {name}: cidr={text} is too large or too small: give /8 to /25")
    return str(subnet)


def _forward(name: str, text: str) -> Forward:
    match = _FORWARD.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        protocol, host, host_port, guest, guest_port = match.groups()
        host = str(ipaddress.IPv4Address(host or "127.0.0.1"))
        guest = str(ipaddress.IPv4Address(guest))
        if not (0 < int(host_port) < 65536 and 0 < int(guest_port) < 65536):
            raise ValueError
    except ValueError:
        raise SpecInvalid(
            f"network {name}: forward={text!r} is not usable: give one like tcp:127.0.0.1:2222-10.0.2.15:22"
        ) from None
    return Forward(protocol or "tcp", host, int(host_port), guest, int(guest_port))
