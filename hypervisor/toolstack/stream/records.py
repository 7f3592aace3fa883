"""The records of a libxc stream, and their bytes. Integers are little-endian; see docs/specs/libxc-migration-stream.

A class for each kind that a PV guest's stream has: `body` gives its bytes, `parse` makes one of them. Bodies come
checked for length and range, not for meaning: whether a frame exists is for whoever rebuilds the guest.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Protocol, Self

import numpy as np

from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.types import PAGE_SIZE

MAX_BODY = 8 << 20
"""Longest body (REC_LENGTH_MAX of xg_sr_stream_format.h)."""
MAX_BATCH = 1024
"""Most pages of one PAGE_DATA record (MAX_BATCH_SIZE)."""
OPTIONAL = 1 << 31
MAX_VCPU = 8191
"""Highest number of a vCPU that Xen's toolstack knows; how many there can be here is another matter."""
NO_SUBLEAF = 0xFFFF_FFFF

Array = np.ndarray[Any, Any]


class Kind(enum.IntEnum):
    END = 0
    PAGE_DATA = 1
    X86_PV_INFO = 2
    X86_PV_P2M_FRAMES = 3
    X86_PV_VCPU_BASIC = 4
    X86_PV_VCPU_EXTENDED = 5
    X86_PV_VCPU_XSAVE = 6
    SHARED_INFO = 7
    X86_TSC_INFO = 8
    HVM_CONTEXT = 9
    HVM_PARAMS = 10
    TOOLSTACK = 11
    X86_PV_VCPU_MSRS = 12
    VERIFY = 13
    CHECKPOINT = 14
    CHECKPOINT_DIRTY_PFN_LIST = 15
    STATIC_DATA_END = 16
    X86_CPUID_POLICY = 17
    X86_MSR_POLICY = 18


class PageType(enum.IntEnum):
    """Bits 60-63 of a PAGE_DATA entry (XEN_DOMCTL_PFINFO_* >> 28). L1..L4 with `PINNED` are pinned tables."""

    NORMAL = 0
    L1 = 1
    L2 = 2
    L3 = 3
    L4 = 4
    BROKEN = 13
    ALLOCATE = 14
    ABSENT = 15


PINNED = 8
TABLES = (PageType.L1, PageType.L2, PageType.L3, PageType.L4)
_KNOWN_TYPES = np.isin(np.arange(16), [*PageType, *(PINNED | level for level in TABLES)])
_PFN_MASK, _RESERVED = np.uint64((1 << 52) - 1), np.uint64(0xFF << 52)
_TYPE_SHIFT = np.uint64(60)


class Record(Protocol):
    @property
    def kind(self) -> Kind: ...

    def body(self) -> bytes: ...


def has_data(types: Array) -> Array:
    """Of PAGE_DATA types: which have a page in the record."""
    return types < PageType.BROKEN


@dataclasses.dataclass(frozen=True, slots=True)
class Marker:
    """A record without a body: END, STATIC_DATA_END, VERIFY, CHECKPOINT."""

    kind: Kind

    def body(self) -> bytes:
        return b""


