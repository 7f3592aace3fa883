"""Each kind of record there and back, damaged and cut short: properties over many of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.toolstack.stream import libxc, records
from hypervisor.toolstack.stream.records import (
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
)
from hypervisor.toolstack.stream.source import Source

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
pfns = st.integers(0, (1 << 52) - 1)
TYPES = [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]


@st.composite
def p2m_frames(draw: st.DrawFn) -> P2mFrames:
    first = draw(st.integers(0, 5000))
    last = draw(st.integers(first, first + 5000))
    return P2mFrames(first, last, tuple(draw(pfns) for _ in range(last // 512 - first // 512 + 1)))


@st.composite
def page_data(draw: st.DrawFn) -> PageData:
    entries = draw(st.lists(st.tuples(pfns, st.sampled_from(TYPES)), min_size=1, max_size=6))
    types = np.array([kind for _, kind in entries], np.uint8)
    size = int(records.has_data(types).sum())
    pages = b"".join(bytes([draw(st.integers(0, 255))]) * 4096 for _ in range(size))
    return PageData(np.array([pfn for pfn, _ in entries], np.uint64), types, pages)


@st.composite
def vcpu_blobs(draw: st.DrawFn) -> VcpuBlob:
    kind, sizes = draw(
        st.sampled_from(
            (
                (Kind.X86_PV_VCPU_BASIC, [5168]),
                (Kind.X86_PV_VCPU_EXTENDED, [0, 1, 64, 128]),
                (Kind.X86_PV_VCPU_XSAVE, [16, 848]),
                (Kind.X86_PV_VCPU_MSRS, [0, 16, 160]),
            )
        )
    )
    size = draw(st.sampled_from(sizes))
    return VcpuBlob(kind, draw(st.integers(0, records.MAX_VCPU)), bytes([draw(st.integers(0, 255))]) * size)


ANY = st.one_of(
    st.sampled_from([Marker(kind) for kind in (Kind.END, Kind.STATIC_DATA_END, Kind.VERIFY, Kind.CHECKPOINT)]),
    st.sampled_from([PvInfo(64), PvInfo(32)]),
    p2m_frames(),
    page_data(),
    vcpu_blobs(),
    st.binary(min_size=4096, max_size=4096).map(SharedInfo),
    st.builds(TscInfo, u32, u32, u64, u32),
    st.lists(st.tuples(u32, u32, u32, u32, u32, u32), min_size=1, max_size=40).map(lambda x: CpuidPolicy(tuple(x))),
    st.lists(st.tuples(u32, u64), min_size=1, max_size=20).map(lambda x: MsrPolicy(tuple(x))),
)
MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def same(one: Record, other: Record | None) -> bool:
    return other is not None and (one.kind, one.body()) == (other.kind, other.body())


@MANY
@given(ANY)
def test_there_and_back(record: Record) -> None:
    assert same(record, records.parse(record.kind, record.body(), 64))
    data = libxc.record_bytes(record)
    before, behind = libxc.record_frame(record.kind, len(record.body()))
    assert len(data) % 8 == 0 and data == before + record.body() + behind


@MANY
@given(ANY, st.data())
def test_cut_short_or_too_long(record: Record, data: st.DataObject) -> None:
    """Another length is refused, or it is another whole record; never anything else."""
    body = record.body()
    other = body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body + bytes(8)
    try:
        found = records.parse(record.kind, other, 64)
    except StreamInvalid as exc:
        assert record.kind.name in exc.message and "\n" not in exc.message
    else:
        assert found is not None and found.body() == other


@MANY
@given(ANY, st.data())
def test_flipped_bits(record: Record, data: st.DataObject) -> None:
    body = bytearray(record.body())
    if not body:
        return
    for at in data.draw(st.lists(st.integers(0, min(len(body), 64) * 8 - 1), min_size=1, max_size=3)):
        body[at >> 3] ^= 1 << (at & 7)
    try:
        found = records.parse(record.kind, bytes(body), 64)
    except StreamInvalid as exc:
        assert "\n" not in exc.message
    else:
        assert found is not None and found.kind is record.kind


@MANY
@given(u32, st.binary(max_size=64), st.sampled_from([0, 32, 64]))
def test_anything(number: int, body: bytes, bits: int) -> None:
    try:
        found = records.parse(number, body, bits)
    except StreamInvalid as exc:
        assert "\n" not in exc.message
    else:
        assert (found is None) == bool(number & records.OPTIONAL)


@pytest.mark.parametrize(
    "kind", [Kind.HVM_CONTEXT, Kind.HVM_PARAMS, Kind.TOOLSTACK, Kind.CHECKPOINT_DIRTY_PFN_LIST, 19]
)
def test_kinds_that_pv_guests_have_not(kind: int) -> None:
    with pytest.raises(StreamUnsupported):
        records.parse(kind, b"", 64)


def test_types_of_pages() -> None:
    for number in range(16):
        body = PageData(np.array([1], np.uint64), np.array([number], np.uint8), bytes(4096 * (number < 13))).body()
        if number in TYPES:
            assert same(PageData.parse(body), records.parse(Kind.PAGE_DATA, body, 64))
        else:
            with pytest.raises(StreamInvalid, match=f"type {number}"):
                PageData.parse(body)


def test_memory_grows_with_what_is_there() -> None:
    """A length of gigabytes is refused, or found out at the end of the file, before anything of that size is made."""
    asked: list[int] = []

    def read(size: int) -> bytes:
        asked.append(size)
        return b""

    with pytest.raises(StreamInvalid, match="cut short"):
        Source(read).take(1 << 40, "nothing")
    assert max(asked) <= 1 << 20
