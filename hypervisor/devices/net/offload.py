"""Checksums and segmentation in software, for receivers that cannot do them.

The sum of RFC 1071 is the data, read as one big number, modulo 65535 (since 2**16 = 1 modulo
65535), and Python's long integers do that at C speed: no array library is needed.

A header may be a liar, but not about lengths: what does not fit gives None, never a wrong byte.
"""

from __future__ import annotations

import struct

from hypervisor.devices.net import headers
from hypervisor.devices.net.headers import Frame, Layers
from hypervisor.devices.net.message import GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, Header

_FIN_PSH = 0x09
_CWR = 0x80
MAX_SEGMENTS = 2048
"""A guest could ask for 65000 segments of one byte; no real TCP has a payload of less than 32 in such a frame."""


def total(data: Frame) -> int:
    """A number that is the RFC 1071 sum of the data modulo 65535, 0 only for zeros."""
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    return value % 0xFFFF or (0xFFFF if value else 0)


def fold(value: int) -> int:
    """The checksum field for a sum of several `total`."""
    rest = value % 0xFFFF
    return 0xFFFF - rest if rest else 0 if value else 0xFFFF


def pseudo_total(frame: Frame, layers: Layers, length: int) -> int:
    """Sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1) for a layer 4 of `length` bytes."""
    addresses = frame[26:34] if layers.version == 4 else frame[22:54]
    return total(addresses) + layers.protocol + (length >> 16) + (length & 0xFFFF)


def pseudo_field(frame: Frame, layers: Layers) -> int:
    """What stands in the checksum field while the checksum is still to be made."""
    value = pseudo_total(frame, layers, layers.end - layers.l4)
    return value % 0xFFFF or 0xFFFF


def plain(header: Header, frame: Frame) -> list[Frame] | None:
    """The frame as frames without any offload; None if that cannot be."""
    if header.gso_type & ~GSO_ECN != GSO_NONE:
        segments = segment(header, frame)
        return None if segments is None else list(segments)
    if header.flags & NEEDS_CSUM:
        done = checksummed(frame)
        return None if done is None else [done]
    return [frame]


def checksummed(frame: Frame) -> bytearray | None:
    """The frame with its TCP or UDP checksum made."""
    place = headers.checksum_place(frame)
    if place is None:
        return None
    layers, offset = place
    result = bytearray(frame)
    at = layers.l4 + offset
    result[at : at + 2] = b"\0\0"
    value = pseudo_total(frame, layers, layers.end - layers.l4) + total(memoryview(result)[layers.l4 : layers.end])
    field = fold(value)
    if not field and layers.protocol == headers.UDP:
        field = 0xFFFF  # 0 means "none" there (RFC 768)
    result[at : at + 2] = field.to_bytes(2, "big")
    return result


def segment(header: Header, frame: Frame) -> list[bytes] | None:
    """Cut a TCP frame into segments of `header.gso_size` bytes, each with its checksums."""
    place = headers.checksum_place(frame)
    if place is None or place[0].protocol != headers.TCP:
        return None
    layers = place[0]
    if header.gso_type & ~GSO_ECN != (GSO_TCPV4 if layers.version == 4 else GSO_TCPV6):
        return None
    start = layers.l4 + (frame[layers.l4 + 12] >> 4) * 4
    if start < layers.l4 + 20 or start > layers.end:
        return None
    size = header.gso_size
    count = -(-(layers.end - start) // size) if size else 0
    if not 0 < count <= MAX_SEGMENTS:
        return None
    return _cut(frame, layers, start, size, count)


def _cut(frame: Frame, layers: Layers, start: int, size: int, count: int) -> list[bytes]:
    l4, version = layers.l4, layers.version
    head = bytearray(frame[:start])
    first_id = head[18] << 8 | head[19]
    (sequence,) = struct.unpack_from(">I", head, l4 + 4)
    flags = head[l4 + 13]
    head[l4 + 16 : l4 + 18] = b"\0\0"
    result = []
    for number in range(count):
        payload = frame[start + number * size : min(start + (number + 1) * size, layers.end)]
        length = start - l4 + len(payload)
        if version == 4:
            struct.pack_into(">HH", head, 16, l4 - 14 + length, (first_id + number) & 0xFFFF)
            head[24:26] = b"\0\0"
            head[24:26] = fold(total(head[14:l4])).to_bytes(2, "big")
        else:
            struct.pack_into(">H", head, 18, l4 - 54 + length)
        struct.pack_into(">I", head, l4 + 4, (sequence + number * size) & 0xFFFF_FFFF)
        head[l4 + 13] = flags & ~(_FIN_PSH if number < count - 1 else 0) & ~(_CWR if number else 0)
        value = pseudo_total(head, layers, length) + total(head[l4:start]) + total(payload)
        result.append(b"".join((head[: l4 + 16], fold(value).to_bytes(2, "big"), head[l4 + 18 :], payload)))
    return result
