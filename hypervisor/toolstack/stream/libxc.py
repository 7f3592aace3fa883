"""A libxc stream as a whole: its headers, the frame of a record, and the order in which records may come."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator

from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.toolstack.stream import records
from hypervisor.toolstack.stream.records import Kind, PvInfo, Record
from hypervisor.toolstack.stream.source import Source

MARKER, IDENT = 0xFFFF_FFFF_FFFF_FFFF, 0x58454E46
VERSION, OLDEST_VERSION = 3, 2
BIG_ENDIAN = 1
TYPE_PV, TYPE_HVM = 1, 2
PAGE_SHIFT = 12
XEN_VERSION = (4, 17)
"""What streams made here say: the version whose interface is followed."""

_IMAGE_HEADER = struct.Struct(">QIIHHI")
_DOMAIN_HEADER = struct.Struct("<IHHII")
_RECORD_HEADER = struct.Struct("<II")
_MAX_RECORDS = 1 << 24
_NAMES = {int(kind): kind.name for kind in Kind}


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """:ivar version: of the stream. :ivar xen: version of the Xen that wrote it."""

    version: int = VERSION
    xen: tuple[int, int] = XEN_VERSION


def header_bytes() -> bytes:
    image = _IMAGE_HEADER.pack(MARKER, IDENT, VERSION, 0, 0, 0)
    return image + _DOMAIN_HEADER.pack(TYPE_PV, PAGE_SHIFT, 0, *XEN_VERSION)


def record_bytes(record: Record) -> bytes:
    body = record.body()
    return _RECORD_HEADER.pack(record.kind, len(body)) + body + bytes(-len(body) % 8)


def record_frame(kind: int, size: int) -> tuple[bytes, bytes]:
    """What goes before and behind a body of `size` bytes that is written in pieces."""
    return _RECORD_HEADER.pack(kind, size), bytes(-size % 8)


def read_header(source: Source) -> Header:
    """:raises StreamInvalid: no libxc stream. :raises StreamUnsupported: another version, endianness or kind."""
    marker, ident, version, options, _, _ = _IMAGE_HEADER.unpack(source.take(_IMAGE_HEADER.size, "libxc header"))
    if marker != MARKER or ident != IDENT:
        source.bad("there is no libxc header")
    if not OLDEST_VERSION <= version <= VERSION:
        raise StreamUnsupported(f"the image has version {version} of libxc's format, known are 2 and 3")
    if options & BIG_ENDIAN:
        raise StreamUnsupported("the image is a big-endian host's")
    kind, shift, _, major, minor = _DOMAIN_HEADER.unpack(source.take(_DOMAIN_HEADER.size, "domain header"))
    if kind == TYPE_HVM:
        raise StreamUnsupported("the image is an HVM or PVH domain's: only PV domains can be restored here")
    if kind != TYPE_PV or shift != PAGE_SHIFT:
        source.bad(f"domain type {kind} with pages of 2^{shift} bytes")
    return Header(version, (major, minor))


class _Order:
    """What has been seen, and what may come now."""

    def __init__(self, version: int) -> None:
        self.static = version >= VERSION  # STATIC_DATA_END is still to come
        self.bits = 0
        self.seen: set[Kind] = set()

    def check(self, kind: Kind) -> None:
        seen = self.seen
        if kind in _ONCE and kind in seen:
            raise StreamInvalid(f"the image has two {kind.name} records: it is damaged; give another")
        if kind is Kind.STATIC_DATA_END:
            self.static = False
        elif self.static and kind not in _STATIC:
            raise StreamInvalid(f"the image has {kind.name} before the end of its static data: it is damaged")
        if kind is Kind.PAGE_DATA and Kind.X86_PV_P2M_FRAMES not in seen:
            raise StreamInvalid("the image has pages before X86_PV_P2M_FRAMES: it is damaged; give another")
        if kind is Kind.END and (lacking := _NEEDED - seen):
            names = ", ".join(sorted(item.name for item in lacking))
            raise StreamInvalid(f"the image ends without {names}: it is damaged; give another")
        seen.add(kind)


_STATIC = frozenset({Kind.X86_PV_INFO, Kind.X86_CPUID_POLICY, Kind.X86_MSR_POLICY, Kind.STATIC_DATA_END})
_ONCE = _STATIC
_NEEDED = frozenset(
    {Kind.X86_PV_INFO, Kind.X86_PV_P2M_FRAMES, Kind.PAGE_DATA, Kind.SHARED_INFO, Kind.X86_PV_VCPU_BASIC}
)


def read_records(source: Source, version: int, *, wanted: Callable[[], bool] = lambda: True) -> Iterator[Record]:
    """The records up to END, which is the last; optional ones are left out.

    :param wanted: asked before each record: whether to go on.
    :raises StreamInvalid, StreamUnsupported: see `records.parse`; also for records out of order or too many.
    """
    order = _Order(version)
    for _ in range(_MAX_RECORDS):
        if not wanted():
            return
        number, size = _RECORD_HEADER.unpack(source.take(_RECORD_HEADER.size, "record header"))
        if size > records.MAX_BODY:
            source.bad(f"a record of {size} bytes, at most {records.MAX_BODY} are allowed")
        name = _NAMES.get(number, f"{number:#x}")
        body = source.take(size + -size % 8, f"{name} record")
        if any(body[size:]):
            source.bad(f"the padding of a {name} record is not zero")
        record = records.parse(number, body[:size] if len(body) != size else body, order.bits)
        if record is None:
            continue
        order.check(record.kind)
        if isinstance(record, PvInfo):
            order.bits = record.bits
        yield record
        if record.kind is Kind.END:
            return
    source.bad("it has too many records")
