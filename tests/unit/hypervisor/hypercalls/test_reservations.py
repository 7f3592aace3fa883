"""What memory a domain has: given back, taken, exchanged; who may and how far it came."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import struct

import pytest
from pv_rig import BASE, FIRST_FREE, NX, PAGES, RO, ROOT_L1, RW, E, Rig, call, code_of, put

from hypervisor import abi
from hypervisor.hypercalls.registry import Continuation
from hypervisor.hypercalls.reservations import MAX_EXTENTS, START_EXTENT_SHIFT
from hypervisor.memory import layout
from hypervisor.memory.frames import FREE, HELD, L1, LEFT
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.reservation import Taker
from hypervisor.memory.xenarea import INVALID_M2P_ENTRY

ARG, OUT, OTHER = (FIRST_FREE * 4096 + n * 4096 for n in range(3))
DATA, SPARE, MORE = range(FIRST_FREE + 3, FIRST_FREE + 6)
DECREASE, INCREASE, POPULATE = (
    abi.XENMEM_decrease_reservation,
    abi.XENMEM_increase_reservation,
    abi.XENMEM_populate_physmap,
)
SELF = abi.DOMID_SELF
XENS = 0xFFFF_8100_0000_0000


@pytest.fixture
def rig() -> Rig:
    return Rig(max_pages=PAGES + 8).boot()


@pytest.fixture
def big() -> Rig:
    """A guest that ballooned out most of its pages; the first 2 MiB border of free frames is at index 512."""
    return Rig(pages=PAGES, max_pages=2100).boot()


def ask(
    rig: Rig, command: int, *values: int, order: int = 0, flags: int = 0, dom: int = SELF,
    count: int | None = None, at: int = OUT,
) -> int:  # fmt: skip
    if at == OUT:
        put(rig, f"<{len(values)}Q", *values, at=OUT)
    put(rig, "<QQIIHxxxxxx", at, len(values) if count is None else count, order, flags, dom)
    return call(rig, abi.HYPERVISOR_memory_op, command, ARG)


def answers(rig: Rig, count: int, at: int = OUT) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", rig.get(at, 8 * count))


def indexes(rig: Rig, count: int, at: int = OUT) -> list[int]:
    return [mfn - BASE for mfn in answers(rig, count, at)]


# -- one by one


def test_frames_come_from_the_pool_and_go_back(rig: Rig) -> None:
    pages = rig.frames.pages()
    rig.unmap(DATA, SPARE)
    rig.put(DATA * 4096, b"secret")
    flushes = rig.engine.flushes
    assert ask(rig, DECREASE, rig.mfn(DATA), rig.mfn(SPARE)) == 2
    assert rig.frames.pages() == pages - 2 and not rig.frames.owned(DATA)
    assert rig.domain.area.m2p(rig.mfn(DATA)) == INVALID_M2P_ENTRY and rig.get(DATA * 4096, 6) == bytes(6)
    assert rig.engine.flushes == flushes + 1, "no translation of a frame given back may stay; once for all of them"
    rig.check()
    assert ask(rig, POPULATE, 77, 78) == 2
    assert answers(rig, 2) == (rig.mfn(DATA), rig.mfn(SPARE))
    assert [rig.domain.area.m2p(m) for m in answers(rig, 2)] == [77, 78]
    assert rig.engine.flushes == flushes + 1
    rig.check()


def test_increase_names_no_guest_frame_and_may_keep_the_answer_to_itself(rig: Rig) -> None:
    assert ask(rig, INCREASE, 5, 6) == 2 and indexes(rig, 2) == [PAGES, PAGES + 1]
    assert rig.domain.area.m2p(rig.mfn(PAGES)) == INVALID_M2P_ENTRY
    assert ask(rig, INCREASE, at=0, count=3) == 3 and rig.frames.pages() == PAGES + 5
    assert ask(rig, POPULATE, at=0, count=3) == 3, "address 0 is mapped in the rig"
    rig.check()


def test_populate_ends_where_the_domains_maximum_is(rig: Rig) -> None:
    assert ask(rig, POPULATE, *range(12)) == 8
    assert rig.frames.pages() == PAGES + 8
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_current_reservation, put(rig, "<H", SELF)) == PAGES + 8
    rig.check()


@pytest.mark.parametrize(
    ("mfn", "why"),
    [
        (BASE - 1, "a neighbour's"), (0, "frame 0"), (1 << 64, "none"), (BASE + PAGES + 8, "shared_info"),
        (BASE + PAGES + 9, "Xen's own"), (BASE + PAGES, "not the domain's now"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_back(rig: Rig, mfn: int, why: str) -> None:
    before = rig.snapshot()
    assert ask(rig, DECREASE, mfn & (1 << 64) - 1) == 0, why
    assert rig.snapshot() == before


def test_answers_that_cannot_be_written_leave_the_frame_with_the_domain(rig: Rig) -> None:
    """As in Xen: it is counted as not done, but the allocation stands."""
    put(rig, "<2Q", 5, 6, at=OUT)
    rig.make_readonly(OUT >> 12)
    assert ask(rig, POPULATE, at=OUT + 8, count=1) == 0 and rig.frames.pages() == PAGES + 1
    rig.unmap(OUT >> 12)
    assert ask(rig, POPULATE, at=OUT + 8, count=1) == 0 and rig.frames.pages() == PAGES + 1, "nothing to read"
    rig.check()


@pytest.mark.parametrize("command", [DECREASE, INCREASE, POPULATE])
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"order": 10}, "too large for an ordinary domain"), ({"order": 255}, ""), ({"dom": 5}, "no such domain"),
        ({"dom": 0}, "not its own"), ({"dom": abi.DOMID_IO}, ""), ({"count": MAX_EXTENTS + 1}, "cannot be continued"),
        ({"count": (1 << 64) - 1}, ""), ({"count": 0}, ""), ({"at": XENS}, "Xen's area"), ({"flags": 12}, "no frames"),
        ({"flags": 1 | 2 << 8}, "below 2 bytes"), ({"flags": abi.XENMEMF_exact_node_request | 2 << 8}, "a node"),
    ],
)  # fmt: skip
def test_reservations_that_make_no_sense_do_nothing(rig: Rig, command: int, what: dict[str, int], why: str) -> None:
    rig.unmap(DATA)
    before = rig.snapshot()
    assert ask(rig, command, rig.mfn(DATA), **what) == 0, why
    command |= 5 << START_EXTENT_SHIFT
    assert call(rig, abi.HYPERVISOR_memory_op, command, ARG) == 5, "what was done before stays done"
    assert rig.snapshot() == before


def test_reservations_that_begin_where_nothing_is(rig: Rig) -> None:
    for command in (DECREASE, INCREASE, POPULATE):
        assert call(rig, abi.HYPERVISOR_memory_op, command, 1 << 40) == 0
        assert call(rig, abi.HYPERVISOR_memory_op, command | 9 << START_EXTENT_SHIFT, 1 << 40) == 9


def test_flags_that_are_allowed(rig: Rig) -> None:
    for flags in (2 << 8, abi.XENMEMF_exact_node_request, abi.XENMEMF_vnode | 2 << 8, 63):
        assert ask(rig, POPULATE, 1, flags=flags) == 1, hex(flags)
    assert ask(rig, POPULATE, 1, flags=abi.XENMEMF_populate_on_demand) == 0, "not for oneself"
    limit = (BASE - 1).bit_length() + 12
    assert ask(rig, POPULATE, 1, flags=limit) == 0, "no frame lies so low"
    assert ask(rig, POPULATE, 1, flags=limit + 1) == 1
    rig.check()


# -- frames in use


def test_a_mapped_frame_goes_with_its_last_mapping(rig: Rig) -> None:
    rig.put(DATA * 4096, b"kept")
    pages, pfn = rig.frames.pages(), rig.domain.area.m2p(rig.mfn(DATA))
    flushes = rig.engine.flushes
    assert ask(rig, DECREASE, rig.mfn(DATA)) == 1
    assert rig.frames.pages() == pages and rig.frames.holding[DATA] == LEFT and rig.engine.flushes == flushes
    assert rig.get(DATA * 4096, 4) == b"kept" and rig.domain.area.m2p(rig.mfn(DATA)) == pfn
    rig.check()
    assert ask(rig, DECREASE, rig.mfn(DATA), rig.mfn(DATA)) == 2, "a second time changes nothing"
    assert rig.frames.refs[DATA] == 1
    rig.tables.update_l1(ROOT_L1 * 512 + SPARE, rig.pte(DATA, RO | NX))  # it can be mapped still: it is the domain's
    rig.unmap(DATA)
    assert ask(rig, POPULATE, *range(20)) == 8 and DATA not in indexes(rig, 8), "one mapping is left"
    rig.check()
    rig.unmap(SPARE)
    assert rig.frames.refs[DATA] == 0 and rig.frames.pages() == pages + 7
    flushes = rig.engine.flushes
    assert ask(rig, POPULATE, 99) == 1 and indexes(rig, 1) == [DATA]
    assert rig.engine.flushes == flushes + 1 and rig.get(DATA * 4096, 4) == bytes(4)
    assert rig.domain.area.m2p(rig.mfn(DATA)) == 99
    rig.check()


def test_a_pinned_table_goes_when_it_is_unpinned(rig: Rig) -> None:
    rig.unmap(DATA)
    rig.fill(DATA, {3: rig.pte(SPARE, RW | NX)})
    rig.tables.pin(rig.mfn(DATA), L1)
    assert ask(rig, DECREASE, rig.mfn(DATA), rig.mfn(ROOT_L1)) == 2
    assert rig.frames.holding[DATA] == LEFT and rig.frames.kind[DATA] == L1
    rig.check()
    rig.tables.unpin(rig.mfn(DATA))
    assert not rig.frames.owned(DATA)
    assert ask(rig, POPULATE, *range(20)) == 9 and DATA in indexes(rig, 9)
    rig.check()


def test_code_of_a_frame_given_back_is_forgotten(rig: Rig) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + DATA, rig.pte(DATA, RO))
    assert rig.frames.executed[DATA]
    rig.unmap(DATA)
    rig.engine.written.clear()
    assert ask(rig, DECREASE, rig.mfn(DATA)) == 1
    assert DATA in rig.engine.written and not rig.frames.executed[DATA]


def test_nothing_of_what_is_left_is_lost_when_saved(rig: Rig) -> None:
    ask(rig, DECREASE, rig.mfn(DATA))
    copy = type(rig.frames).restore(rig.frames.save())
    assert copy.holding[DATA] == LEFT and copy.holding[SPARE] == HELD and copy.holding[PAGES] == FREE


# -- large extents


def test_large_extents_are_whole_and_aligned(big: Rig) -> None:
    assert ask(big, POPULATE, 1024, 4096, 0, order=9) == 3
    assert indexes(big, 3) == [512, 1024, 1536]
    assert [big.domain.area.m2p(big.mfn(512 + n)) for n in (0, 1, 511)] == [1024, 1025, 1535]
    assert big.frames.pages() == PAGES + 3 * 512
    big.check()
    assert ask(big, POPULATE, 1, order=9) == 0, "the rest is no block of 512"
    assert ask(big, INCREASE, 0, order=3) == 1 and indexes(big, 1) == [64]
    flushes = big.engine.flushes
    assert ask(big, DECREASE, big.mfn(1024), big.mfn(1536 - 512), order=9) == 1, "the second was the first"
    assert big.frames.pages() == PAGES + 2 * 512 + 8 and big.engine.flushes == flushes + 1
    assert ask(big, DECREASE, big.mfn(1024 - 4), order=3) == 0
    assert big.frames.pages() == PAGES + 2 * 512 + 4, "an extent that fails in the middle is not counted, but half gone"
    big.check()


def test_an_extent_with_a_frame_in_use_is_not_handed_out(big: Rig) -> None:
    assert ask(big, POPULATE, *range(2), order=9) == 2
    big.tables.update_l1(ROOT_L1 * 512 + SPARE, big.pte(600, RW | NX))
    assert ask(big, DECREASE, big.mfn(512), order=9) == 1
    assert ask(big, POPULATE, 1, 2, order=9) == 1 and indexes(big, 1) == [1536]
    big.unmap(SPARE)
    assert ask(big, POPULATE, 1, 2, order=9) == 1 and indexes(big, 1) == [512]
    big.check()


def test_a_long_reservation_says_where_it_stopped(big: Rig) -> None:
    base = 16 * 4096
    put(big, "<QQIIHxxxxxx", base, 1030, 0, 0, SELF)
    big.put(base, struct.pack("<1030Q", *range(PAGES, PAGES + 1030)))
    big.domain.preempt = True
    with pytest.raises(Continuation) as caught:
        call(big, abi.HYPERVISOR_memory_op, POPULATE, ARG)
    command, argument = caught.value.arguments
    assert (command >> START_EXTENT_SHIFT, argument) == (512, ARG) and big.frames.pages() == PAGES + 512
    big.domain.preempt = False
    assert call(big, abi.HYPERVISOR_memory_op, command, ARG) == 1030
    assert big.frames.pages() == PAGES + 1030 and len(set(answers(big, 1030, base))) == 1030
    big.check()
    flushes = big.engine.flushes
    big.domain.preempt = True
    with pytest.raises(Continuation):
        call(big, abi.HYPERVISOR_memory_op, DECREASE, ARG)
    assert big.engine.flushes == flushes + 1, "the guest may run before it is continued"


# -- exchange


def trade(
    rig: Rig, given: list[int], names: list[int], orders: tuple[int, int] = (0, 0), *, done: int = 0, flags: int = 0,
    doms: tuple[int, int] = (SELF, SELF), counts: tuple[int, int] | None = None, lists: tuple[int, int] = (OUT, OTHER),
) -> tuple[int, int]:  # fmt: skip
    """(result, nr_exchanged)."""
    put(rig, f"<{len(given)}Q", *(rig.mfn(i) for i in given), at=OUT)
    put(rig, f"<{len(names)}Q", *names, at=OTHER)
    counts = counts or (len(given), len(names))
    one = struct.pack("<QQIIHxxxxxx", lists[0], counts[0], orders[0], 0, doms[0])
    two = struct.pack("<QQIIHxxxxxx", lists[1], counts[1], orders[1], flags, doms[1])
    rig.put(ARG, one + two + struct.pack("<Q", done))
    return call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, ARG), rig.u64(ARG + 64)


def test_an_exchange_of_single_frames(rig: Rig) -> None:
    rig.unmap(DATA, SPARE)
    rig.put(DATA * 4096, b"secret")
    pages, flushes = rig.frames.pages(), rig.engine.flushes
    assert trade(rig, [DATA, SPARE], [70, 71]) == (0, 2)
    new = indexes(rig, 2, OTHER)
    assert new == [PAGES, DATA], "what the first left is good enough for the second"
    assert [rig.domain.area.m2p(rig.mfn(i)) for i in new] == [70, 71]
    assert rig.domain.area.m2p(rig.mfn(SPARE)) == INVALID_M2P_ENTRY and rig.get(DATA * 4096, 6) == bytes(6)
    assert rig.frames.pages() == pages and not rig.frames.owned(SPARE)
    assert rig.engine.flushes == flushes + 1
    rig.check()


def test_an_exchange_with_nothing_to_spare_gives_the_same_frame_empty() -> None:
    rig = Rig().boot()
    rig.unmap(DATA)
    rig.put(DATA * 4096, b"secret")
    assert trade(rig, [DATA], [70]) == (0, 1) and indexes(rig, 1, OTHER) == [DATA]
    assert rig.domain.area.m2p(rig.mfn(DATA)) == 70 and rig.get(DATA * 4096, 6) == bytes(6)
    rig.check()


def test_many_for_one_and_one_for_many(big: Rig) -> None:
    ask(big, POPULATE, *range(8))
    small = indexes(big, 8)
    assert trade(big, small, [100], (0, 3)) == (0, 8)
    (block,) = indexes(big, 1, OTHER)
    assert block % 8 == 0 and [big.domain.area.m2p(big.mfn(block + n)) for n in range(8)] == list(range(100, 108))
    assert big.frames.pages() == PAGES + 8
    big.check()
    assert trade(big, [block], list(range(200, 208)), (3, 0)) == (0, 1)
    singles = indexes(big, 8, OTHER)
    assert [big.domain.area.m2p(big.mfn(i)) for i in singles] == list(range(200, 208)) and len(set(singles)) == 8
    assert big.frames.pages() == PAGES + 8 and not big.frames.owned(block)
    big.check()


def test_no_block_for_many(rig: Rig) -> None:
    rig = Rig().boot()
    scattered = [DATA, DATA + 2]
    rig.unmap(*scattered)
    rig.put(DATA * 4096, b"kept")
    before = rig.snapshot()
    assert trade(rig, scattered, [1], (0, 1)) == (-E.ENOMEM, 0)
    assert rig.snapshot() == before and rig.get(DATA * 4096, 4) == b"kept"
    assert trade(rig, [DATA], [1], flags=20) == (-E.ENOMEM, 0), "no frame lies below 2**20"
    assert rig.snapshot() == before
    rig.check()


def test_what_was_taken_for_an_exchange_that_fails_is_free_again(rig: Rig) -> None:
    """Two frames for two below a border, where only one is free."""
    ask(rig, POPULATE, 1, 2)
    rig.unmap(DATA)
    ask(rig, DECREASE, rig.mfn(DATA))
    before = rig.snapshot()
    low = Taker(rig.frames, 0, 0, (PAGES << 12).bit_length() - 1)
    mfns = [rig.mfn(PAGES), rig.mfn(PAGES + 1)]
    assert code_of(rig.domain.reservation.exchange, mfns, low, 2) == E.ENOMEM
    assert rig.snapshot() == before and low.take() == DATA
    rig.check()


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ({"orders": (10, 10)}, -E.EPERM), ({"orders": (0, 64)}, -E.EPERM), ({"done": 2}, -E.EINVAL),
        ({"doms": (SELF, 7)}, -E.EINVAL), ({"counts": (1, 2)}, -E.EINVAL), ({"orders": (0, 1)}, -E.EINVAL),
        ({"counts": (1 << 63, 1 << 63), "orders": (1, 1)}, -E.EINVAL), ({"doms": (5, 5)}, -E.ESRCH),
        ({"doms": (0, 0)}, -E.EPERM), ({"doms": (abi.DOMID_XEN, abi.DOMID_XEN)}, -E.ESRCH), ({"doms": (7, 7)}, 0),
        ({"lists": (XENS, OTHER)}, -E.EFAULT), ({"lists": (OUT, XENS)}, -E.EFAULT),
        ({"lists": (1 << 40, OTHER)}, -E.EFAULT), ({"flags": abi.XENMEMF_exact_node_request | 2 << 8}, -E.EINVAL),
    ],
)  # fmt: skip
def test_exchanges_that_are_refused(rig: Rig, what: dict[str, tuple[int, int]], result: int) -> None:
    rig.unmap(DATA)
    before = rig.snapshot()
    code, exchanged = trade(rig, [DATA], [70], **what)  # type: ignore[arg-type]
    assert code == result and exchanged == what.get("done", int(not code))
    assert not code or rig.snapshot() == before


@pytest.mark.parametrize("second", [ROOT_L1, SPARE, DATA, -1, PAGES + 8, PAGES + 1], ids=str)
def test_a_frame_that_cannot_be_exchanged_stops_it_there(rig: Rig, second: int) -> None:
    """A page table, a mapped frame, one already exchanged, a neighbour's, shared_info, one it does not have."""
    rig.unmap(DATA, MORE)
    assert trade(rig, [DATA, second, MORE], [70, 71, 72]) == (-E.EINVAL, 1)
    assert not rig.frames.owned(DATA) and rig.frames.owned(MORE) and rig.u64(OTHER + 8) == 71
    rig.check()


