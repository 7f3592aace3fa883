"""The FIFO event ABI on a piece of memory, against a guest that takes events off as Linux does."""

from __future__ import annotations

import json
import mmap
import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.state import Vcpu
from hypervisor.errors import XenError
from hypervisor.evtchn.core import EventChannels
from hypervisor.evtchn.fifo import LINK_MASK, LINKED, MASKED, MAX_ARRAY_PAGES, PENDING, Fifo, FifoControl
from hypervisor.memory import layout
from hypervisor.memory.frames import WRITABLE
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import DomId

BASE = 0x20000
PAGES = 16
INFO, BLOCKS, ARRAY, SPARE = 1, 2, 3, 8  # frames: the vcpu_infos, the control blocks, the event array
BLOCK_SIZE = 128
VCPUS = 3


class Frames:
    """Counts the uses of frames; those in `refused` cannot be written."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self.refused: set[int] = set()

    def owned_index(self, mfn: int) -> int:
        if not BASE <= mfn < BASE + PAGES:
            raise XenError(errno.EINVAL)
        return mfn - BASE

    def get_type(self, index: int, kind: int) -> None:
        assert kind == WRITABLE
        if index in self.refused:
            raise XenError(errno.EINVAL)
        self.held[index] += 1

    def put_type(self, index: int) -> None:
        self.held[index] -= 1
        assert self.held[index] >= 0


class Nobody:
    """A router to nowhere."""

    def send(self, peer: int, peer_port: int, local_port: int) -> None: ...
    def bind(self, peer: int, peer_port: int, local_port: int) -> None: ...
    def closed(self, peer: int, peer_port: int, local_port: int) -> None: ...

    def exists(self, domid: int) -> bool:
        return False


class TwoLevelBits:
    """The ABI before FIFO, as a set."""

    name, max_ports, priorities = "2l", 4096, False

    def __init__(self) -> None:
        self.pending: set[int] = set()

    def opened(self, port: int) -> None: ...
    def unmask(self, port: int, vcpu: int) -> None: ...
    def release(self) -> None: ...

    def set_pending(self, port: int, _vcpu: int) -> None:
        self.pending.add(port)

    def clear(self, port: int) -> None:
        self.pending.discard(port)

    def is_pending(self, port: int) -> bool:
        return port in self.pending

    def is_busy(self, _port: int) -> bool:
        return False

    def set_priority(self, _port: int, _priority: int) -> None:
        raise XenError(errno.ENOSYS)

    def save(self) -> dict[str, Any]:
        return {"name": self.name}


class Guest:
    """The guest's side: its words, its control blocks, and how it takes an event off a queue."""

    def __init__(self) -> None:
        self.memory = DomainMemory(mmap.mmap(-1, layout.total_frames(PAGES) * 4096), BASE, PAGES)
        self.frames = Frames()
        self.vcpus = [Vcpu(number) for number in range(VCPUS)]
        for vcpu in self.vcpus:
            vcpu.state.vcpu_info = INFO * 4096 + vcpu.id * 64
        self.woken: list[tuple[int, int]] = []
        self.fifo = self.make()
        self.heads: dict[tuple[int, int], int] = defaultdict(int)

    def make(self) -> Fifo:
        return Fifo(self.memory, self.frames, self.vcpus, lambda vcpu, port: self.woken.append((vcpu, port)))

    def set_up(self, pages: int = 1) -> Guest:
        for vcpu in self.vcpus:
            self.fifo.map_block(vcpu.id, BASE + BLOCKS, vcpu.id * BLOCK_SIZE)
        for page in range(pages):
            self.fifo.add_page(BASE + ARRAY + page)
        return self

    def at(self, port: int) -> int:
        return ARRAY * 1024 + port

    def word(self, port: int) -> int:
        return int(self.memory.dwords[self.at(port)])

    def set_word(self, port: int, value: int) -> None:
        self.memory.dwords[self.at(port)] = value

    def block(self, vcpu: int) -> int:
        return (BLOCKS * 4096 + vcpu * BLOCK_SIZE) >> 2

    def ready(self, vcpu: int) -> int:
        return int(self.memory.dwords[self.block(vcpu)])

    def head(self, vcpu: int, priority: int) -> int:
        return int(self.memory.dwords[self.block(vcpu) + 2 + priority])

    def called(self, vcpu: int) -> bool:
        """Whether the vCPU was called since it was asked last."""
        at = self.vcpus[vcpu].state.vcpu_info
        was = self.memory.bytes[at]
        self.memory.bytes[at] = 0
        return bool(was)

    def take_one(self, vcpu: int, priority: int) -> int | None:
        """Linux's consume_one_event: the port taken off, whether or not it is pending; None at the queue's end."""
        key = (vcpu, priority)
        port = self.heads[key] or self.head(vcpu, priority)
        if not port:
            self.memory.dwords[self.block(vcpu)] &= ~(1 << priority)
            return None
        word = self.word(port)
        self.set_word(port, word & ~(LINKED | LINK_MASK))
        self.heads[key] = word & LINK_MASK
        if not self.heads[key]:
            self.memory.dwords[self.block(vcpu)] &= ~(1 << priority)
        return port

    def take_all(self, vcpu: int) -> list[int]:
        """All pending events of a vCPU, the most urgent queue first."""
        taken = []
        while ready := self.ready(vcpu):
            port = self.take_one(vcpu, (ready & -ready).bit_length() - 1)
            if port is not None and self.word(port) & PENDING and not self.word(port) & MASKED:
                self.set_word(port, self.word(port) & ~PENDING)
                taken.append(port)
        return taken


