"""event_channel_op with the FIFO ABI on a domain with real frame counts; what it copies in and out."""

from __future__ import annotations

import json
import random
import struct

import pytest
from pv_rig import BASE, FIRST_FREE, PAGE, ROOT_L1, Rig, code_of

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.evtchn.fifo import LINKED, MASKED, PENDING
from hypervisor.hypercalls import events, scheduling
from hypervisor.hypercalls.registry import Continuation
from hypervisor.memory.frames import WRITABLE

ARGS = 40 * PAGE  # a page for arguments
CONTROL, ARRAY = FIRST_FREE, FIRST_FREE + 1
HEAD = abi.EVTCHN_FIFO_CONTROL_BLOCK_HEAD


@pytest.fixture
def rig() -> Rig:
    return Rig(vcpus=2).boot()


def op(rig: Rig, command: int, layout: str, *values: int) -> int:
    """Its errno, or 0; the structure is at ARGS afterwards."""
    rig.put(ARGS, struct.pack(layout, *values))
    return code_of(events.event_channel_op, rig.domain, command, ARGS, 0, 0, 0, 0)


def init(rig: Rig, index: int = CONTROL, offset: int = 0, vcpu: int = 0) -> int:
    return op(rig, abi.EVTCHNOP_init_control, "<QII8x", BASE + index, offset, vcpu)


def expand(rig: Rig, index: int = ARRAY) -> int:
    return op(rig, abi.EVTCHNOP_expand_array, "<Q", BASE + index)


def bind_ipi(rig: Rig, vcpu: int = 0) -> int:
    assert op(rig, abi.EVTCHNOP_bind_ipi, "<2I", vcpu, 0) == 0
    return rig.u32(ARGS + 4)


def send(rig: Rig, port: int) -> int:
    return op(rig, abi.EVTCHNOP_send, "<I", port)


def word(rig: Rig, port: int) -> int:
    return rig.u32(ARRAY * PAGE + 4 * port)


def test_init_control_tells_the_bits_of_a_link(rig: Rig) -> None:
    assert init(rig) == 0
    assert rig.get(ARGS + 16, 8) == bytes([17, 0, 0, 0, 0, 0, 0, 0])
    assert rig.domain.fifo.held_frames() == [CONTROL]


def test_frames_of_the_abi_are_used_as_writable_and_given_back(rig: Rig) -> None:
    before = rig.snapshot()
    assert init(rig) == init(rig, offset=128, vcpu=1) == expand(rig) == 0
    kinds, counts = rig.frames.kind, rig.frames.count
    assert kinds[CONTROL] == kinds[ARRAY] == WRITABLE and (counts[CONTROL], counts[ARRAY]) == (3, 2)
    rig.check()
    assert op(rig, abi.EVTCHNOP_reset, "<H", abi.DOMID_SELF) == 0
    assert rig.snapshot() == before


def test_frames_that_cannot_be_written_are_refused(rig: Rig) -> None:
    before = rig.snapshot()
    outside = (0, BASE - 1, BASE + rig.memory.frames, (1 << 52) - 1, (1 << 64) - 1)
    for mfn in (BASE + ROOT_L1, *outside):
        assert op(rig, abi.EVTCHNOP_init_control, "<QII8x", mfn, 0, 0) == errno.EINVAL
    assert expand(rig) == errno.EOPNOTSUPP
    assert rig.snapshot() == before
    assert init(rig) == 0
    for mfn in (BASE + ROOT_L1, *outside):
        assert op(rig, abi.EVTCHNOP_expand_array, "<Q", mfn) == errno.EINVAL
    assert rig.domain.fifo.held_frames() == [CONTROL]


def test_a_page_of_the_abi_becomes_no_page_table_meanwhile(rig: Rig) -> None:
    init(rig)
    expand(rig)
    rig.unmap(CONTROL, ARRAY)
    for index in (CONTROL, ARRAY):
        assert code_of(rig.tables.pin, BASE + index, 1) == errno.EINVAL
    op(rig, abi.EVTCHNOP_reset, "<H", abi.DOMID_SELF)
    assert code_of(rig.tables.pin, BASE + CONTROL, 1) == 0