def test_a_frame_given_back_but_mapped_cannot_be_exchanged(rig: Rig) -> None:
    ask(rig, DECREASE, rig.mfn(DATA))
    assert trade(rig, [DATA], [70]) == (-E.EINVAL, 0)
    rig.check()


def test_a_unit_is_exchanged_whole_or_not(big: Rig) -> None:
    ask(big, POPULATE, *range(4))
    small = indexes(big, 4)
    before = big.snapshot()
    assert trade(big, [small[0], small[1], small[2], DATA], [100, 200], (0, 1)) == (-E.EINVAL, 2)
    assert big.frames.owned(small[2]) and not big.frames.owned(small[0])
    big.check()
    assert trade(big, [small[2], small[2]], [300], (0, 1)) == (-E.EINVAL, 0), "the same frame twice"
    assert big.snapshot() != before
    big.check()


def test_an_answer_that_cannot_be_given_counts_the_exchange_as_not_done(rig: Rig) -> None:
    rig.unmap(DATA, SPARE)
    rig.make_readonly(OTHER >> 12)
    pages = rig.frames.pages()
    assert trade(rig, [DATA, SPARE], [70, 71]) == (-E.EFAULT, 0)
    assert not rig.frames.owned(DATA) and rig.frames.owned(SPARE) and rig.frames.pages() == pages
    rig.check()