@pytest.fixture
def guest() -> Guest:
    return Guest().set_up()


def test_first_event_of_a_queue_becomes_its_head_and_calls_the_vcpu(guest: Guest) -> None:
    guest.fifo.set_pending(5, 1)
    assert guest.word(5) == PENDING | LINKED
    assert guest.head(1, 7) == 5 and guest.ready(1) == 1 << 7
    assert guest.called(1) and not guest.called(0)
    assert guest.woken == [(1, 5)]


def test_later_events_are_linked_behind_it_without_another_call(guest: Guest) -> None:
    guest.fifo.set_pending(5, 0)
    guest.called(0)
    guest.fifo.set_pending(6, 0)
    guest.fifo.set_pending(9, 0)
    assert guest.word(5) & LINK_MASK == 6 and guest.word(6) & LINK_MASK == 9 and guest.word(9) & LINK_MASK == 0
    assert guest.head(0, 7) == 5 and not guest.called(0)
    assert guest.take_all(0) == [5, 6, 9]


def test_an_event_that_is_pending_is_not_linked_twice(guest: Guest) -> None:
    guest.fifo.set_pending(5, 0)
    guest.fifo.set_pending(5, 0)
    assert guest.woken == [(0, 5)]
    assert guest.take_all(0) == [5]


def test_a_masked_event_is_only_pending_until_it_is_unmasked(guest: Guest) -> None:
    guest.set_word(5, MASKED)
    guest.fifo.set_pending(5, 0)
    assert guest.word(5) == MASKED | PENDING and not guest.called(0)
    assert guest.woken == [(0, 5)], "who polls it is told"
    guest.fifo.unmask(5, 2)
    assert guest.word(5) == PENDING | LINKED and guest.called(2)
    assert guest.take_all(2) == [5]
    guest.set_word(6, MASKED)
    guest.fifo.unmask(6, 0)
    assert guest.word(6) == 0 and not guest.called(0)


def test_a_queue_that_the_guest_emptied_starts_anew(guest: Guest) -> None:
    guest.fifo.set_pending(5, 0)
    assert guest.take_all(0) == [5]
    guest.fifo.set_pending(6, 0)
    assert guest.head(0, 7) == 6 and guest.word(5) == 0
    assert guest.take_all(0) == [6]
    guest.fifo.set_pending(6, 0)
    assert guest.take_all(0) == [6], "the port that was the queue's last"


def test_events_of_each_priority_have_a_queue(guest: Guest) -> None:
    for port, priority in ((5, 15), (6, 0), (7, 3)):
        guest.fifo.set_priority(port, priority)
    for port in (4, 5, 6, 7):
        guest.fifo.set_pending(port, 0)
    assert guest.ready(0) == 1 << 15 | 1 << 0 | 1 << 3 | 1 << 7
    assert guest.take_all(0) == [6, 7, 4, 5]


