"""Framing: any cut of the byte stream, and streams that are no protocol at all."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.xenstore.errors import (
    ERRNO_NAMES,
    Conflict,
    Invalid,
    ProtocolViolation,
    XenstoreError,
    errno_name,
    from_errno_name,
)
from hypervisor.xenstore.wire import HEADER, PAYLOAD_MAX, Op, Packet, Parser, number, one_string, strings

u32 = st.integers(0, 0xFFFF_FFFF)
packets = st.lists(st.builds(Packet, u32, u32, u32, st.binary(max_size=200)), max_size=6)


def test_the_header_is_xsd_sockmsg() -> None:
    packet = Packet(Op.WRITE, 0x01020304, 7, b"/a\0v")
    assert packet.encode() == bytes.fromhex("0b000000 04030201 07000000 04000000") + b"/a\0v"


@given(packets, st.lists(st.integers(1, 40)))
def test_any_cut_of_the_stream_gives_the_same_packets(sent: list[Packet], cuts: list[int]) -> None:
    stream = b"".join(p.encode() for p in sent)
    parser, got = Parser(), []
    cut = iter(cuts)
    while stream:
        size = next(cut, 1000)
        parser.feed(stream[:size])
        stream = stream[size:]
        parser = Parser(parser.pending)  # a restart in between
        while (packet := parser.next()) is not None:
            got.append(packet)
    assert got == sent
    assert parser.pending == b""


@given(packets)
def test_feeding_what_is_wanted_never_holds_two_packets(sent: list[Packet]) -> None:
    stream = b"".join(p.encode() for p in sent)
    parser, got = Parser(), []
    while stream:
        size = parser.wanted
        assert size > 0
        parser.feed(stream[:size])
        stream = stream[size:]
        if parser.wanted == 0:
            got.append(parser.next())
            assert parser.pending == b""
    assert got == sent


def test_the_longest_payload_passes_and_a_longer_one_does_not() -> None:
    parser = Parser()
    parser.feed(Packet(Op.READ, 1, 0, b"x" * PAYLOAD_MAX).encode())
    packet = parser.next()
    assert packet is not None and len(packet.payload) == PAYLOAD_MAX
    parser.feed(HEADER.pack(Op.READ, 1, 0, PAYLOAD_MAX + 1))
    with pytest.raises(ProtocolViolation):
        _ = parser.wanted
    with pytest.raises(ProtocolViolation):
        parser.next()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.integers(0, 30), st.binary(max_size=60))
def test_no_payload_is_a_bug_of_ours(make_world, caplog, op: int, payload: bytes) -> None:
    world = make_world()
    for client in (world.dom0, world.domain(5)):
        client.ask(op, payload)
    assert "a bug of ours" not in caplog.text


def test_strings() -> None:
    assert strings(b"a\0\0b", 1, 3) == [b"a", b""]
    assert one_string(b"a\0") == b"a"
    assert one_string(b"\0") == b""
    for bad in (b"", b"a", b"a\0b", b"a\0\0"):
        with pytest.raises(Invalid):
            one_string(bad)
    with pytest.raises(Invalid):
        strings(b"a\0b\0", 1, 1)


def test_numbers() -> None:
    assert number(b"007") == 7
    assert number(b"4294967295") == 0xFFFF_FFFF
    for bad in (b"", b"-1", b"+1", b"1 ", b"x", b"4294967296", b"9" * 5000, b"\xd9\xa1"):
        with pytest.raises(Invalid):
            number(bad)


def test_every_exception_has_an_errno_name_and_back() -> None:
    assert errno_name(Conflict()) == b"EAGAIN"
    assert errno_name(type("Odd", (Conflict,), {})()) == b"EAGAIN"
    assert errno_name(XenstoreError()) == b"EIO"
    for kind, name in ERRNO_NAMES.items():
        assert type(from_errno_name(name)) is kind
    assert type(from_errno_name(b"EWHAT")) is XenstoreError
