"""Whether a frame may come from a nic: its MAC, and its addresses if they are given.

With addresses given, a guest may speak ARP, IPv4 and IPv6 from these only. Besides, what a stack says before it has
one: DHCP requests from 0.0.0.0, ARP probes (RFC 5227), and from ``::`` what RFC 4862 and RFC 3810 want (duplicate
address detection, router solicitation, multicast listener reports). IPv6 link-local is allowed as made of the MAC
(RFC 4291, appendix A); another one has to be given. It must be neither DHCP server nor router to others.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from hypervisor.devices.net import headers
from hypervisor.devices.net.headers import Frame, Layers

_NO_IPV4 = bytes(4)
_NO_IPV6 = bytes(16)
_RS, _RA, _NS, _NA, _REDIRECT = 133, 134, 135, 136, 137
_MLD = (131, 132, 143)
_MIN_ND = {_RS: 8, _NS: 24, _NA: 24}
_LINK_ADDRESS = {_RS: 1, _NS: 1, _NA: 2}  # the option that names the sender's own MAC (RFC 4861 4.6.1)


def link_local(mac: bytes) -> bytes:
    """fe80::/64 with the modified EUI-64 of a MAC."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


class Guard:
    """:param mac: 6 bytes. :param addresses: texts; none: only the MAC is looked at."""

    def __init__(self, mac: bytes, addresses: Iterable[str] = ()) -> None:
        parsed = [ipaddress.ip_address(address) for address in addresses]
        self._mac = mac
        self._bound = bool(parsed)
        self._ipv4 = frozenset(address.packed for address in parsed if address.version == 4)
        self._ipv6 = frozenset(address.packed for address in parsed if address.version == 6) | {link_local(mac)}

    def allows(self, frame: Frame) -> bool:
        """:param frame: at least `message.MIN_FRAME` bytes."""
        if frame[6:12] != self._mac:
            return False
        kind = headers.ethertype(frame)
        if kind == headers.ARP:
            return self._allows_arp(frame)
        if not self._bound:
            return True
        if kind == headers.IPV4:
            return self._allows_ipv4(frame)
        return kind == headers.IPV6 and self._allows_ipv6(frame)

    def _allows_arp(self, frame: Frame) -> bool:
        """RFC 826, for IPv4 over Ethernet."""
        if len(frame) < 42 or frame[14:20] != b"\0\1\x08\0\6\4" or frame[22:28] != self._mac:
            return False
        sender = frame[28:32]
        return not self._bound or sender == _NO_IPV4 or bytes(sender) in self._ipv4

    def _allows_ipv4(self, frame: Frame) -> bool:
        layers = headers.locate(frame)
        if layers is None:
            return False
        ports = _ports(frame, layers)
        source = bytes(frame[26:30])
        if source == _NO_IPV4:
            return ports == (68, 67)
        return source in self._ipv4 and ports[0] != 67

    def _allows_ipv6(self, frame: Frame) -> bool:
        layers = headers.locate(frame)
        if layers is None:
            return False
        source = bytes(frame[22:38])
        if source != _NO_IPV6 and source not in self._ipv6:
            return False
        if layers.protocol != headers.ICMPV6:
            return source != _NO_IPV6 and _ports(frame, layers)[0] != 547
        if layers.fragment or layers.l4 >= layers.end:
            # Neighbour discovery must not hide in fragments (RFC 6980); a long ping may be one.
            return source != _NO_IPV6 and layers.fragment and _later_fragment(frame)
        kind = frame[layers.l4]
        if kind in (_RA, _REDIRECT):
            return False
        if source == _NO_IPV6 and kind not in (_RS, _NS, *_MLD):
            return False
        return kind not in _MIN_ND or self._allows_discovery(kind, frame[layers.l4 : layers.end])

    def _allows_discovery(self, kind: int, body: Frame) -> bool:
        at = _MIN_ND[kind]
        if len(body) < at or (kind == _NA and bytes(body[8:24]) not in self._ipv6):
            return False
        while at + 8 <= len(body):
            length = body[at + 1] * 8
            if not length or at + length > len(body):
                return False
            if body[at] == _LINK_ADDRESS[kind] and body[at + 2 : at + 8] != self._mac:
                return False
            at += length
        return at == len(body)


def _ports(frame: Frame, layers: Layers) -> tuple[int, int]:
    """UDP's; (0, 0) of anything else."""
    at = layers.l4
    if layers.protocol != headers.UDP or layers.fragment or at + 8 > layers.end:
        return (0, 0)
    return frame[at] << 8 | frame[at + 1], frame[at + 2] << 8 | frame[at + 3]


def _later_fragment(frame: Frame) -> bool:
    """The packet's fragment header follows at once and is not of the first part, where ICMPv6's type would be."""
    return frame[20] == headers.FRAGMENT and bool((frame[56] << 8 | frame[57]) & 0xFFF8)