def test_a_linked_event_stays_on_its_queue_when_its_priority_changes(guest: Guest) -> None:
    guest.fifo.set_pending(5, 0)
    guest.fifo.set_priority(5, 1)
    assert guest.ready(0) == 1 << 7
    assert guest.take_all(0) == [5]
    guest.fifo.set_pending(5, 0)
    assert guest.ready(0) == 1 << 1
    # The old queue ended with 5, which is now on another: nothing may be linked behind it there.
    guest.fifo.set_pending(6, 0)
    assert guest.word(5) & LINK_MASK == 0 and guest.head(0, 7) == 6
    assert guest.take_all(0) == [5, 6]


@pytest.mark.parametrize("priority", [16, 17, 1 << 31, -1])
def test_no_such_priority(guest: Guest, priority: int) -> None:
    with pytest.raises(XenError) as refused:
        guest.fifo.set_priority(5, priority)
    assert refused.value.errno == errno.EINVAL


def test_a_port_bound_anew_has_the_default_priority(guest: Guest) -> None:
    guest.fifo.set_priority(5, 0)
    guest.fifo.opened(5)
    guest.fifo.set_pending(5, 0)
    assert guest.ready(0) == 1 << 7


def test_an_event_waits_for_its_page_of_the_array(guest: Guest) -> None:
    guest.fifo.set_pending(1024, 0)
    guest.fifo.set_pending(2047, 0)
    guest.fifo.set_pending(2048, 0)
    guest.fifo.set_pending(1500, 0)
    guest.fifo.clear(1500)
    assert not guest.fifo.is_pending(1024) and not guest.fifo.is_busy(1024) and guest.woken == []
    guest.fifo.unmask(1024, 0)
    assert guest.fifo.add_page(BASE + ARRAY + 1) == [1024, 2047]
    assert guest.fifo.add_page(BASE + ARRAY + 2) == [2048]


def test_an_event_for_a_vcpu_without_control_block_is_lost() -> None:
    guest = Guest()
    guest.fifo.map_block(0, BASE + BLOCKS, 0)
    guest.fifo.add_page(BASE + ARRAY)
    guest.fifo.set_pending(5, 1)
    assert guest.word(5) == 0 and guest.woken == []


def test_a_closed_port_is_busy_while_it_is_linked(guest: Guest) -> None:
    guest.fifo.set_pending(5, 0)
    guest.fifo.clear(5)
    assert not guest.fifo.is_pending(5) and guest.fifo.is_busy(5) and guest.word(5) == LINKED
    assert guest.take_all(0) == [], "the guest passes over it"
    assert not guest.fifo.is_busy(5)


def test_uses_of_frames_are_counted_and_given_back(guest: Guest) -> None:
    guest.fifo.add_page(BASE + ARRAY)
    assert guest.frames.held == {BLOCKS: VCPUS, ARRAY: 2}
    assert sorted(guest.fifo.held_frames()) == [BLOCKS] * VCPUS + [ARRAY] * 2
    guest.fifo.release()
    assert not +guest.frames.held and guest.fifo.held_frames() == []


def test_the_array_has_an_end(guest: Guest) -> None:
    for _ in range(MAX_ARRAY_PAGES - 1):
        guest.fifo.add_page(BASE + ARRAY)
    with pytest.raises(XenError) as refused:
        guest.fifo.add_page(BASE + ARRAY)
    assert refused.value.errno == errno.ENOSPC
    last = abi.EVTCHN_FIFO_NR_CHANNELS - 1
    guest.fifo.set_pending(last, 0)
    assert guest.fifo.is_pending(last) and guest.head(0, 7) == last


def test_a_guest_that_takes_events_off_gets_each_once_and_in_order() -> None:
    """Sends and takes at random; Linux's way of taking must see every event, the urgent ones first."""
    dice = random.Random(4711)
    guest = Guest().set_up(2)
    ports = [1, 2, 3, 100, 1023, 1024, 2047]
    vcpu_of = {port: dice.randrange(VCPUS) for port in ports}
    owed: set[int] = set()
    for _ in range(4000):
        act = dice.random()
        port = dice.choice(ports)
        if act < 0.5:
            guest.fifo.set_pending(port, vcpu_of[port])
            owed.add(port)
        elif act < 0.6:
            guest.fifo.set_priority(port, dice.randrange(16))
        elif act < 0.7:
            vcpu_of[port] = dice.randrange(VCPUS)
        elif act < 0.8:
            guest.set_word(port, guest.word(port) | MASKED)
        elif act < 0.9:
            guest.fifo.unmask(port, vcpu_of[port])
        else:
            for vcpu in range(VCPUS):
                taken = guest.take_all(vcpu)
                assert len(set(taken)) == len(taken) and owed.issuperset(taken)
                owed.difference_update(taken)
    for port in ports:
        guest.fifo.unmask(port, vcpu_of[port])
    for vcpu in range(VCPUS):
        owed.difference_update(guest.take_all(vcpu))
    assert not owed


