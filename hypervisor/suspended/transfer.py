"""A suspended guest as a libxc stream, and back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hypervisor.cpu.policy import CONSTANT_MSRS, SUBLEAVES, CpuPolicy, Leaf
from hypervisor.errors import CpuIncompatible, StreamInvalid, StreamUnsupported
from hypervisor.suspended.capture import Captured
from hypervisor.suspended.state import ABSENT, GuestState, VcpuState, place
from hypervisor.toolstack.stream import libxc
from hypervisor.toolstack.stream.records import (
    NO_SUBLEAF,
    CpuidPolicy,
    Kind,
    Marker,
    MsrPolicy,
    P2mFrames,
    PageData,
    PvInfo,
    Record,
    SharedInfo,
    TscInfo,
    VcpuBlob,
    has_data,
)
from hypervisor.toolstack.stream.source import Source
from hypervisor.types import PAGE_SIZE

Array = np.ndarray[Any, Any]

XEN_LEAVES, XEN_FEATURE_LEAF = 0x4000_0000, 0x4000_0100
_SAVED_MSRS = (0xCE, 0x10A)
"""What Xen 4.17 tells of a policy: MSR_INTEL_PLATFORM_INFO and MSR_ARCH_CAPABILITIES."""
_ARCH_CAPABILITIES = 0x10A
_ENGINE_XCR0 = 3  # x87 and SSE

_MAX_LEAVES = 256


# -- out


def write(captured: Captured, out: Callable[[bytes | memoryview], object], memory: int = -1) -> int:
    """Write the stream, from its header to its END. The guest has to stay suspended meanwhile; any thread.

    :param out: takes all that it is given. :param memory: see `Captured.batches`.
    :returns: number of pages with data. :raises WrongState: see `hypervisor.suspended.capture`. :raises OSError.
    """
    state = captured.state
    out(libxc.header_bytes())
    for record in _head(state):
        out(libxc.record_bytes(record))
    pages = 0
    for pfns, types, contents in captured.batches(memory):
        head = PageData(pfns, types, b"").head()
        before, behind = libxc.record_frame(Kind.PAGE_DATA, len(head) + len(contents))
        for piece in (before, head, contents, behind):
            if len(piece):
                out(piece)
        pages += len(contents) // PAGE_SIZE
    for record in _tail(state):
        out(libxc.record_bytes(record))
    return pages


def _head(state: GuestState) -> Iterator[Record]:
    yield PvInfo(state.bits)
    if state.policy is not None:
        yield CpuidPolicy(tuple(_leaves(state.policy)))
        yield MsrPolicy(tuple((number, state.policy.msrs.get(number, 0)) for number in _SAVED_MSRS))
    yield Marker(Kind.STATIC_DATA_END)
    yield P2mFrames(0, len(state.types) - 1, state.p2m_frames)


def _leaves(policy: CpuPolicy) -> Iterator[tuple[int, ...]]:
    told = [
        (leaf, subleaf if leaf in SUBLEAVES else NO_SUBLEAF, *words) for (leaf, subleaf), words in policy.leaves.items()
    ]
    told += [(leaf, NO_SUBLEAF, 0, 0, 0, 0) for leaf in (XEN_LEAVES, XEN_FEATURE_LEAF)]
    yield from sorted(told)


def _tail(state: GuestState) -> Iterator[Record]:
    yield TscInfo(0, state.tsc_khz, state.elapsed_ns)
    yield SharedInfo(state.shared_info)
    for vcpu in state.vcpus:
        yield VcpuBlob(Kind.X86_PV_VCPU_BASIC, vcpu.id, vcpu.basic)
        for kind, content in (
            (Kind.X86_PV_VCPU_EXTENDED, vcpu.extended),
            (Kind.X86_PV_VCPU_XSAVE, vcpu.xsave),
            (Kind.X86_PV_VCPU_MSRS, vcpu.msrs),
        ):
            if content:
                yield VcpuBlob(kind, vcpu.id, content)
    yield Marker(Kind.END)


# -- in


class Incoming:
    """Reads a libxc stream from its header on: first what the guest is (`begin`), then all of it (`finish`).

    :ivar bits: word size. :ivar policy: its processor, None if the stream does not say.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.bits = 0
        self.policy: CpuPolicy | None = None
        self._p2m: P2mFrames | None = None
        self._records: Iterator[Record] = iter(())

    def begin(self) -> None:
        """Up to the first page. :raises StreamInvalid, StreamUnsupported, CpuIncompatible."""
        header = libxc.read_header(self._source)
        self._records = libxc.read_records(self._source, header.version)
        leaves: CpuidPolicy | None = None
        msrs: tuple[tuple[int, int], ...] = ()
        for record in self._records:
            if isinstance(record, PvInfo):
                self.bits = record.bits
            elif isinstance(record, CpuidPolicy):
                leaves = record
            elif isinstance(record, MsrPolicy):
                msrs = record.entries
            elif isinstance(record, P2mFrames):
                self._p2m = record
                break
        if self._p2m is None:
            raise StreamInvalid("the image is damaged: it has no X86_PV_P2M_FRAMES record; give another")
        if leaves is not None:
            self.policy = _policy(leaves, msrs)

    def finish(self, memory: Array, ram: int) -> tuple[GuestState, Array]:
        """The rest.

        :param memory: uint64, takes the pages: the first `ram` frames of a domain's memory, all zeros.
        :returns: the state, and the frame of each page number, as `hypervisor.suspended.state.place` gives it.
        :raises StreamInvalid, StreamUnsupported, CpuIncompatible: `memory` holds part of it then.
        """
        assert self._p2m is not None
        known = self._p2m
        if known.first or known.last >= 4 * ram + (1 << 16):
            raise StreamInvalid(
                f"the image's list of frames is of pages {known.first:#x} to {known.last:#x}, and its domain has at"
                f" most {ram:#x}: give more memory, or another image"
            )
        pages = _Pages(known.last + 1, memory, ram)
        shared_info, tsc = b"", TscInfo(0, 0, 0)
        blobs: dict[tuple[int, Kind], bytes] = {}
        for record in self._records:
            if isinstance(record, PageData):
                pages.take(record)
            elif isinstance(record, SharedInfo):
                shared_info = record.page
            elif isinstance(record, TscInfo):
                tsc = record
            elif isinstance(record, VcpuBlob):
                blobs[record.vcpu, record.kind] = record.content
            elif isinstance(record, P2mFrames):
                raise StreamUnsupported("the image's guest grew while it was saved: save it again")
            elif record.kind in (Kind.VERIFY, Kind.CHECKPOINT):
                raise StreamUnsupported(f"the image has a {record.kind.name} record: give one that `xl save` wrote")
        frames = pages.place()
        numbers = sorted({number for number, _ in blobs})
        vcpus = tuple(_vcpu(number, blobs) for number in numbers)
        types = pages.types
        state = GuestState(
            self.bits, types, known.frames, shared_info, vcpus, self.policy, tsc.khz, tsc.elapsed_ns & (1 << 63) - 1
        )
        return state, frames


