"""Pages become records and records pages again; hostile records become one error."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_rig import Memory

from hypervisor.host.mover import spool as spools
from hypervisor.host.mover import wire
from hypervisor.host.mover.conversation import Conversation
from hypervisor.host.mover.pages import PageSource
from hypervisor.host.mover.sink import PageSink
from hypervisor.host.mover.spool import Spool
from hypervisor.host.mover.tls import PeerClosed
from hypervisor.host.mover.wire import BadRecord, Kind
from hypervisor.types import PAGE_SIZE

PAGES = 64


def bits(pages: set[int], size: int = PAGES) -> bytes:
    made = bytearray((size + 7) // 8)
    for page in pages:
        made[page // 8] |= 1 << page % 8
    return bytes(made)


class OverHere:
    """A stream of bytes as a `TlsSocket` that is about to end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def read_into(self, buffer: memoryview) -> int:
        if self._at == len(self._data):
            raise PeerClosed("the end")
        got = min(len(buffer), len(self._data) - self._at, 1000)
        buffer[:got] = self._data[self._at : self._at + got]
        self._at += got
        return got


def deliver(stream: bytes, sink: PageSink, spool: Spool | None = None) -> list[Any]:
    """As the target's process does; what else was said. :raises BadRecord."""
    heard: list[Any] = []

    def on_record(head: wire.Header, body: memoryview) -> None:
        if head.kind in (Kind.PAGES, Kind.FILL, Kind.COPY):
            sink.take(head, body)
        elif head.kind is Kind.EPOCH:
            sink.commit() if head.count else sink.stage()
        elif head.kind not in (Kind.BLOB, Kind.DATA):
            heard.append(head)
        elif spool is not None:
            whole = spool.begin(bytes(body), head.count) if head.kind is Kind.BLOB else spool.more(body)
            if whole:
                heard.append(spool.event())

    tls: Any = OverHere(stream)
    talk = Conversation(tls, wire.FROM_SOURCE, on_record, -1, lambda: None)
    with pytest.raises(PeerClosed):
        while True:
            talk.take()
    return heard


def stream_of(source: PageSource, dirty: set[int], shared: frozenset[int] = frozenset(), size: int = PAGES) -> bytes:
    pieces = source.round(bits(dirty, size), bits(set(shared), size))
    return b"".join(bytes(piece) for record in pieces for piece in record)


class Two:
    """Source and target."""

    def __init__(self, *, compress: bool = False, size: int = PAGES) -> None:
        self.memory, self.into, self.size = Memory(size), Memory(size), size
        self.source = PageSource(self.memory.fd, size, compress=compress)
        self.sink = PageSink(self.into.fd, size)

    def round(self, dirty: set[int], shared: frozenset[int] = frozenset()) -> bytes:
        stream = stream_of(self.source, dirty, shared, self.size)
        deliver(stream, self.sink)
        return stream


@pytest.fixture
def spool_fd() -> Iterator[int]:
    fd = os.memfd_create("spool")
    yield fd
    os.close(fd)


@pytest.fixture
def two() -> Two:
    return Two()


def test_each_kind_of_page_takes_its_way(two: Two) -> None:
    everywhere = set(range(PAGES))
    random = os.urandom(PAGE_SIZE)
    for page in range(8, 16):
        two.memory.write(page, random if page % 2 else os.urandom(PAGE_SIZE))
    for page in range(16, 24):
        two.memory.write(page, struct.pack("<Q", page) * 512)
    two.memory.write(24, b"\0" * PAGE_SIZE)
    two.into.write(40, b"from before")
    two.round(everywhere)
    counts = two.source.counts
    assert two.into.all() == two.memory.all()
    assert (counts.pages, counts.zero) == (PAGES, PAGES - 16)
    assert counts.duplicate == 8  # those of one word; pages of one batch are not compared with each other
    assert os.fstat(two.into.fd).st_blocks * 512 == 16 * PAGE_SIZE, "zeros take no memory"
    two.memory.write(30, random)
    assert len(two.round({30})) < 100
    assert two.into.all() == two.memory.all() and two.source.counts.duplicate == 1