def test_an_event_goes_from_send_to_the_control_block(rig: Rig) -> None:
    port = bind_ipi(rig, 1)
    assert init(rig) == init(rig, offset=128, vcpu=1) == expand(rig) == 0
    assert op(rig, abi.EVTCHNOP_set_priority, "<2I", port, 2) == 0
    rig.woken.clear()
    assert send(rig, port) == 0
    assert word(rig, port) == PENDING | LINKED
    block = CONTROL * PAGE + 128
    assert rig.u32(block) == 1 << 2 and rig.u32(block + HEAD + 4 * 2) == port
    info = rig.domain.vcpus[1].state.vcpu_info
    assert rig.memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] == 1
    assert rig.woken == [(1, port)]


def test_unmask_delivers(rig: Rig) -> None:
    port = bind_ipi(rig)
    init(rig)
    expand(rig)
    rig.put(ARRAY * PAGE + 4 * port, struct.pack("<I", MASKED))
    send(rig, port)
    assert word(rig, port) == MASKED | PENDING and rig.u32(CONTROL * PAGE) == 0
    assert op(rig, abi.EVTCHNOP_unmask, "<I", port) == 0
    assert word(rig, port) == PENDING | LINKED and rig.u32(CONTROL * PAGE) == 1 << 7


def test_two_level_events_that_are_pending_come_with_the_array(rig: Rig) -> None:
    port, quiet = bind_ipi(rig), bind_ipi(rig)
    send(rig, port)
    assert init(rig) == expand(rig) == 0
    assert word(rig, port) == PENDING | LINKED and word(rig, quiet) == 0


@pytest.mark.parametrize(
    ("fifo", "port", "priority", "error"),
    [
        (False, 1, 7, errno.ENOSYS),
        (False, 63, 7, errno.ENOSYS),
        (False, 64, 7, errno.EINVAL),
        (True, 1, 0, 0),
        (True, 1, 15, 0),
        (True, 1, 16, errno.EINVAL),
        (True, 1, 0xFFFF_FFFF, errno.EINVAL),
        (True, 0, 7, errno.EACCES),
        (True, 2, 7, errno.EACCES),
        (True, 2, 16, errno.EACCES),
        (True, 64, 7, errno.EINVAL),
        (True, 0xFFFF_FFFF, 7, errno.EINVAL),
    ],
)
def test_set_priority(rig: Rig, fifo: bool, port: int, priority: int, error: int) -> None:
    assert bind_ipi(rig) == 1
    if fifo:
        init(rig)
    assert op(rig, abi.EVTCHNOP_set_priority, "<2I", port, priority) == error


def test_polling(rig: Rig) -> None:
    port, other = bind_ipi(rig), bind_ipi(rig)
    init(rig)
    expand(rig)
    rig.put(ARRAY * PAGE, struct.pack("<4I", 0, MASKED, MASKED, 0))
    vcpu = rig.domain.running

    def poll(*ports: int) -> int:
        rig.put(ARGS + 64, struct.pack(f"<{len(ports)}I", *ports))
        rig.put(ARGS, struct.pack("<QI4xQ", ARGS + 64, len(ports), 0))
        return code_of(scheduling.sched_op, rig.domain, abi.SCHEDOP_poll, ARGS, 0, 0, 0, 0)

    assert poll(port, other) == 0 and vcpu.blocked and vcpu.poll == (port, other)
    vcpu.blocked, vcpu.poll = False, None
    rig.woken.clear()
    send(rig, other)
    assert rig.woken == [(0, other)], "the machine ends the wait of who polls it"
    assert poll(port, other) == 0 and not vcpu.blocked
    for closed in (0, other + 1, 1 << 17, 0xFFFF_FFFF):
        assert poll(closed) == errno.EINVAL and not vcpu.blocked


def test_a_long_reset_gives_way_and_goes_on(rig: Rig) -> None:
    for _ in range(300):
        bind_ipi(rig)
    init(rig)
    rig.domain.preempt = True
    command, steps = abi.EVTCHNOP_reset, 0
    rig.put(ARGS, struct.pack("<H", abi.DOMID_SELF))
    while True:
        try:
            events.event_channel_op(rig.domain, command, ARGS, 0, 0, 0, 0)
            break
        except Continuation as again:
            command, argument = again.arguments
            assert argument == ARGS
            steps += 1
        assert op(rig, abi.EVTCHNOP_reset, "<H", abi.DOMID_SELF) == errno.EBUSY
    assert steps == 4 and rig.domain.fifo.held_frames() == []
    assert op(rig, events.RESET_CONT, "<H", abi.DOMID_SELF) == errno.EBUSY
    assert bind_ipi(rig) == 1