def test_a_finished_exchange_is_finished(rig: Rig) -> None:
    before = rig.snapshot()
    assert trade(rig, [DATA], [70], done=1) == (0, 1)
    assert rig.snapshot() == before
    put(rig, "<Q", 1, at=1 << 14)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, 1 << 40) == -E.EFAULT


def test_a_long_exchange_gives_way_and_goes_on(big: Rig) -> None:
    names, given = 16 * 4096, 20 * 4096
    big.put(given, struct.pack("<600Q", *range(600)))
    put(big, "<QQIIHxxxxxx", given, 600, 0, 0, SELF)
    assert call(big, abi.HYPERVISOR_memory_op, POPULATE, ARG) == 600
    first = set(answers(big, 600, given))
    big.put(names, struct.pack("<600Q", *range(1000, 1600)))
    one, two = (struct.pack("<QQIIHxxxxxx", at, 600, 0, 0, SELF) for at in (given, names))
    big.put(ARG, one + two + bytes(8))
    big.domain.preempt = True
    with pytest.raises(Continuation) as caught:
        call(big, abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, ARG)
    assert caught.value.arguments == (abi.XENMEM_exchange, ARG) and big.u64(ARG + 64) == 512
    big.check()
    big.domain.preempt = False
    assert call(big, abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, ARG) == 0 and big.u64(ARG + 64) == 600
    second = answers(big, 600, names)
    assert len(set(second)) == 600 and big.frames.pages() == PAGES + 600 and set(second) - first
    assert [big.domain.area.m2p(m) for m in second] == list(range(1000, 1600))
    big.check()


