"""What is said in a nic's name when its guest has come from another host, so that switches learn where it is now.

A RARP request (RFC 903), as QEMU sends it: it has the MAC and needs no address. For each IPv4 address that is known, a
gratuitous ARP request (RFC 5227, 3), so that neighbours who lost the address find it again.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable

from hypervisor.devices.net.message import PLAIN

BROADCAST = b"\xff" * 6
_ARP, _RARP = 0x0806, 0x8035
_ARP_REQUEST, _RARP_REQUEST = 1, 3
_MIN_BYTES = 60
_PACKET = struct.Struct(">HHBBH6s4s6s4s")


def announcements(mac: bytes, addresses: Iterable[str]) -> list[bytes]:
    """Messages (`hypervisor.devices.net.message`). :param mac: 6 bytes. :raises ValueError: an address is none."""
    found = [_frame(mac, _RARP, _RARP_REQUEST, mac, bytes(4))]
    for text in addresses:
        address = ipaddress.ip_address(text)
        if address.version == 4:
            found.append(_frame(mac, _ARP, _ARP_REQUEST, bytes(6), address.packed))
    return found


def _frame(mac: bytes, kind: int, op: int, target: bytes, address: bytes) -> bytes:
    packet = _PACKET.pack(1, 0x0800, 6, 4, op, mac, address, target, address)
    return PLAIN + (BROADCAST + mac + kind.to_bytes(2, "big") + packet).ljust(_MIN_BYTES, b"\0")
