"""What two movers say to each other inside TLS: records, their limits, and the proof of who asks.

A record is a header of `HEADER` (kind, flags, zero, count, length; little-endian) and `length` bytes::

    target: CHALLENGE  magic, version, nonce
    source: HELLO      version, features, pages, ident, nonce, proof
    target: WELCOME    proof                         or REFUSED with a line of text, and the end
    source: PAGES      count indexes (u32), then count pages; with ZSTD set these are one compressed frame
            FILL       count indexes, then count words (u64) that each fill a page
            COPY       count pairs (u32): this page now holds what that one holds
            ROUND      count is the round's number; answered by ROUND with the same number
            EPOCH      count 0: from here on pages are kept aside; else they are whole, and to be written: that epoch
    both:   BLOB       count is how many bytes are to come; the name (ASCII, up to `MAX_NAME` bytes)
            DATA       the next bytes of the blob that was announced
            PING, BYE

The proofs are HMAC-SHA256 under the migration's token of who speaks, the ident, both nonces, both certificates and the
number of pages: who only holds a certificate of the operator's cannot take part, nor pass on what another one says,
and the token itself is never sent. Pure: no socket, no clock.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import struct
import uuid

from hypervisor.types import PAGE_SIZE

MAGIC = b"reevemov"
VERSION = 1
HEADER = struct.Struct("<BBHII")
CHALLENGE = struct.Struct("<8sH32s")
HELLO = struct.Struct("<HHQ16s32s32s")
NONCE_BYTES = PROOF_BYTES = 32

MAX_BATCH = 256
"""Pages of one record."""
MAX_PAGES = 1 << 32
MAX_BLOB = 64 << 20
MAX_DATA = 1 << 20
MAX_NAME = 32
MAX_TEXT = 400
ZSTD = 1
"""Flag of PAGES and feature of HELLO."""

INDEX_BYTES, WORD_BYTES = 4, 8


class Kind(enum.IntEnum):
    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    REFUSED = 4
    PAGES = 5
    FILL = 6
    COPY = 7
    ROUND = 8
    BLOB = 9
    DATA = 10
    PING = 11
    BYE = 12
    EPOCH = 13


FROM_TARGET = frozenset({Kind.ROUND, Kind.BLOB, Kind.DATA, Kind.PING, Kind.BYE})
FROM_SOURCE = FROM_TARGET | {Kind.PAGES, Kind.FILL, Kind.COPY, Kind.EPOCH}


class BadRecord(Exception):
    """What arrived is no record of this protocol, or not one for this moment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    kind: Kind
    flags: int
    count: int
    length: int


def header(kind: Kind, *, flags: int = 0, count: int = 0, length: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, count, length)


def record(kind: Kind, body: bytes = b"", *, count: int = 0) -> bytes:
    return header(kind, count=count, length=len(body)) + body


def parse_header(data: bytes | bytearray | memoryview, allowed: frozenset[Kind]) -> Header:
    """:raises BadRecord: unknown, not allowed here, or of a length that its kind cannot have."""
    kind, flags, zero, count, length = HEADER.unpack(data)
    if kind not in allowed or zero or (flags and (kind, flags) != (Kind.PAGES, ZSTD)):
        raise BadRecord(f"record of kind {kind} with flags {flags:#x} out of place")
    kind = Kind(kind)
    if not _fits(kind, flags, count, length):
        raise BadRecord(f"{kind.name} record with count {count} and {length} bytes")
    return Header(kind, flags, count, length)


