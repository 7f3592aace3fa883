"""Which frames a nic may send: row by row."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.devices.net.guard import Guard, link_local

MAC = bytes.fromhex("00163e000001")
OTHER = bytes.fromhex("00163e000002")
OWN4, OWN6 = "10.0.0.5", "fd00::5"
LOCAL = link_local(MAC)
ANY6 = bytes(16)


def ip4(text: str) -> bytes:
    return bytes(map(int, text.split(".")))


def ip6(text: str) -> bytes:

    return ipaddress.IPv6Address(text).packed


def frame(kind: int, payload: bytes, source: bytes = MAC) -> bytes:
    return b"\xff" * 6 + source + struct.pack(">H", kind) + payload


def arp(sender: str, hardware: bytes = MAC, operation: int = 1) -> bytes:
    body = struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, operation, hardware, ip4(sender), bytes(6), ip4("10.0.0.1"))
    return frame(0x806, body)


def ipv4(source: str, protocol: int = 6, body: bytes = bytes(20)) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0, ip4(source), ip4("10.0.0.1"))
    return frame(0x800, head + body)


def udp4(source: str, ports: tuple[int, int]) -> bytes:
    return ipv4(source, 17, struct.pack(">HHHH", *ports, 8, 0))


def ipv6(source: bytes, protocol: int, body: bytes) -> bytes:
    return frame(0x86DD, struct.pack(">IHBB16s16s", 6 << 28, len(body), protocol, 255, source, ip6("ff02::1")) + body)


def icmp6(source: bytes, kind: int, body: bytes = b"") -> bytes:
    return ipv6(source, 58, struct.pack(">BBH", kind, 0, 0) + body)


def option(kind: int, mac: bytes) -> bytes:
    return bytes((kind, 1)) + mac


def na(target: bytes, options: bytes = b"") -> bytes:
    return icmp6(LOCAL, 136, bytes(4) + target + options)


def ns(source: bytes, options: bytes = b"") -> bytes:
    return icmp6(source, 135, bytes(4) + ip6(OWN6) + options)


def hidden(kind: int) -> bytes:
    """ICMPv6 behind a hop-by-hop header."""
    return ipv6(ip6(OWN6), 0, bytes((58, 0)) + bytes(6) + struct.pack(">BBH", kind, 0, 0) + bytes(20))


def fragment(offset: int) -> bytes:
    return ipv6(ip6(OWN6), 44, struct.pack(">BBHI", 58, 0, offset << 3, 1) + bytes(40))


BOUND = [
    # ARP
    (arp(OWN4), True),
    (arp("0.0.0.0"), True),
    (arp("10.0.0.6"), False),
    (arp(OWN4, OTHER), False),
    (arp(OWN4, operation=2), True),
    (arp(OWN4)[:41], False),
    # IPv4
    (ipv4(OWN4), True),
    (ipv4("10.0.0.6"), False),
    (ipv4(OWN4)[:-1], False),
    (udp4("0.0.0.0", (68, 67)), True),
    (udp4("0.0.0.0", (68, 68)), False),
    (udp4(OWN4, (67, 68)), False),
    (udp4(OWN4, (5000, 53)), True),
    (ipv4("0.0.0.0"), False),
    # IPv6
    (ipv6(ip6(OWN6), 6, bytes(20)), True),
    (ipv6(LOCAL, 6, bytes(20)), True),
    (ipv6(ip6("fd00::6"), 6, bytes(20)), False),
    (ipv6(link_local(OTHER), 6, bytes(20)), False),
    (ipv6(ANY6, 6, bytes(20)), False),
    (ipv6(LOCAL, 17, struct.pack(">HHHH", 547, 546, 8, 0)), False),
    (ipv6(LOCAL, 17, struct.pack(">HHHH", 546, 547, 8, 0)), True),
    # neighbour discovery
    (icmp6(LOCAL, 128, bytes(4)), True),
    (icmp6(ANY6, 128, bytes(4)), False),
    (icmp6(ANY6, 143, bytes(4)), True),
    (icmp6(LOCAL, 133, bytes(4) + option(1, MAC)), True),
    (icmp6(LOCAL, 133, bytes(4) + option(1, OTHER)), False),
    (icmp6(LOCAL, 134, bytes(12)), False),
    (icmp6(LOCAL, 137, bytes(36)), False),
    (na(ip6(OWN6), option(2, MAC)), True),
    (na(ip6(OWN6), option(2, OTHER)), False),
    (na(ip6("fd00::6"), option(2, MAC)), False),
    (na(LOCAL), True),
    (na(ip6(OWN6), b"\2\0" + bytes(6)), False),
    (na(ip6(OWN6), b"\2\1\0"), False),
    (ns(ANY6), True),
    (ns(LOCAL, option(1, MAC)), True),
    (ns(LOCAL, option(1, OTHER)), False),
    (icmp6(LOCAL, 136), False),
    (hidden(134), False),
    (hidden(128), True),
    (fragment(0), False),
    (fragment(100), True),
    # others
    (frame(0x8100, bytes(50)), False),
    (frame(0x8035, bytes(50)), False),
    (frame(0x0026, bytes(50)), False),
    (frame(0x88B5, bytes(50)), False),
    (ipv4(OWN4).replace(MAC, OTHER, 1), False),
]


@pytest.mark.parametrize(("sent", "allowed"), BOUND)
def test_with_addresses(sent: bytes, allowed: bool) -> None:
    guard = Guard(MAC, [OWN4, OWN6])
    assert guard.allows(sent) is allowed
    assert guard.allows(memoryview(sent)) is allowed


@pytest.mark.parametrize(
    ("sent", "allowed"),
    [
        (ipv4("1.2.3.4"), True),
        (frame(0x8100, bytes(50)), True),
        (ipv4("1.2.3.4").replace(MAC, OTHER, 1), False),
        (arp("1.2.3.4"), True),
        (arp("1.2.3.4", OTHER), False),
        (frame(0x88B5, b""), True),
    ],
)
def test_without_addresses(sent: bytes, allowed: bool) -> None:
    assert Guard(MAC).allows(sent) is allowed


def test_link_local() -> None:
    assert ip6("fe80::216:3eff:fe00:1") == LOCAL


@settings(deadline=None)
@given(st.binary(min_size=0, max_size=120), st.sampled_from([0x800, 0x806, 0x86DD]))
def test_random_packets_do_no_harm(body: bytes, kind: int) -> None:
    Guard(MAC, [OWN4, OWN6]).allows(frame(kind, body))


@settings(deadline=None)
@given(st.sampled_from([row[0] for row in BOUND]), st.data())
def test_a_changed_source_is_never_let_through(sent: bytes, data: st.DataObject) -> None:
    """Whatever else a guest changes: an IP source that is not its own does not pass."""
    changed = bytearray(sent)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    if Guard(MAC, [OWN4, OWN6]).allows(changed):
        assert changed[6:12] == MAC
        kind = changed[12:14].hex()
        if kind == "0800":
            assert bytes(changed[26:30]) in (ip4(OWN4), bytes(4))
        elif kind == "86dd":
            assert bytes(changed[22:38]) in (ip6(OWN6), LOCAL, ANY6)
        else:
            assert kind == "0806" and bytes(changed[28:32]) in (ip4(OWN4), bytes(4)) and changed[22:28] == MAC