# -- the limit, and the host's memory


def test_nobody_gets_more_than_the_limit(rig: Rig) -> None:
    pages = rig.frames.pages()
    rig.domain.reservation.limit = pages + 2
    assert ask(rig, POPULATE, 71, 72, 73) == 2
    assert ask(rig, INCREASE, 5) == 0
    rig.domain.reservation.limit = pages - 3  # lowered: what it has it keeps
    assert rig.frames.pages() == pages + 2
    rig.unmap(DATA)
    assert ask(rig, DECREASE, rig.mfn(DATA)) == 1
    assert ask(rig, POPULATE, 71) == 0
    rig.domain.reservation.limit = pages + 8
    assert ask(rig, POPULATE, 71) == 1
    rig.check()


def test_what_is_given_back_is_the_hosts_again() -> None:
    fd = os.memfd_create("guest")
    size = layout.total_frames(64) * 4096
    os.ftruncate(fd, size)
    with contextlib.closing(mmap.mmap(fd, size)) as mapping:
        memory = DomainMemory(mapping, BASE, 64)
        for index in range(64):
            memory.page(index)[:] = b"x" * 4096
        before = os.fstat(fd).st_blocks
        memory.punch(3, 5)
        memory.punch(63, 1)
        assert before - os.fstat(fd).st_blocks == 6 * 8
        assert not any(memory.page(4)) and bytes(memory.page(2)) == bytes(memory.page(8)) == b"x" * 4096
        memory.page(4)[:1] = b"y"
        assert os.fstat(fd).st_blocks == before - 5 * 8
        del memory
        gc.collect()
    os.close(fd)
