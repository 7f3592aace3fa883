"""The xenstore wire protocol: packets, an incremental parser, payload fields.

Source: Xen's ``docs/misc/xenstore.txt`` and ``public/io/xs_wire.h``. No input
or output happens here; bytes come in through `Parser.feed` and go out through
`Packet.encode`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from hypervisor.xenstore.errors import Invalid, ProtocolViolation

PAYLOAD_MAX = 4096
"""XENSTORE_PAYLOAD_MAX, bytes, in both directions."""

MAX_DOMID = 0x7FEF
"""Largest domid of a real domain (DOMID_FIRST_RESERVED - 1)."""

HEADER = struct.Struct("<IIII")
"""struct xsd_sockmsg: type, req_id, tx_id, len."""


class Op(enum.IntEnum):
    """enum xsd_sockmsg_type."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


@dataclass(frozen=True, slots=True)
class Packet:
    """One message in either direction.

    :ivar type: an `Op` or any other 32-bit number a peer made up.
    :ivar payload: at most `PAYLOAD_MAX` bytes.
    """

    type: int
    req_id: int
    tx_id: int
    payload: bytes = b""

    def encode(self) -> bytes:
        return HEADER.pack(self.type, self.req_id, self.tx_id, len(self.payload)) + self.payload

    def reply(self, payload: bytes) -> Packet:
        return Packet(self.type, self.req_id, self.tx_id, payload)

    def error(self, errno_name: bytes) -> Packet:
        return Packet(Op.ERROR, self.req_id, self.tx_id, errno_name + b"\0")


class Parser:
    """Cuts a byte stream into packets. Holds what was fed and not yet cut.

    A caller that feeds at most `wanted` bytes at a time never has more than
    one packet in here (16 + 4096 bytes).
    """

    __slots__ = ("_buffer",)

    def __init__(self, pending: bytes = b"") -> None:
        self._buffer = bytearray(pending)

    @property
    def pending(self) -> bytes:
        """Bytes of an unfinished packet, for `Parser(pending)` after a restart."""
        return bytes(self._buffer)

    @property
    def wanted(self) -> int:
        """Bytes still missing to finish the header, or else the packet; 0 when a packet is complete.

        :raises ProtocolViolation: see `next`.
        """
        have = len(self._buffer)
        if have < HEADER.size:
            return HEADER.size - have
        return max(0, HEADER.size + self._payload_size() - have)

    def feed(self, data: bytes | memoryview) -> None:
        self._buffer += data

    def next(self) -> Packet | None:
        """The next complete packet, or None.

        :raises ProtocolViolation: the payload is announced longer than `PAYLOAD_MAX`.
        """
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + self._payload_size()
        if len(self._buffer) < end:
            return None
        kind, req_id, tx_id, _size = HEADER.unpack_from(self._buffer)
        packet = Packet(kind, req_id, tx_id, bytes(self._buffer[HEADER.size : end]))
        del self._buffer[:end]
        return packet

    def clear(self) -> None:
        self._buffer.clear()

    def _payload_size(self) -> int:
        size = int(HEADER.unpack_from(self._buffer)[3])
        if size > PAYLOAD_MAX:
            raise ProtocolViolation(f"a payload of {size} bytes was announced: {PAYLOAD_MAX} is the most")
        return size


def strings(payload: bytes, least: int, most: int) -> list[bytes]:
    """The NUL-terminated strings of a payload; bytes after the last NUL are ignored, as xenstored does.

    :raises Invalid: fewer than `least` or more than `most` strings.
    """
    fields = payload.split(b"\0")[:-1]
    if not least <= len(fields) <= most:
        raise Invalid(f"{len(fields)} strings in the payload: {least} to {most} expected")
    return fields


def one_string(payload: bytes) -> bytes:
    """The payload as exactly one string with its NUL at the very end. :raises Invalid: it is not."""
    if payload.find(b"\0") != len(payload) - 1 or not payload:
        raise Invalid("the payload is not one NUL-terminated string")
    return payload[:-1]


def domid_of(field: bytes) -> int:
    """A domain's number as a client wrote it, reserved ones included. :raises Invalid: it is none."""
    return number(field, 0xFFFF)


def domid_of_guest(field: bytes) -> int:
    """The number of a domain other than dom0. :raises Invalid: it is none."""
    domid = domid_of(field)
    if not 1 <= domid <= MAX_DOMID:
        raise Invalid(f"{domid} is not the number of a guest")
    return domid


def number(field: bytes, most: int = 0xFFFF_FFFF) -> int:
    """A decimal number 0..most. :raises Invalid: it is none."""
    if not field.isdigit() or len(field) > 10 or int(field) > most:
        raise Invalid(f"{field[:20]!r} is not a number from 0 to {most}")
    return int(field)