@dataclasses.dataclass(frozen=True, slots=True)
class PvInfo:
    """:ivar bits: word size, 64 (four levels of page tables) or 32 (three)."""

    kind: ClassVar[Kind] = Kind.X86_PV_INFO
    bits: int

    def body(self) -> bytes:
        return struct.pack("<BB6x", self.bits // 8, 4 if self.bits == 64 else 3)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        _sized(cls.kind, body, 8)
        width, levels = body[0], body[1]
        if (width, levels) not in ((8, 4), (4, 3)):
            _bad(cls.kind, f"words of {width} bytes with {levels} levels of page tables")
        return cls(width * 8)


@dataclasses.dataclass(frozen=True, slots=True)
class P2mFrames:
    """Where the guest keeps its list of frames.

    :ivar first, last: the page numbers whose entries are told.
    :ivar frames: page numbers of the list's own pages; the first holds the entry of `first`.
    """

    kind: ClassVar[Kind] = Kind.X86_PV_P2M_FRAMES
    first: int
    last: int
    frames: tuple[int, ...]

    def body(self) -> bytes:
        return struct.pack(f"<II{len(self.frames)}Q", self.first, self.last, *self.frames)

    @classmethod
    def parse(cls, body: bytes, bits: int) -> Self:
        """:param bits: the guest's word size."""
        if len(body) < 8 or len(body) % 8:
            _bad(cls.kind, f"{len(body)} bytes")
        first, last = struct.unpack_from("<II", body)
        each = PAGE_SIZE * 8 // bits
        count = last // each - first // each + 1
        if first > last or len(body) != 8 + 8 * count:
            _bad(cls.kind, f"{len(body)} bytes for pages {first:#x} to {last:#x}")
        return cls(first, last, struct.unpack_from(f"<{count}Q", body, 8))


@dataclasses.dataclass(frozen=True, slots=True)
class PageData:
    """A batch of pages.

    :ivar pfns: uint64. :ivar types: uint8 of the same length, see `PageType` and `PINNED`.
    :ivar pages: the contents of those with data (`has_data`), one after the other.
    """

    kind: ClassVar[Kind] = Kind.PAGE_DATA
    pfns: Array
    types: Array
    pages: bytes | memoryview

    def head(self) -> bytes:
        """All but the contents."""
        entries = self.types.astype(np.uint64) << _TYPE_SHIFT | self.pfns.astype(np.uint64)
        return struct.pack("<II", len(self.pfns), 0) + entries.astype("<u8").tobytes()

    def body(self) -> bytes:
        return self.head() + bytes(self.pages)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if len(body) < 16:
            _bad(cls.kind, f"{len(body)} bytes")
        count, _ = struct.unpack_from("<II", body)
        if not 0 < count <= MAX_BATCH or len(body) < 8 + 8 * count:
            _bad(cls.kind, f"{count} pages in {len(body)} bytes")
        entries = np.frombuffer(body, dtype="<u8", count=count, offset=8).astype(np.uint64)
        if (entries & _RESERVED).any():
            _bad(cls.kind, "reserved bits of a page number are set")
        types = (entries >> _TYPE_SHIFT).astype(np.uint8)
        if not _KNOWN_TYPES[types].all():
            _bad(cls.kind, f"no page has type {int(types[~_KNOWN_TYPES[types]][0])}")
        size = int(np.count_nonzero(has_data(types))) * PAGE_SIZE
        if len(body) != 8 + 8 * count + size:
            _bad(cls.kind, f"{len(body)} bytes instead of {8 + 8 * count + size}")
        return cls(entries & _PFN_MASK, types, memoryview(body)[8 + 8 * count :])


@dataclasses.dataclass(frozen=True, slots=True)
class VcpuBlob:
    """VCPU_BASIC (`struct vcpu_guest_context`), EXTENDED, XSAVE or MSRS of one vCPU.

    :ivar content: empty: Xen 4.6 to 4.8 wrote such, and they mean nothing.
    """

    kind: Kind
    vcpu: int
    content: bytes

    def body(self) -> bytes:
        return struct.pack("<II", self.vcpu, 0) + self.content

    @classmethod
    def parse(cls, kind: Kind, body: bytes, bits: int) -> Self:
        if len(body) < 8:
            _bad(kind, f"{len(body)} bytes")
        number, content = int.from_bytes(body[:4], "little"), body[8:]
        if number > MAX_VCPU:
            _bad(kind, f"vCPU {number}")
        if content and not _BLOB_SIZES[kind](len(content), bits):
            _bad(kind, f"{len(content)} bytes of state for a {bits}-bit guest")
        return cls(kind, number, content)


CONTEXT_SIZES = {64: 5168, 32: 2800}
"""Bytes of `struct vcpu_guest_context` by the guest's word size (public/arch-x86/xen.h)."""
MSR_ENTRY = 16
_MAX_XSAVE = 64 << 10
_BLOB_SIZES: dict[Kind, Callable[[int, int], bool]] = {
    Kind.X86_PV_VCPU_BASIC: lambda size, bits: size == CONTEXT_SIZES[bits],
    Kind.X86_PV_VCPU_EXTENDED: lambda size, bits: size <= 128,
    Kind.X86_PV_VCPU_XSAVE: lambda size, bits: 16 <= size <= _MAX_XSAVE,
    Kind.X86_PV_VCPU_MSRS: lambda size, bits: size % MSR_ENTRY == 0 and size <= 256 * MSR_ENTRY,
}


@dataclasses.dataclass(frozen=True, slots=True)
class SharedInfo:
    """:ivar page: `struct shared_info` of the guest's word size, a whole page."""

    kind: ClassVar[Kind] = Kind.SHARED_INFO
    page: bytes

    def body(self) -> bytes:
        return self.page

    @classmethod
    def parse(cls, body: bytes) -> Self:
        _sized(cls.kind, body, PAGE_SIZE)
        return cls(body)


@dataclasses.dataclass(frozen=True, slots=True)
class TscInfo:
    """:ivar mode: XEN_CPUID_TSC_MODE_*; `khz` ticks per millisecond. :ivar elapsed_ns: system time of the guest."""

    kind: ClassVar[Kind] = Kind.X86_TSC_INFO
    mode: int
    khz: int
    elapsed_ns: int
    incarnation: int = 1

    def body(self) -> bytes:
        return struct.pack("<IIQII", self.mode, self.khz, self.elapsed_ns, self.incarnation, 0)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        _sized(cls.kind, body, 24)
        return cls(*struct.unpack("<IIQI4x", body))


@dataclasses.dataclass(frozen=True, slots=True)
class CpuidPolicy:
    """:ivar leaves: leaf, subleaf (`NO_SUBLEAF` where there are none), EAX, EBX, ECX, EDX."""

    kind: ClassVar[Kind] = Kind.X86_CPUID_POLICY
    leaves: tuple[tuple[int, ...], ...]

    def body(self) -> bytes:
        return b"".join(struct.pack("<6I", *leaf) for leaf in self.leaves)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if not body or len(body) % 24 or len(body) > 24 * 1024:
            _bad(cls.kind, f"{len(body)} bytes")
        return cls(tuple(struct.iter_unpack("<6I", body)))


@dataclasses.dataclass(frozen=True, slots=True)
class MsrPolicy:
    """:ivar entries: number, value."""

    kind: ClassVar[Kind] = Kind.X86_MSR_POLICY
    entries: tuple[tuple[int, int], ...]

    def body(self) -> bytes:
        return b"".join(struct.pack("<IIQ", number, 0, value) for number, value in self.entries)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if not body or len(body) % MSR_ENTRY or len(body) > MSR_ENTRY * 1024:
            _bad(cls.kind, f"{len(body)} bytes")
        return cls(tuple((number, value) for number, _, value in struct.iter_unpack("<IIQ", body)))


_MARKERS = (Kind.END, Kind.STATIC_DATA_END, Kind.VERIFY, Kind.CHECKPOINT)
_PLAIN: dict[Kind, Callable[[bytes], Record]] = {
    Kind.X86_PV_INFO: PvInfo.parse,
    Kind.PAGE_DATA: PageData.parse,
    Kind.SHARED_INFO: SharedInfo.parse,
    Kind.X86_TSC_INFO: TscInfo.parse,
    Kind.X86_CPUID_POLICY: CpuidPolicy.parse,
    Kind.X86_MSR_POLICY: MsrPolicy.parse,
}


def parse(number: int, body: bytes, bits: int) -> Record | None:
    """:param bits: the guest's word size, 0 while no PV_INFO was seen.

    :returns: None for an optional record, which is none of our business.
    :raises StreamInvalid: it is not what its kind says. :raises StreamUnsupported: no kind for a PV guest.
    """
    if number & OPTIONAL:
        return None
    try:
        kind = Kind(number)
    except ValueError:
        raise StreamUnsupported(
            f"the image has a record of kind {number:#x}, which is not known here: it is of a later version of Xen"
        ) from None
    if kind in _MARKERS:
        _sized(kind, body, 0)
        return Marker(kind)
    if kind in _PLAIN:
        return _PLAIN[kind](body)
    if kind is Kind.X86_PV_P2M_FRAMES or kind in _BLOB_SIZES:
        if not bits:
            _bad(kind, "it comes before X86_PV_INFO")
        return P2mFrames.parse(body, bits) if kind is Kind.X86_PV_P2M_FRAMES else VcpuBlob.parse(kind, body, bits)
    raise StreamUnsupported(f"the image has a {kind.name} record, which PV guests have not: give one of a PV domain")


def _sized(kind: Kind, body: bytes, size: int) -> None:
    if len(body) != size:
        _bad(kind, f"{len(body)} bytes instead of {size}")


def _bad(kind: Kind, why: str) -> NoReturn:
    raise StreamInvalid(f"the image's {kind.name} record is damaged: {why}; give another")