def test_arguments_are_read_whole_before_anything_is_done(rig: Rig) -> None:
    rig.unmap(41)
    rig.put(41 * PAGE - 4, struct.pack("<I", 0))
    code = code_of(events.event_channel_op, rig.domain, abi.EVTCHNOP_bind_ipi, 41 * PAGE - 4, 0, 0, 0, 0)
    assert code == errno.EFAULT
    assert bind_ipi(rig) == 1


def test_an_answer_that_cannot_be_written_leaves_the_port_bound(rig: Rig) -> None:
    rig.make_readonly(40)
    assert op(rig, abi.EVTCHNOP_bind_ipi, "<2I", 0, 0) == errno.EFAULT
    assert rig.domain.events.channels[1].state == abi.EVTCHNSTAT_ipi


def test_the_old_form_of_the_hypercall(rig: Rig) -> None:
    def old(command: int, *values: int) -> int:
        rig.put(ARGS, struct.pack(f"<{1 + len(values)}I", command, *values))
        return code_of(events.event_channel_op_compat, rig.domain, ARGS, 0, 0, 0, 0, 0)

    assert old(abi.EVTCHNOP_bind_ipi, 1, 0) == 0 and rig.u32(ARGS + 8) == 1
    assert old(abi.EVTCHNOP_close, 1) == 0
    assert old(abi.EVTCHNOP_close, 1) == errno.EINVAL
    assert old(abi.EVTCHNOP_reset, 0x7FF0) == errno.ENOSYS
    assert old(0xFFFF_FFFF) == errno.ENOSYS


def test_state_and_counts_survive_a_save(rig: Rig) -> None:
    port = bind_ipi(rig)
    init(rig)
    expand(rig)
    send(rig, port)
    saved = json.loads(json.dumps(rig.domain.events.save()))
    rig.domain.fifo.restore(saved)
    assert rig.domain.events.save() == saved
    assert rig.domain.fifo.held_frames() == [CONTROL, ARRAY]
    late = bind_ipi(rig)
    send(rig, late)
    assert word(rig, port) == PENDING | LINKED | late, "linked behind what was the queue's last"
    assert op(rig, abi.EVTCHNOP_reset, "<H", abi.DOMID_SELF) == 0
    rig.check()


def test_random_calls_break_nothing(rig: Rig) -> None:
    """Any operation with any argument while the guest scribbles over its pages: errors only of the guest's kind."""
    dice = random.Random(42)
    before = rig.snapshot()
    numbers = (
        0,
        1,
        2,
        7,
        15,
        16,
        63,
        64,
        4095,
        4096,
        (1 << 17) - 1,
        1 << 17,
        0x7FF0,
        BASE + ARRAY,
        BASE + 1,
        (1 << 32) - 1,
    )
    for _ in range(6000):
        if dice.random() < 0.05:
            index = dice.choice((CONTROL, ARRAY, ARRAY + 1))
            rig.put(index * PAGE, dice.randbytes(PAGE))
        if dice.random() < 0.1:
            init(rig, dice.choice((CONTROL, ARRAY, ROOT_L1)), dice.choice((0, 8, 72, 4024, 4096)), dice.randrange(3))
        elif dice.random() < 0.1:
            expand(rig, dice.choice((ARRAY, ARRAY + 1, CONTROL, 60_000)))
        else:
            command = dice.choice([c for c in range(16) if c != abi.EVTCHNOP_reset or dice.random() < 0.02])
            op(rig, command, "<6I", *(dice.choice(numbers) for _ in range(6)))
        rig.domain.events.pend(dice.randrange(1100))
        rig.domain.events.raise_virq(dice.randrange(24), dice.randrange(2))
    rig.check()
    held = rig.domain.fifo.held_frames()
    assert len(held) <= 2 + 128
    assert op(rig, abi.EVTCHNOP_reset, "<H", abi.DOMID_SELF) == 0
    assert rig.snapshot() == before