def _fits(kind: Kind, flags: int, count: int, length: int) -> bool:
    batch = 0 < count <= MAX_BATCH
    match kind:
        case Kind.PAGES if flags & ZSTD:
            return batch and count * INDEX_BYTES < length < count * (INDEX_BYTES + PAGE_SIZE)
        case Kind.PAGES:
            return batch and length == count * (INDEX_BYTES + PAGE_SIZE)
        case Kind.FILL:
            return 0 < count <= MAX_DATA // 16 and length == count * (INDEX_BYTES + WORD_BYTES)
        case Kind.COPY:
            return batch and length == count * 2 * INDEX_BYTES
        case Kind.BLOB:
            return count <= MAX_BLOB and 0 < length <= MAX_NAME
        case Kind.DATA:
            return count == 0 and 0 < length <= MAX_DATA
        case Kind.ROUND | Kind.EPOCH:
            return length == 0
        case Kind.REFUSED:
            return count == 0 and length <= MAX_TEXT
        case Kind.CHALLENGE:
            return count == 0 and length == CHALLENGE.size
        case Kind.HELLO:
            return count == 0 and length == HELLO.size
        case Kind.WELCOME:
            return count == 0 and length == PROOF_BYTES
    return count == 0 and length == 0


# -- who is there


@dataclasses.dataclass(frozen=True, slots=True)
class Secret:
    """What both sides were told of one migration, and the certificates (DER) that they see."""

    ident: str
    token: str
    pages: int
    target_certificate: bytes
    source_certificate: bytes

    def proof(self, role: bytes, challenge: bytes, answer: bytes) -> bytes:
        """:param role: who speaks, ``source`` or ``target``. :param challenge, answer: nonces of target and source."""
        parts = [MAGIC, struct.pack("<HQ", VERSION, self.pages), role.ljust(8), self.ident_bytes, challenge, answer]
        parts += [hashlib.sha256(c).digest() for c in (self.target_certificate, self.source_certificate)]
        return hmac.new(self.token.encode(), b"".join(parts), hashlib.sha256).digest()

    @property
    def ident_bytes(self) -> bytes:
        return uuid.UUID(self.ident).bytes


def challenge(nonce: bytes) -> bytes:
    return record(Kind.CHALLENGE, CHALLENGE.pack(MAGIC, VERSION, nonce))


def parse_challenge(body: bytes) -> bytes:
    """The target's nonce. :raises BadRecord: it is no mover, or one of another version."""
    magic, version, nonce = CHALLENGE.unpack(body)
    if magic != MAGIC:
        raise BadRecord("it is no mover of Reeve's")
    if version != VERSION:
        raise BadRecord(f"its mover has version {version}, this one {VERSION}: install the same release on both")
    return bytes(nonce)


def hello(secret: Secret, nonce: bytes, answer: bytes, features: int) -> bytes:
    proof = secret.proof(b"source", nonce, answer)
    return record(Kind.HELLO, HELLO.pack(VERSION, features, secret.pages, secret.ident_bytes, answer, proof))


def check_hello(body: bytes, secret: Secret, nonce: bytes) -> tuple[bytes, int]:
    """The source's nonce and features. :raises BadRecord: with what may be told to the other side."""
    version, features, pages, ident, answer, proof = HELLO.unpack(body)
    if version != VERSION:
        raise BadRecord(f"a mover of version {version}, this one has {VERSION}: install the same release on both")
    known = hmac.compare_digest(ident, secret.ident_bytes)
    if not hmac.compare_digest(proof, secret.proof(b"source", nonce, answer)) or not known:
        if known and pages != secret.pages:
            raise BadRecord(f"{pages} pages instead of {secret.pages}")
        raise BadRecord("this is not the migration that is expected here, or its token is wrong")
    if features & ~ZSTD:
        raise BadRecord(f"features {features:#x} are unknown here: install the same release on both")
    return bytes(answer), features


def welcome(secret: Secret, nonce: bytes, answer: bytes) -> bytes:
    return record(Kind.WELCOME, secret.proof(b"target", nonce, answer))


def check_welcome(body: bytes, secret: Secret, nonce: bytes, answer: bytes) -> None:
    """:raises BadRecord: it was not told of this migration."""
    if not hmac.compare_digest(body, secret.proof(b"target", nonce, answer)):
        raise BadRecord("it does not know this migration")