def test_a_page_named_by_a_pair_is_sent_again_when_the_other_one_was_written_since(two: Two) -> None:
    content, later = os.urandom(PAGE_SIZE), os.urandom(PAGE_SIZE)
    two.memory.write(1, content)
    two.round({1})
    two.memory.write(2, content)
    # The guest writes page 1 to something else and back, so that the target's copy is of another moment.
    two.into.write(1, later)
    two.round({2})
    assert two.source.counts.duplicate == 1 and two.into.read(2) == later, "copied from what is there"
    two.round({1})
    assert two.source.counts.pages == 2, "page 2 goes with page 1"
    assert two.into.all() == two.memory.all()


def test_pages_that_others_may_write_are_sent_when_they_differ(two: Two) -> None:
    watched = frozenset({5, 6, 7})
    two.memory.write(5, os.urandom(PAGE_SIZE))
    two.round({*watched, 8}, watched)
    assert len(two.round(set(watched), watched)) == 0 and two.source.counts.unchanged == 3
    two.memory.write(6, b"x")
    two.memory.write(7, b"\1" * PAGE_SIZE)
    two.round(set(watched), watched)
    assert two.source.counts.unchanged == 1 and two.into.all() == two.memory.all()
    two.memory.write(7, b"\0" * PAGE_SIZE)
    two.memory.write(5, b"y")
    two.round({5, 7})  # not watched any more: what was kept of them is of no use
    two.memory.write(5, b"z")
    two.round({5, 7}, watched)
    assert two.source.counts.unchanged == 0 and two.into.all() == two.memory.all()


def test_without_any_log_only_what_differs_goes(two: Two) -> None:
    everything = set(range(PAGES))
    for page in range(0, PAGES, 3):
        two.memory.write(page, os.urandom(PAGE_SIZE))
    two.round(everything, frozenset(everything))
    two.memory.write(9, b"changed")
    assert len(two.round(everything, frozenset(everything))) < 2 * PAGE_SIZE
    assert two.source.counts.unchanged == PAGES - 1 and two.into.all() == two.memory.all()


def test_what_can_be_compressed_is(two: Two) -> None:
    packed = Two(compress=True)
    for each in (two, packed):
        for page in range(PAGES):
            each.memory.write(page, (b"%d words of a page " % page) * 170)
    assert len(packed.round(set(range(PAGES)))) < len(two.round(set(range(PAGES)))) // 10
    assert packed.into.all() == packed.memory.all()
    packed.memory.write(3, noise := os.urandom(PAGE_SIZE))
    assert noise in packed.round({3})


def test_reading_leaves_holes_holes(two: Two) -> None:
    two.memory.write(1, b"x")
    two.round(set(range(PAGES)))
    assert os.fstat(two.memory.fd).st_blocks * 512 == PAGE_SIZE


