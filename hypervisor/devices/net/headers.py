"""Where the parts of an Ethernet frame are. Frames are a guest's: every length is checked.

Sources: RFC 791, 8200, 9293, 768; IEEE 802.3.
"""

from __future__ import annotations

from typing import NamedTuple

ETHERNET = 14
IPV4, ARP, RARP, IPV6 = 0x0800, 0x0806, 0x8035, 0x86DD
TCP, UDP, ICMPV6 = 6, 17, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60

_MAX_EXTENSIONS = 8

Frame = bytes | bytearray | memoryview


class Layers(NamedTuple):
    """:ivar version: 4 or 6. :ivar l4: offset of what is behind the IP headers. :ivar protocol: its number.

    :ivar end: offset behind the packet; what follows is Ethernet's padding.
    :ivar fragment: it is a part of a packet, so that no layer 4 header need be there.
    """

    version: int
    l4: int
    protocol: int
    end: int
    fragment: bool


def ethertype(frame: Frame) -> int:
    return frame[12] << 8 | frame[13]


def locate(frame: Frame) -> Layers | None:
    """The layers of an IP packet; None if it is none, or not a whole one."""
    kind = ethertype(frame) if len(frame) >= ETHERNET else 0
    if kind == IPV4:
        return _ipv4(frame)
    if kind == IPV6:
        return _ipv6(frame)
    return None


def _ipv4(frame: Frame) -> Layers | None:
    if len(frame) < ETHERNET + 20:
        return None
    length = (frame[14] & 15) * 4
    total = frame[16] << 8 | frame[17]
    if frame[14] >> 4 != 4 or length < 20 or total < length or ETHERNET + total > len(frame):
        return None
    fragment = bool((frame[20] << 8 | frame[21]) & 0x3FFF)  # more fragments, or an offset
    return Layers(4, ETHERNET + length, frame[23], ETHERNET + total, fragment)


def _ipv6(frame: Frame) -> Layers | None:
    if len(frame) < ETHERNET + 40 or frame[14] >> 4 != 6:
        return None
    end = ETHERNET + 40 + (frame[18] << 8 | frame[19])
    if end > len(frame):
        return None
    protocol, at, fragment = frame[20], ETHERNET + 40, False
    for _ in range(_MAX_EXTENSIONS):
        if protocol not in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION):
            return Layers(6, at, protocol, end, fragment)
        if at + 8 > end:
            return None
        fragment |= protocol == FRAGMENT
        length = 8 if protocol == FRAGMENT else (frame[at + 1] + 1) * 8
        protocol, at = frame[at], at + length
        if at > end:
            return None
    return None


def checksum_place(frame: Frame) -> tuple[Layers, int] | None:
    """The layers of a TCP or UDP packet, and the offset of the checksum in its layer 4 header; None if it has none."""
    layers = locate(frame)
    if layers is None or layers.fragment:
        return None
    if layers.protocol == TCP and layers.l4 + 20 <= layers.end:
        return layers, 16
    if layers.protocol == UDP and layers.l4 + 8 <= layers.end:
        return layers, 6
    return None
