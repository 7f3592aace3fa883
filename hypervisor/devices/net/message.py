"""One frame between a driver process and the switch: one message of a UNIX SOCK_SEQPACKET socket.

A message is a ``virtio_net_hdr`` of 10 bytes (virtio 1.1, 5.1.6, without ``num_buffers``) and
an Ethernet frame without FCS. It is what a TAP with IFF_VNET_HDR speaks, so that a frame
passes from guest to TAP with no byte changed. Who receives one does not trust it: see `sane`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct("<BBHHHH")
HEADER_BYTES = HEADER.size
PLAIN = bytes(HEADER_BYTES)
VALIDATED = b"\2" + bytes(HEADER_BYTES - 1)
"""Of a frame without offloads whose checksums are known to be right."""

MIN_FRAME = 14
MAX_FRAME = 65535
"""XEN_NETIF_MAX_TX_SIZE (public/io/netif.h)."""
MAX_MESSAGE = HEADER_BYTES + MAX_FRAME

NEEDS_CSUM = 1
DATA_VALID = 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80


class Header(NamedTuple):
    """``virtio_net_hdr``. Offsets count from the frame's first byte.

    :ivar flags: `NEEDS_CSUM`: the checksum at `csum_start` + `csum_offset`, over all from `csum_start` on, is still to
        be made; `DATA_VALID`: checksums are right.
    :ivar gso_type: the frame is to be cut into TCP segments of `gso_size` bytes of payload behind `hdr_len` bytes.
    """

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(*self)


NO_OFFLOAD = Header()


def parse(message: bytes | bytearray | memoryview) -> Header:
    """The header of a message of at least `HEADER_BYTES`."""
    return Header(*HEADER.unpack_from(message))


def sane(header: Header, frame_bytes: int) -> bool:
    """Whether a header fits a frame of that length and asks for nothing but what is known here."""
    if header.flags & ~(NEEDS_CSUM | DATA_VALID):
        return False
    gso = header.gso_type & ~GSO_ECN
    if gso not in (GSO_NONE, GSO_TCPV4, GSO_TCPV6) or (gso and not (header.gso_size and header.flags & NEEDS_CSUM)):
        return False
    if header.flags & NEEDS_CSUM:
        return header.csum_start >= MIN_FRAME and header.csum_start + header.csum_offset + 2 <= frame_bytes
    return True