CONTENTS = [b"", b"\1" * PAGE_SIZE, *(bytes([n]) * 2048 + b"%d" % n * 100 for n in range(3))]
writes = st.lists(st.tuples(st.integers(0, 299), st.integers(0, len(CONTENTS) - 1)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(rounds=st.lists(st.tuples(writes, writes), min_size=1, max_size=5), compress=st.booleans())
def test_any_writes_at_any_time_arrive(rounds: list[Any], compress: bool) -> None:
    """The guest writes before a round, and while it is sent; the last one is sent while it stands still."""
    size = 300  # more than a batch
    two = Two(compress=compress, size=size)
    dirty: set[int] = set(range(size))

    def write(changes: list[tuple[int, int]]) -> None:
        for page, content in changes:
            two.memory.write(page, CONTENTS[content].ljust(PAGE_SIZE, b"\0"))
            dirty.add(page)

    for before, meanwhile in rounds:
        write(before)
        sending, dirty = dirty, set()
        changes = iter(meanwhile)
        stream = b""
        for record in two.source.round(bits(sending, size)):
            stream += b"".join(bytes(piece) for piece in record)
            write([next(changes) for _ in range(min(20, len(meanwhile) // 2)) if changes.__length_hint__()])
        write(list(changes))
        deliver(stream, two.sink)
    deliver(stream_of(two.source, dirty, size=size), two.sink)
    assert two.into.all() == two.memory.all()


EPOCH_BEGINS, EPOCH_ENDS = wire.record(Kind.EPOCH), wire.record(Kind.EPOCH, count=1)


@settings(max_examples=60, deadline=None)
@given(epochs=st.lists(st.tuples(writes, writes), min_size=1, max_size=4), compress=st.booleans())
def test_an_epoch_is_the_memory_at_one_moment_or_nothing(epochs: list[Any], compress: bool) -> None:
    """The guest writes before an epoch is copied, and while it is sent; a part of it changes nothing."""
    size = 300
    two = Two(compress=compress, size=size)
    two.round(set(range(size)))
    deliver(EPOCH_BEGINS, two.sink)
    watched = frozenset({0, 7})
    dirty: set[int] = set()

    def write(changes: list[tuple[int, int]]) -> None:
        for page, content in changes:
            two.memory.write(page, CONTENTS[content].ljust(PAGE_SIZE, b"\0"))
            dirty.add(page)

    for before, meanwhile in epochs:
        write(before)
        sending, dirty, there = dirty | watched, set(), two.into.all()
        two.source.copy(bits(sending, size), bits(set(watched), size))
        wanted = two.memory.all()
        write(meanwhile)
        stream = b"".join(bytes(piece) for record in two.source.copied() for piece in record)
        deliver(stream, two.sink)
        assert two.into.all() == there
        deliver(EPOCH_ENDS, two.sink)
        assert two.into.all() == wanted
    # Handed over in the end, as a migration is.
    deliver(stream_of(two.source, dirty | watched, watched, size) + EPOCH_ENDS, two.sink)
    assert two.into.all() == two.memory.all()


def test_an_epoch_is_no_larger_than_the_memory() -> None:
    sink = PageSink(Memory(PAGES).fd, PAGES)
    deliver(EPOCH_BEGINS, sink)
    record = pages_record(list(range(PAGES)), b"\1" * PAGES * PAGE_SIZE)
    with pytest.raises(BadRecord, match="an epoch of more"):
        deliver(record * 6, sink)


# -- records that no honest source sends


def pages_record(indexes: list[int], body: bytes, *, flags: int = 0) -> bytes:
    numbers = struct.pack(f"<{len(indexes)}I", *indexes)
    return wire.header(Kind.PAGES, flags=flags, count=len(indexes), length=len(numbers) + len(body)) + numbers + body


def fill_record(*pairs: tuple[int, int]) -> bytes:
    body = struct.pack(f"<{len(pairs)}I", *(i for i, _ in pairs)) + struct.pack(
        f"<{len(pairs)}Q", *(w for _, w in pairs)
    )
    return wire.header(Kind.FILL, count=len(pairs), length=len(body)) + body


def copy_record(*pairs: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack("<2I", *pair) for pair in pairs)
    return wire.header(Kind.COPY, count=len(pairs), length=len(body)) + body


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


UNSIZED = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(PAGE_SIZE))
HOSTILE = {
    "page outside": pages_record([3, PAGES], b"\1" * 2 * PAGE_SIZE),
    "page far outside": pages_record([0xFFFF_FFFF], b"\1" * PAGE_SIZE),
    "fill outside": fill_record((3, 1), (PAGES, 1)),
    "hole outside": fill_record((PAGES - 1, 0), (PAGES, 0)),
    "copy to outside": copy_record((PAGES, 1)),
    "copy from outside": copy_record((1, PAGES)),
    "a bomb": pages_record([1], zstd(bytes(64 << 20)), flags=wire.ZSTD),
    "a frame too short": pages_record([1, 2], zstd(bytes(PAGE_SIZE)), flags=wire.ZSTD),
    "a frame without a size": pages_record([1], UNSIZED, flags=wire.ZSTD),
    "no frame": pages_record([1], b"\1" * 100, flags=wire.ZSTD),
    "unknown kind": wire.HEADER.pack(99, 0, 0, 0, 0),
    "unknown flags": wire.HEADER.pack(Kind.FILL, 1, 0, 1, 12),
    "not zero": wire.HEADER.pack(Kind.BYE, 0, 1, 0, 0),
    "the end of no epoch": EPOCH_ENDS,
    "a greeting late": wire.record(Kind.HELLO, bytes(wire.HELLO.size)),
    "an empty batch": wire.header(Kind.PAGES, count=0, length=0),
    "a batch too large": wire.header(Kind.PAGES, count=wire.MAX_BATCH + 1, length=(wire.MAX_BATCH + 1) * 4100),
    "a length that does not fit": wire.header(Kind.PAGES, count=1, length=5000),
    "a length of 4 GB": wire.header(Kind.DATA, length=0xFFFF_FFFF),
    "data without a blob": wire.record(Kind.DATA, b"x"),
    "a blob too large": wire.record(Kind.BLOB, b"state", count=wire.MAX_BLOB + 1),
    "a blob without a name": wire.record(Kind.BLOB, b"../x", count=1),
    "a blob in a blob": wire.record(Kind.BLOB, b"a", count=9) + wire.record(Kind.BLOB, b"b", count=9),
    "more than announced": wire.record(Kind.BLOB, b"a", count=2) + wire.record(Kind.DATA, b"xyz"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_records_are_refused(name: str, spool_fd: int) -> None:
    memory = Memory(PAGES + 8)  # more than the extent: nothing beyond it may change
    sink, spool = PageSink(memory.fd, PAGES), Spool(spool_fd)
    with pytest.raises(BadRecord):
        deliver(HOSTILE[name], sink, spool)
    assert memory.all() == bytes((PAGES + 8) * PAGE_SIZE)


HONEST = Two()
for _page in range(0, PAGES, 2):
    HONEST.memory.write(_page, os.urandom(100) if _page % 8 else b"\7" * PAGE_SIZE)
STREAM = stream_of(HONEST.source, set(range(PAGES)))
HONEST.memory.write(33, HONEST.memory.read(2))
STREAM += stream_of(HONEST.source, {33}) + wire.record(Kind.ROUND, count=1)
STREAM += EPOCH_BEGINS + stream_of(HONEST.source, {8, 9}) + EPOCH_ENDS
STREAM += wire.record(Kind.BLOB, b"state", count=5) + wire.record(Kind.DATA, b"hello") + wire.record(Kind.BYE)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stream_cut_or_flipped_anywhere_stays_within_the_memory(data: st.DataObject) -> None:
    stream = bytearray(STREAM)
    # Headers and indexes are where it hurts: as likely as the pages' content, which is most of the stream.
    short = st.integers(0, 200) | st.integers(len(stream) - 200, len(stream) - 1) | st.integers(0, len(stream) - 1)
    for _ in range(data.draw(st.integers(0, 4))):
        stream[data.draw(short)] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        stream = stream[: data.draw(short)]
    memory = Memory(PAGES + 8)
    spool = os.memfd_create("spool")
    try:
        deliver(bytes(stream), PageSink(memory.fd, PAGES), Spool(spool))
    except BadRecord as exc:
        assert "\n" not in str(exc)
    finally:
        assert os.pread(memory.fd, 8 * PAGE_SIZE, PAGES * PAGE_SIZE) == bytes(8 * PAGE_SIZE)
        os.close(spool)


def test_written_pages_are_marked() -> None:
    two, marks = Two(), mmap.mmap(-1, PAGES)
    sink = PageSink(two.into.fd, PAGES, marks)
    content = os.urandom(PAGE_SIZE)
    two.memory.write(3, content)
    deliver(stream_of(two.source, {3, 9}), sink)
    two.memory.write(5, content)
    deliver(stream_of(two.source, {5}) + fill_record((7, 7)), sink)
    assert [page for page in range(PAGES) if marks[page]] == [3, 5, 7, 9] and sink.pages == 4


def test_the_spool_is_used_again_when_all_was_taken(spool_fd: int) -> None:
    spool = Spool(spool_fd)
    for number in range(3):
        assert not spool.begin(b"state", 6)
        assert not spool.more(memoryview(b"abc"))
        assert spool.more(memoryview(b"%03d" % number))
        event = spool.event()
        assert event == {"event": "blob", "kind": "state", "offset": 0, "size": 6}
        assert os.pread(spool_fd, 6, 0) == b"abc%03d" % number
        spool.taken()
    assert spool.begin(b"empty", 0) and spool.event()["size"] == 0


def test_blobs_that_nobody_takes_are_too_many_at_some_point(spool_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "SPOOL_BYTES", 10)
    spool = Spool(spool_fd)
    spool.begin(b"a", 8)
    spool.more(memoryview(b"12345678"))
    spool.event()
    with pytest.raises(BadRecord, match="takes"):
        spool.begin(b"a", 3)