class _Pages:
    """Pages as they come: those with numbers that the domain's frames have too lie there at once."""

    def __init__(self, count: int, memory: Array, ram: int) -> None:
        self.types = np.full(count, ABSENT, np.uint8)
        self._memory = memory.reshape(-1, 512)
        self._ram = ram
        self._high: dict[int, bytes] = {}

    def take(self, record: PageData) -> None:
        pfns = record.pfns.astype(np.int64)
        if (pfns >= len(self.types)).any():
            raise StreamInvalid(f"the image is damaged: page {int(pfns.max()):#x} is beyond its list of frames")
        there = has_data(record.types)
        gone = pfns[~there]
        for pfn in gone[has_data(self.types[gone])].tolist():
            if pfn < self._ram:
                self._memory[pfn] = 0
            self._high.pop(pfn, None)
        contents = np.frombuffer(record.pages, np.uint64).reshape(-1, 512)
        full = pfns[there]
        low = full < self._ram
        # Zeros over what was never written would only cost memory.
        needed = low & (contents.any(axis=1) | has_data(self.types[full]))
        self.types[pfns] = np.where(there, record.types, ABSENT)
        self._memory[full[needed]] = contents[needed]
        for row in np.flatnonzero(~low).tolist():
            self._high[int(full[row])] = contents[row].tobytes()
        if len(self._high) > self._ram:
            raise StreamInvalid("the image is damaged: it has more pages than its domain; give another")

    def place(self) -> Array:
        frames = place(self.types, self._ram)
        for pfn, content in self._high.items():
            self._memory[frames[pfn]] = np.frombuffer(content, np.uint64)
        return frames


def _vcpu(number: int, blobs: dict[tuple[int, Kind], bytes]) -> VcpuState:
    def content(kind: Kind) -> bytes:
        return blobs.get((number, kind), b"")

    basic = content(Kind.X86_PV_VCPU_BASIC)
    if not basic:
        raise StreamInvalid(f"the image is damaged: it has no registers of vCPU {number}; give another")
    xsave, msrs = content(Kind.X86_PV_VCPU_XSAVE), content(Kind.X86_PV_VCPU_MSRS)
    if xsave:
        used = int.from_bytes(xsave[8:16], "little")
        if used & ~_ENGINE_XCR0:
            raise CpuIncompatible(
                f"the image's guest uses extended processor state {used:#x} (AVX and the like), which this host's"
                " engine lacks: start it with a lower CPU policy before it is saved"
            )
    for index, _, value in struct.iter_unpack("<IIQ", msrs):
        if value:
            raise CpuIncompatible(f"the image's guest uses MSR {index:#x}, which this host's engine lacks")
    return VcpuState(number, basic, content(Kind.X86_PV_VCPU_EXTENDED))


def _policy(record: CpuidPolicy, msrs: tuple[tuple[int, int], ...]) -> CpuPolicy:
    if len(record.leaves) > _MAX_LEAVES:
        raise StreamInvalid(f"the image is damaged: a CPU policy of {len(record.leaves)} leaves; give another")
    leaves: dict[tuple[int, int], Leaf] = {}
    for leaf, subleaf, a, b, c, d in record.leaves:
        if not XEN_LEAVES <= leaf < XEN_LEAVES + 0x1_0000:
            leaves[leaf, 0 if subleaf == NO_SUBLEAF else subleaf] = (a, b, c, d)
    known = dict(CONSTANT_MSRS)
    for number, value in msrs:
        if number == _ARCH_CAPABILITIES and not value:
            continue  # it is not shown
        known[number] = value
    return CpuPolicy("of the image", leaves, known)
