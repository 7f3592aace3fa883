"""Checksums and segmentation against a slow reference and against what must come back together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.devices.net import headers, offload
from hypervisor.devices.net.message import GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, Header
from tests.support.net_frontend import checksums_right, ethernet, tcp4, tcp6, udp4, words_sum


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_sum_is_that_of_rfc_1071(data: bytes) -> None:
    assert offload.fold(offload.total(data)) == 0xFFFF - words_sum([data])


def test_known_sum() -> None:
    # RFC 1071, section 3: 0001 f203 f4f5 f6f7 sum to ddf2.
    assert offload.fold(offload.total(bytes.fromhex("0001f203f4f5f6f7"))) == 0xFFFF - 0xDDF2


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["tcp4", "tcp6", "udp4"]))
def test_checksum_is_made(payload: bytes, kind: str) -> None:
    frame = {"tcp4": tcp4, "tcp6": tcp6, "udp4": udp4}[kind](payload)
    place = headers.checksum_place(frame)
    assert place is not None
    done = offload.checksummed(frame + b"\0" * 9)  # Ethernet's padding is no part of it
    assert done is not None
    if kind != "tcp6":
        done[24:26] = b"\0\0"
        done[24:26] = offload.fold(offload.total(done[14:34])).to_bytes(2, "big")
    assert checksums_right(bytes(done))


def test_udp_checksum_zero_is_sent_as_ones() -> None:
    done = offload.checksummed(udp4(b"\0\0"))
    assert done is not None
    done = offload.checksummed(udp4(bytes(done[40:42])))  # a payload that makes up for all the rest
    assert done is not None
    assert done[40:42] == b"\xff\xff"


@pytest.mark.parametrize("make", [tcp4, tcp6])
@settings(deadline=None)
@given(data=st.data())
def test_segments_come_together_again(make: object, data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=1, max_size=5000))
    size = data.draw(st.integers(1, 2000))
    sequence = data.draw(st.integers(0, 0xFFFF_FFFF))
    if -(-len(payload) // size) > offload.MAX_SEGMENTS:
        return
    frame = make(payload, flags=0x99, sequence=sequence)  # type: ignore[operator]
    kind = GSO_TCPV4 if make is tcp4 else GSO_TCPV6
    segments = offload.segment(Header(NEEDS_CSUM, kind, 0, size), frame)
    assert segments
    at = 54 if make is tcp4 else 74
    l4 = at - 20
    assert b"".join(segment[at:] for segment in segments) == payload
    for number, segment in enumerate(segments):
        assert checksums_right(segment)
        assert int.from_bytes(segment[l4 + 4 : l4 + 8], "big") == (sequence + number * size) & 0xFFFF_FFFF
        assert bool(segment[l4 + 13] & 0x09) == (number == len(segments) - 1), "FIN and PSH on the last only"
        assert bool(segment[l4 + 13] & 0x80) == (number == 0), "CWR on the first only"
        if make is tcp4:
            assert int.from_bytes(segment[18:20], "big") == 7 + number


@pytest.mark.parametrize(
    ("header", "frame"),
    [
        (Header(NEEDS_CSUM, GSO_TCPV6, 0, 100), tcp4(b"x" * 500)),
        (Header(NEEDS_CSUM, GSO_TCPV4, 0, 0), tcp4(b"x" * 500)),
        (Header(NEEDS_CSUM, GSO_TCPV4, 0, 1), tcp4(b"x" * (offload.MAX_SEGMENTS + 1))),
        (Header(NEEDS_CSUM, GSO_TCPV4, 0, 100), tcp4(b"")),
        (Header(NEEDS_CSUM, GSO_TCPV4, 0, 100), udp4(b"x" * 500)),
        (Header(NEEDS_CSUM), ethernet(b"x" * 60)),
        (Header(NEEDS_CSUM), tcp4(b"x" * 60)[:40]),
    ],
)
def test_what_cannot_be_is_refused(header: Header, frame: bytes) -> None:
    assert offload.plain(header, frame) is None


@settings(deadline=None)
@given(st.binary(min_size=14, max_size=400), st.integers(0, 255), st.integers(0, 255), st.integers(0, 65535))
def test_random_frames_do_no_harm(frame: bytes, flags: int, gso: int, size: int) -> None:
    for kind in (b"\x08\0", b"\x86\xdd"):
        offload.plain(Header(flags, gso, 0, size), frame[:12] + kind + frame[14:])


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 255), st.binary(min_size=14, max_size=120))
def test_flipped_bytes_do_no_harm(at: int, value: int, tail: bytes) -> None:
    for frame in (tcp4(tail), tcp6(tail), udp4(tail)):
        changed = bytearray(frame)
        changed[at % len(changed)] = value
        for gso in (0, GSO_TCPV4, GSO_TCPV6):
            offload.plain(Header(NEEDS_CSUM, gso, 0, 10), bytes(changed))
