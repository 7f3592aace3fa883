"""Segments put together and cut again are the same segments."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.devices.net import message, offload
from hypervisor.devices.net.coalesce import Coalescer
from hypervisor.devices.net.message import GSO_TCPV4, HEADER_BYTES, NEEDS_CSUM, VALIDATED, Header
from tests.support.net_frontend import tcp4, udp4


def put(frames: list[bytes]) -> list[bytes]:
    coalescer = Coalescer()
    ready = [coalescer.add(memoryview(frame)) for frame in frames]
    return [bytes(data) for data in [*ready, coalescer.flush(), coalescer.flush()] if data is not None]


def cut(messages: list[bytes]) -> list[bytes]:
    """The frames again."""
    result: list[bytes] = []
    for data in messages:
        header = message.parse(data)
        assert message.sane(header, len(data) - HEADER_BYTES)
        pieces = offload.plain(header, data[HEADER_BYTES:])
        assert pieces is not None
        result += [bytes(piece) for piece in pieces]
    return result


def segments(payload: bytes, size: int, *, flags: int = 0x18, sequence: int = 1000) -> list[bytes]:
    made: list[bytes] = []
    for at in range(0, len(payload), 20 * size):  # a frame cannot be longer than 64 KiB
        frame = tcp4(payload[at : at + 20 * size], flags=flags, sequence=(sequence + at) & 0xFFFF_FFFF, id_=len(made))
        pieces = offload.segment(Header(NEEDS_CSUM, GSO_TCPV4, 54, size), frame)
        assert pieces is not None
        made += pieces
    return made


def test_a_flow_becomes_large_frames() -> None:
    frames = segments(os.urandom(60 * 1460), 1460, flags=0x10)
    messages = put(frames)
    assert len(messages) == 2, "one would be longer than a frame may be"
    assert all(message.parse(data).gso_size == 1460 for data in messages)
    assert cut(messages) == frames


@settings(deadline=None)
@given(st.data())
def test_what_went_in_comes_out(data: st.DataObject) -> None:
    """Frames of several flows, lost and doubled ones, flags, others between: nothing is changed, nothing reordered."""
    frames: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["flow", "udp", "fin", "syn", "odd", "short"]))
        size = data.draw(st.sampled_from([1, 7, 100, 536]))
        if kind == "udp":
            frames.append(udp4(b"x" * size))
        elif kind == "odd":
            frames.append(data.draw(st.binary(min_size=14, max_size=80)))
        elif kind == "short":
            frames.append(tcp4(b""))
        else:
            flags = {"flow": 0x18, "fin": 0x19, "syn": 0x12}[kind]
            sequence = data.draw(st.sampled_from([1000, 2000, 0xFFFF_FFF0]))
            made = segments(os.urandom(data.draw(st.integers(1, 3000))), size, flags=flags, sequence=sequence)
            if data.draw(st.booleans()) and len(made) > 2:
                del made[1]
            frames += made
    out = cut(put(frames))
    assert [frame[38:] for frame in out] == [frame[38:] for frame in frames], (
        "ports, sequence, flags, payload, checksums"
    )
    assert [without_id(frame) for frame in out] == [without_id(frame) for frame in frames]


def without_id(frame: bytes) -> bytes:
    """IP's identification and checksum may differ when the sender did not count the one up."""
    return frame[:18] + frame[20:24] + frame[26:] if frame[12:15] == b"\x08\0\x45" else frame


def test_options_keep_segments_apart() -> None:
    first = segments(b"a" * 100, 100, flags=0x10)[0]
    second = offload.segment(
        Header(NEEDS_CSUM, GSO_TCPV4, 54, 100), tcp4(b"b" * 100, flags=0x10, sequence=1100, options=b"\1\1\1\1")
    )
    assert second is not None
    assert put([first, second[0]]) == [VALIDATED + first, VALIDATED + second[0]]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=0, max_size=70), max_size=6))
def test_random_frames_do_no_harm(frames: list[bytes]) -> None:
    made = [b"\0" * 12 + b"\x08\0\x45" + frame for frame in frames]
    assert put(made) == [VALIDATED + frame for frame in made]