def test_whatever_the_guest_writes_there_only_its_own_pages_change() -> None:
    """Blocks, array and vcpu_info full of noise, the array's pages used twice: no error, nothing else written."""
    dice = random.Random(815)
    guest = Guest().set_up(2)
    guest.fifo.add_page(BASE + BLOCKS)  # the control blocks are words of ports 2048 to 3071 as well
    mine = {INFO, BLOCKS, ARRAY, ARRAY + 1}
    others = {index: bytes(guest.memory.page(index)) for index in range(PAGES) if index not in mine}
    for _ in range(60):
        for index in mine:
            guest.memory.page(index)[:] = dice.randbytes(4096)
        for _ in range(100):
            port, vcpu = dice.randrange(3072), dice.randrange(VCPUS)
            dice.choice((guest.fifo.set_pending, guest.fifo.unmask))(port, vcpu)
            guest.fifo.is_busy(port)
            if dice.random() < 0.2:
                guest.fifo.clear(port)
                assert not guest.fifo.is_pending(port)
            if dice.random() < 0.2:
                guest.fifo.set_priority(port, dice.randrange(16))
    assert {index: bytes(guest.memory.page(index)) for index in others} == others
    restored = guest.make()
    restored.restore(json.loads(json.dumps(guest.fifo.save())))
    assert restored.save() == guest.fifo.save()


def test_save_and_restore(guest: Guest) -> None:
    guest.fifo.set_priority(6, 2)
    for port in (5, 6, 3000):
        guest.fifo.set_pending(port, 0)
    saved = json.loads(json.dumps(guest.fifo.save()))
    held = dict(guest.frames.held)
    guest.fifo = guest.make()
    guest.fifo.restore(saved)
    assert dict(guest.frames.held) == held, "the frame table has the uses"
    guest.fifo.set_pending(7, 0)
    assert guest.take_all(0) == [6, 5, 7], "the queue goes on where it was"
    guest.fifo.set_pending(6, 0)
    assert guest.ready(0) == 1 << 2
    assert guest.fifo.add_page(BASE + ARRAY + 1) == [] and guest.fifo.add_page(BASE + ARRAY + 2) == [3000]


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": [-1]},
        {"tails": [0]},
        {"blocks": [1 << 40, -1, -1]},
        {"blocks": [-2, -1, -1]},
        {"pages": [1 << 30]},
        {"tails": [1024] * VCPUS * 16},
        {"priority": [[5, 16]]},
        {"last": [[5, VCPUS * 16]]},
    ],
)
def test_restore_refuses_what_does_not_fit(guest: Guest, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="FIFO event state"):
        guest.make().restore(guest.fifo.save() | wrong)


# -- coming to FIFO and leaving it


