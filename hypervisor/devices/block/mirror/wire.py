"""What the two ends of a mirror say to each other: one message each, checked by a checksum of all of it.

A message is a head of `HEAD` (kind, zero, disk, number, count, checksum; little-endian) and what follows::

    source: HELLO    JSON: version, and of each disk to be copied `HelloDisk`
    target: READY    every image is made and open
    source: EXTENTS  `count` extents (`EXTENT`: offset, length, zero) and the data of those that are not zeroes
    target: ACK      message `number` and all before it are written
    source: SYNC     with a number; answered by SYNCED when all before it is on stable storage
    source: ASIDE    with a number; answered likewise: what comes from now on waits, in memory, for `MirrorTarget.apply`
    target: FAILED   JSON of an error, and the end

Pure: no socket, no file.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

VERSION = 1
HEAD = struct.Struct("<BBHIII")
EXTENT = struct.Struct("<QIB3x")

MAX_DISKS = 64
MAX_EXTENTS = 512
MAX_DATA = 1 << 20
MAX_ZERO = 1 << 30
"""Bytes of one extent of zeroes."""
MAX_JSON = 1 << 16
MAX_ASIDE = 1 << 28
"""Bytes of messages that wait at once, with either end."""
MAX_MESSAGE = HEAD.size + MAX_EXTENTS * EXTENT.size + MAX_DATA


class Kind(enum.IntEnum):
    HELLO = 1
    READY = 2
    EXTENTS = 3
    ACK = 4
    SYNC = 5
    SYNCED = 6
    FAILED = 7
    ASIDE = 8


FROM_SOURCE = frozenset({Kind.HELLO, Kind.EXTENTS, Kind.SYNC, Kind.ASIDE})
FROM_TARGET = frozenset({Kind.READY, Kind.ACK, Kind.SYNCED, Kind.FAILED})
_JSON = frozenset({Kind.HELLO, Kind.FAILED})


class BadMessage(Exception):
    """What arrived is no message of a mirror, or not one for this moment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a disk; `zero`: they read as zeroes, and no data comes with them."""

    offset: int
    length: int
    zero: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """:ivar disk: index of the disk. :ivar number: of the message, or of what is asked for.

    :ivar data: of the extents that are not zero, one behind the other. :ivar document: of a kind that carries JSON.
    """

    kind: Kind
    disk: int = 0
    number: int = 0
    extents: tuple[Extent, ...] = ()
    data: memoryview | bytes = b""
    document: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class HelloDisk:
    """A disk that is to be copied. :ivar size: bytes. :ivar top: without its backing files, whose digest follows.

    :ivar digest: `images.digest` of these where the target asked for it, else "".
    """

    id: str
    size: int
    top: bool = False
    digest: str = ""


def hello(disks: Sequence[HelloDisk]) -> bytes:
    document = {"version": VERSION, "disks": [dataclasses.asdict(disk) for disk in disks]}
    return note(Kind.HELLO, document=document)


def parse_hello(document: dict[str, Any]) -> list[HelloDisk]:
    """:raises BadMessage: it is none, or of another version."""
    version, disks = document.get("version"), document.get("disks")
    if version != VERSION:
        raise BadMessage(f"a mirror of version {version!r}, this one has {VERSION}")
    try:
        found = [HelloDisk(**disk) for disk in disks] if isinstance(disks, list) else []
    except TypeError as exc:
        raise BadMessage(f"a disk that is none: {exc}") from exc
    types = {"id": str, "size": int, "top": bool, "digest": str}
    good = all(type(getattr(disk, name)) is kind for disk in found for name, kind in types.items())
    if not good or not 0 < len(found) <= MAX_DISKS or len({disk.id for disk in found}) != len(found):
        raise BadMessage("disks that are none")
    return found


def note(kind: Kind, number: int = 0, document: dict[str, Any] | None = None) -> bytes:
    """A message without extents."""
    body = b"" if document is None else json.dumps(document, separators=(",", ":")).encode()
    return _head(kind, 0, number, 0, [body]) + body


def extents(disk: int, number: int, found: Sequence[Extent], pieces: Sequence[memoryview]) -> list[bytes | memoryview]:
    """The parts of a message; `pieces`: the data of those that are not zero, in order."""
    table = b"".join([EXTENT.pack(extent.offset, extent.length, extent.zero) for extent in found])
    return [_head(Kind.EXTENTS, disk, number, len(found), [table, *pieces]), table, *pieces]


def parse(data: bytes, allowed: frozenset[Kind]) -> Message:
    """:raises BadMessage: damaged, out of bounds, or not allowed here."""
    if not HEAD.size <= len(data) <= MAX_MESSAGE:
        raise BadMessage(f"a message of {len(data)} bytes")
    kind, zero, disk, number, count, checksum = HEAD.unpack_from(data)
    if kind not in allowed or zero or disk >= MAX_DISKS:
        raise BadMessage(f"a message of kind {kind} out of place")
    body = memoryview(data)[HEAD.size :]
    if checksum != zlib.crc32(body, zlib.crc32(HEAD.pack(kind, 0, disk, number, count, 0))):
        raise BadMessage("a message whose checksum is wrong")
    kind = Kind(kind)
    if kind is Kind.EXTENTS:
        found, rest = _extents(body, count)
        return Message(kind, disk, number, found, rest)
    if count or (body and kind not in _JSON):
        raise BadMessage(f"{kind.name} with what does not belong to it")
    return Message(kind, disk, number, document=_document(body) if kind in _JSON else {})


def _head(kind: Kind, disk: int, number: int, count: int, body: Sequence[bytes | memoryview]) -> bytes:
    checksum = zlib.crc32(HEAD.pack(kind, 0, disk, number, count, 0))
    for part in body:
        checksum = zlib.crc32(part, checksum)
    return HEAD.pack(kind, 0, disk, number, count, checksum)


def _extents(body: memoryview, count: int) -> tuple[tuple[Extent, ...], memoryview]:
    if not 0 < count <= MAX_EXTENTS or len(body) < count * EXTENT.size:
        raise BadMessage(f"{count} extents in {len(body)} bytes")
    rest = body[count * EXTENT.size :]
    found: list[Extent] = []
    end = length = 0
    for offset, size, zero in EXTENT.iter_unpack(body[: count * EXTENT.size]):
        if offset < end or not 0 < size <= (MAX_ZERO if zero else MAX_DATA) or zero > 1:
            raise BadMessage(f"an extent of {size} bytes at {offset}")
        found.append(Extent(offset, size, bool(zero)))
        end = offset + size
        length += 0 if zero else size
    if length != len(rest):
        raise BadMessage(f"{len(rest)} bytes of data for extents of {length}")
    return tuple(found), rest


def _document(body: memoryview) -> dict[str, Any]:
    if len(body) > MAX_JSON:
        raise BadMessage(f"a document of {len(body)} bytes")
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"what is no JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise BadMessage("a document that is no object")
    return document
