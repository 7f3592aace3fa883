"""Byte rings: data across the wrap, and indices that lie."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.devices.rate import Bucket
from hypervisor.devices.ring import Consumer, Producer, RingBroken

SIZE = 64
CONS, PROD = 1000, 1004


def rings(start: int = 0) -> tuple[bytearray, memoryview, Producer, Consumer]:
    """One ring with our two halves at its ends; each plays the guest for the other."""
    page = bytearray(4096)
    index = memoryview(page).cast("I")
    index[CONS // 4] = index[PROD // 4] = start
    view = memoryview(page)
    return page, index, Producer(view, 128, SIZE, CONS, PROD), Consumer(view, 128, SIZE, CONS, PROD)


@settings(max_examples=200)
@given(st.integers(0, 0xFFFF_FFFF), st.lists(st.tuples(st.binary(max_size=100), st.integers(0, 100))))
def test_what_goes_in_comes_out(start: int, script: list[tuple[bytes, int]]) -> None:
    page, _index, producer, consumer = rings(start)
    fill = b""
    for data, size in script:
        space = producer.space()
        assert space == SIZE - len(fill)
        count = producer.write(data)
        assert count == min(len(data), space)
        fill += data[:count]
        assert consumer.available() == len(fill)
        assert consumer.peek(size) == fill[:size]
        assert consumer.read(size) == fill[:size]
        fill = fill[size:]
    assert page[:128] == bytes(128) and page[128 + SIZE : CONS] == bytes(CONS - 128 - SIZE)


@pytest.mark.parametrize("lie", [SIZE + 1, 2**31, 0xFFFF_FFFF])
def test_lies_are_found(lie: int) -> None:
    _page, index, producer, consumer = rings()
    index[PROD // 4] = lie
    for call in (consumer.available, lambda: consumer.peek(1), lambda: consumer.read(1)):
        with pytest.raises(RingBroken):
            call()
    index[CONS // 4] = -lie & 0xFFFF_FFFF
    for call in (producer.space, lambda: producer.write(b"x")):
        with pytest.raises(RingBroken):
            call()


def test_our_own_index_in_the_page_is_not_believed() -> None:
    _page, index, producer, consumer = rings()
    producer.write(b"abc")
    index[CONS // 4] = 77
    assert consumer.position == 0
    index[PROD // 4] = 3
    assert consumer.read(10) == b"abc"
    assert index[CONS // 4] == 3


def test_a_position_from_before_a_restart_wins() -> None:
    page, index, producer, consumer = rings()
    producer.write(b"abcdef")
    consumer.advance(4)
    again = Consumer(memoryview(page), 128, SIZE, CONS, PROD, position=2)
    assert index[CONS // 4] == 2
    assert again.read(10) == b"cdef"


def test_a_page_that_is_none() -> None:
    for page in (memoryview(bytearray(100)), memoryview(bytes(4096)), memoryview(bytearray(4096)).cast("I")):
        with pytest.raises(ValueError, match="ring page"):
            Consumer(page, 0, SIZE, CONS, PROD)
    with pytest.raises(ValueError, match="power of two"):
        Consumer(memoryview(bytearray(4096)), 0, 100, CONS, PROD)


def test_closing_lets_the_page_go() -> None:
    page, index, producer, consumer = rings()
    producer.close()
    consumer.close()
    index.release()
    page.clear()
    assert len(page) == 0


def test_a_bucket_pays_its_debt() -> None:
    now = [0.0]
    bucket = Bucket(10.0, 5.0, lambda: now[0])
    bucket.take(5)
    assert bucket.delay() == 0.0
    bucket.take(2)
    assert bucket.delay() == pytest.approx(0.2)
    now[0] = 0.1
    assert bucket.delay() == pytest.approx(0.1)
    now[0] = 100.0
    bucket.take(6)
    assert bucket.delay() == pytest.approx(0.1)
    now[0] = 50.0  # a clock that goes back pays nothing and costs nothing
    assert bucket.delay() == pytest.approx(0.1)
