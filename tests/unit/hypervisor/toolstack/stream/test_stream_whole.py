"""Streams as wholes: headers, order, truncation at every place, flipped bits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_rig import CONFIG, libxc_bytes, read_all, stream_records, whole

from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.toolstack.stream import envelope, libxc
from hypervisor.toolstack.stream.records import Kind, Marker

LIBXL_AT = len(envelope.opening(CONFIG)) - 24
LIBXC_AT = LIBXL_AT + 24


def test_there_and_back() -> None:
    config, found = read_all(whole())
    assert config == CONFIG
    assert [record.body() for record in found] == [record.body() for record in stream_records()]


def test_cut_short_anywhere() -> None:
    data = whole()
    for size in [*range(0, 700), *range(700, len(data), 97), len(data) - 1]:
        with pytest.raises(StreamInvalid) as caught:
            read_all(data[:size])
        assert "\n" not in caught.value.message


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bits(data: st.DataObject) -> None:
    image = bytearray(whole())
    places = st.one_of(st.integers(0, 8 * (LIBXC_AT + 400) - 1), st.integers(0, 8 * len(image) - 1))
    for at in data.draw(st.lists(places, min_size=1, max_size=3)):
        image[at >> 3] ^= 1 << (at & 7)
    try:
        read_all(bytes(image))
    except StreamInvalid as exc:
        assert exc.message and "\n" not in exc.message


def _edit(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(form, image, at, value)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (_edit(0, "<B", 0), StreamInvalid, "xl's format"),
        (_edit(32, ">I", 0x01020304), StreamUnsupported, "big-endian"),
        (_edit(36, "<I", 7), StreamUnsupported, "flags 0x7"),
        (_edit(36, "<I", 2), StreamUnsupported, "flags 0x2"),
        (_edit(44, "<I", 1 << 31), StreamInvalid, "configuration of"),
        (_edit(48, "<I", 1 << 31), StreamInvalid, "length is wrong"),
        (_edit(52, "<B", ord("x")), StreamInvalid, "no JSON"),
        (_edit(LIBXL_AT, ">Q", 1), StreamInvalid, "libxl header"),
        (_edit(LIBXL_AT + 8, ">I", 3), StreamUnsupported, "version 3 of libxl"),
        (_edit(LIBXL_AT + 12, ">I", 1), StreamUnsupported, "big-endian"),
        (_edit(LIBXL_AT + 12, ">I", 2), StreamUnsupported, "before Xen 4.6"),
        (_edit(LIBXL_AT + 16, "<I", 4), StreamUnsupported, "continuous"),
        (_edit(LIBXL_AT + 16, "<I", 9), StreamUnsupported, "kind 0x9"),
        (_edit(LIBXC_AT, ">Q", 1), StreamInvalid, "libxc header"),
        (_edit(LIBXC_AT + 12, ">I", 4), StreamUnsupported, "version 4 of libxc"),
        (_edit(LIBXC_AT + 12, ">I", 1), StreamUnsupported, "version 1 of libxc"),
        (_edit(LIBXC_AT + 16, ">H", 1), StreamUnsupported, "big-endian"),
        (_edit(LIBXC_AT + 24, "<I", 2), StreamUnsupported, "HVM"),
        (_edit(LIBXC_AT + 24, "<I", 3), StreamInvalid, "domain type 3"),
        (_edit(LIBXC_AT + 28, "<H", 13), StreamInvalid, "2\\^13"),
        (_edit(LIBXC_AT + 44, "<I", 1 << 30), StreamInvalid, "record of"),
    ],
)
def test_headers(edit: Callable[[bytearray], None], error: type[StreamInvalid], says: str) -> None:
    image = bytearray(whole())
    edit(image)
    with pytest.raises(StreamInvalid, match=says) as caught:
        read_all(bytes(image))
    assert type(caught.value) is error


def test_order() -> None:
    given_records = stream_records()

    def without(*kinds: Kind) -> bytes:
        return whole([record for record in given_records if record.kind not in kinds])

    for kinds, says in (
        ((Kind.X86_PV_INFO,), "before X86_PV_INFO"),
        ((Kind.STATIC_DATA_END,), "static data"),
        ((Kind.X86_PV_P2M_FRAMES,), "before X86_PV_P2M_FRAMES"),
        ((Kind.PAGE_DATA,), "without PAGE_DATA"),
        ((Kind.SHARED_INFO,), "without SHARED_INFO"),
        ((Kind.X86_PV_VCPU_BASIC,), "without X86_PV_VCPU_BASIC"),
        ((Kind.END,), "cut short"),
    ):
        with pytest.raises(StreamInvalid, match=says):
            read_all(without(*kinds))
    with pytest.raises(StreamInvalid, match="two X86_PV_INFO"):
        read_all(whole([given_records[0], *given_records]))
    read_all(without(Kind.X86_TSC_INFO, Kind.X86_CPUID_POLICY, Kind.X86_MSR_POLICY))


def test_the_version_before_has_no_end_of_static_data() -> None:
    older = [r for r in stream_records() if r.kind not in (Kind.STATIC_DATA_END, Kind.X86_CPUID_POLICY)]
    image = bytearray(whole(older))
    struct.pack_into(">I", image, LIBXC_AT + 12, 2)
    assert len(read_all(bytes(image))[1]) == len(older)


def test_optional_and_emulators_records_are_passed_over() -> None:
    extra = struct.pack("<II", 1 << 31 | 5, 3) + b"abc" + bytes(5)
    data = envelope.opening(CONFIG)[:-8] + extra + struct.pack("<II", 2, 8) + bytes(8) + struct.pack("<II", 1, 0)
    inner = libxc_bytes(stream_records())
    end = len(libxc.record_bytes(Marker(Kind.END)))
    data += inner[:-end] + extra + inner[-end:] + extra + envelope.closing()
    assert len(read_all(data)[1]) == len(stream_records())
    with pytest.raises(StreamInvalid, match="padding"):
        read_all(data.replace(extra, extra[:-1] + b"\1", 1))


def test_no_libxc_stream() -> None:
    data = envelope.opening(CONFIG)[:-8] + struct.pack("<II", 2, 0) * 65
    with pytest.raises(StreamInvalid, match="no libxc stream"):
        read_all(data)


def test_a_configuration_that_is_hostile() -> None:
    def image(text: bytes) -> bytes:
        data = struct.pack("<I", len(text)) + text
        return envelope.MAGIC + struct.pack("<IIII", envelope.BYTE_ORDER, 3, 0, len(data)) + data

    for text in (b"[1]\0", b"[" * 100_000 + b"\0", b"{}", b"\xff\0", b"\0"):
        with pytest.raises(StreamInvalid):
            read_all(image(text))
    with pytest.raises(StreamInvalid, match="configuration has"):
        envelope.opening({"a": "x" * (1 << 20)})
    assert json.loads(envelope.opening({"a": 1})[52:].partition(b"\0")[0]) == {"a": 1}