class Domain:
    """Channels that begin with the 2-level ABI, and the way from there."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.first = TwoLevelBits()
        self.channels = EventChannels(DomId(7), self.first, Nobody(), 100_000)
        self.control = FifoControl(self.channels, self.guest.make)

    def init(self, vcpu: int = 0, offset: int = 0, mfn: int = BASE + BLOCKS) -> None:
        self.control.init_control(vcpu, mfn, offset, VCPUS)


@pytest.mark.parametrize(
    ("vcpu", "offset", "mfn", "error"),
    [
        (VCPUS, 0, BASE + BLOCKS, errno.ENOENT),
        (0xFFFF_FFFF, 1, 0, errno.ENOENT),
        (0, 4096 - 72 + 8, BASE + BLOCKS, errno.EINVAL),
        (0, 0xFFFF_FFF8, BASE + BLOCKS, errno.EINVAL),
        (0, 4, BASE + BLOCKS, errno.EINVAL),
        (0, 0, BASE - 1, errno.EINVAL),
        (0, 0, (1 << 64) - 1, errno.EINVAL),
        (0, 0, BASE + SPARE, errno.EINVAL),
    ],
)
def test_control_blocks_that_are_refused(vcpu: int, offset: int, mfn: int, error: int) -> None:
    domain = Domain()
    domain.guest.frames.refused.add(SPARE)
    with pytest.raises(XenError) as refused:
        domain.init(vcpu, offset, mfn)
    assert refused.value.errno == error
    assert domain.channels.events is domain.first and not +domain.guest.frames.held


def test_the_last_place_for_a_control_block_and_only_one_each() -> None:
    domain = Domain()
    domain.init(0, 4096 - 72)
    with pytest.raises(XenError) as refused:
        domain.init(0, 0)
    assert refused.value.errno == errno.EINVAL
    domain.init(2, 0)
    assert domain.control.held_frames() == [BLOCKS, BLOCKS]


def test_the_array_comes_after_a_control_block() -> None:
    domain = Domain()
    with pytest.raises(XenError) as refused:
        domain.control.expand_array(BASE + ARRAY)
    assert refused.value.errno == errno.EOPNOTSUPP
    assert domain.control.held_frames() == []


def test_what_was_pending_before_is_raised_with_the_array() -> None:
    domain = Domain()
    ports = [domain.channels.bind_ipi(0, VCPUS) for _ in range(3)]
    domain.channels.send(ports[1])
    domain.first.pending.add(60)  # a closed port
    domain.init()
    assert domain.guest.woken == []
    domain.control.expand_array(BASE + ARRAY)
    assert domain.guest.take_all(0) == [ports[1]]
    assert domain.guest.called(0)


def test_more_ports_than_the_two_level_abi_has() -> None:
    domain = Domain()
    for _ in range(4095):
        domain.channels.bind_ipi(0, VCPUS)
    with pytest.raises(XenError) as refused:
        domain.channels.bind_ipi(0, VCPUS)
    assert refused.value.errno == errno.ENOSPC
    domain.init()
    assert domain.channels.bind_ipi(0, VCPUS) == 4096
    domain.channels.close(4096)
    assert domain.channels.reset()
    domain.channels.unmask(4096)
    assert domain.channels.bind_ipi(0, VCPUS) == 1


def test_a_busy_port_is_given_out_when_the_guest_has_unlinked_it() -> None:
    domain = Domain()
    domain.init()
    domain.control.expand_array(BASE + ARRAY)
    first, second = (domain.channels.bind_ipi(0, VCPUS) for _ in range(2))
    domain.channels.send(first)
    domain.channels.close(first)
    assert domain.channels.bind_ipi(0, VCPUS) == second + 1
    assert domain.channels.bind_ipi(0, VCPUS) == second + 2
    assert domain.guest.take_all(0) == []
    assert domain.channels.bind_ipi(0, VCPUS) == first


def test_reset_gives_the_pages_back_and_a_second_start_works() -> None:
    domain = Domain()
    for _ in range(2):
        domain.init()
        domain.init(1, BLOCK_SIZE)
        domain.control.expand_array(BASE + ARRAY)
        port = domain.channels.bind_ipi(1, VCPUS)
        domain.channels.send(port)
        assert domain.guest.take_all(1) == [port]
        assert domain.channels.reset()
        assert domain.channels.events is domain.first and not +domain.guest.frames.held
        domain.guest.heads.clear()


def test_channels_saved_with_fifo_are_restored_with_it() -> None:
    domain = Domain()
    port = domain.channels.bind_virq(abi.VIRQ_TIMER, 1, VCPUS)
    domain.init(1, BLOCK_SIZE)
    domain.control.expand_array(BASE + ARRAY)
    domain.channels.set_priority(port, 3)
    saved = json.loads(json.dumps(domain.channels.save()))
    domain.channels = EventChannels(DomId(7), domain.first, Nobody())
    domain.control = FifoControl(domain.channels, domain.guest.make)
    domain.control.restore(saved)
    assert domain.channels.save() == saved
    domain.channels.raise_virq(abi.VIRQ_TIMER, 1)
    assert domain.guest.head(1, 3) == port
    assert domain.control.held_frames() == [BLOCKS, ARRAY]
    assert domain.channels.reset() and domain.channels.events is domain.first
    assert domain.channels.save()["abi"] == {"name": "2l"}
