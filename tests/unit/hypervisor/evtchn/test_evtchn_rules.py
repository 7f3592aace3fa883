"""What Xen 4.17 answers to each event channel operation (common/event_channel.c), row by row."""

from __future__ import annotations

import json
import struct

import pytest
from pv_rig import Rig, code_of

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.evtchn.core import NR_VIRQS, VCPU_VIRQS, ChannelState
from hypervisor.evtchn.hostside import HostRouter
from hypervisor.hypercalls import events

ARGS = 40 * 4096
SELF, OWN, HOST, NOBODY = abi.DOMID_SELF, 7, 0, 0x1234
VCPUS = 2
ALLOC, BIND, VIRQ, IPI = (
    abi.EVTCHNOP_alloc_unbound,
    abi.EVTCHNOP_bind_interdomain,
    abi.EVTCHNOP_bind_virq,
    abi.EVTCHNOP_bind_ipi,
)
PIRQ, CLOSE, SEND, STATUS = abi.EVTCHNOP_bind_pirq, abi.EVTCHNOP_close, abi.EVTCHNOP_send, abi.EVTCHNOP_status
BIND_VCPU, UNMASK, RESET = abi.EVTCHNOP_bind_vcpu, abi.EVTCHNOP_unmask, abi.EVTCHNOP_reset

LAYOUTS = {ALLOC: "<2H4x", BIND: "<HxxI4x", STATUS: "<HxxI16x", RESET: "<H"}
MANY = 0xFFFF_FFFF
# The ports that every row finds: the console's, an unbound one, a pair, two VIRQs, an IPI. Port 8 is free.
CONSOLE, UNBOUND, LEFT, RIGHT, TIMER, GLOBAL, AN_IPI, FREE, BEYOND = 1, 2, 3, 4, 5, 6, 7, 8, 64


class Row:
    """The domain of a row."""

    def __init__(self) -> None:
        self.rig = Rig(vcpus=VCPUS).boot()
        self.host: list[int] = []
        self.channels = self.rig.domain.events
        self.channels.router = HostRouter(self.host.append)
        self.channels.open_host(CONSOLE)
        assert self(ALLOC, SELF, NOBODY) == self(ALLOC, SELF, SELF) == self(BIND, SELF, LEFT) == 0
        assert self(VIRQ, abi.VIRQ_TIMER, 1) == self(VIRQ, abi.VIRQ_ARCH_0, 0) == self(IPI, 1) == 0
        assert [int(c.state) for c in self.channels.channels[:9]] == [0, 2, 1, 2, 2, 4, 4, 5, 0]

    def __call__(self, command: int, *values: int) -> int:
        layout = LAYOUTS.get(command, f"<{len(values)}I8x")
        self.rig.put(ARGS, struct.pack(layout, *values))
        return code_of(events.event_channel_op, self.rig.domain, command, ARGS, 0, 0, 0, 0)

    def status(self, port: int) -> tuple[int, ...]:
        """status, vcpu and the two words of the union, which the caller's bytes fill where Xen writes none."""
        assert self(STATUS, SELF, port) == 0
        return struct.unpack("<4I", self.rig.get(ARGS + 8, 16))


@pytest.fixture
def row() -> Row:
    return Row()


@pytest.mark.parametrize(
    ("command", "values", "error"),
    [
        (ALLOC, (SELF, SELF), 0),
        (ALLOC, (OWN, NOBODY), 0),
        (ALLOC, (HOST, SELF), errno.EPERM),
        (ALLOC, (NOBODY, SELF), errno.ESRCH),
        (ALLOC, (0x7FF4, SELF), errno.ESRCH),
        (BIND, (SELF, UNBOUND), errno.EINVAL),
        (BIND, (SELF, LEFT), errno.EINVAL),
        (BIND, (SELF, TIMER), errno.EINVAL),
        (BIND, (SELF, 0), errno.EINVAL),
        (BIND, (SELF, FREE), errno.EINVAL),
        (BIND, (OWN, BEYOND), errno.EINVAL),
        (BIND, (SELF, MANY), errno.EINVAL),
        (BIND, (HOST, 1), errno.EINVAL),
        (BIND, (NOBODY, 1), errno.ESRCH),
        (VIRQ, (abi.VIRQ_TIMER, 0), 0),
        (VIRQ, (abi.VIRQ_TIMER, 1), errno.EEXIST),
        (VIRQ, (abi.VIRQ_TIMER, VCPUS), errno.ENOENT),
        (VIRQ, (abi.VIRQ_DEBUG, 1), 0),
        (VIRQ, (abi.VIRQ_XENOPROF, 1), 0),
        (VIRQ, (abi.VIRQ_XENPMU, 1), 0),
        (VIRQ, (abi.VIRQ_CONSOLE, 0), 0),
        (VIRQ, (abi.VIRQ_CONSOLE, 1), errno.EINVAL),
        (VIRQ, (abi.VIRQ_DOM_EXC, 0), 0),
        (VIRQ, (abi.VIRQ_ARCH_0, 0), errno.EEXIST),
        (VIRQ, (abi.VIRQ_ARCH_7, 0), 0),
        (VIRQ, (abi.VIRQ_ARCH_7, 1), errno.EINVAL),
        (VIRQ, (5, 0), 0),
        (VIRQ, (5, 99), errno.EINVAL),
        (VIRQ, (24, 0), errno.EINVAL),
        (VIRQ, (MANY, 0), errno.EINVAL),
        (VIRQ, (24, 99), errno.EINVAL),
        (IPI, (0,), 0),
        (IPI, (VCPUS,), errno.ENOENT),
        (IPI, (MANY,), errno.ENOENT),
        (PIRQ, (1, 0), errno.EPERM),
        (PIRQ, (MANY, 0), errno.EINVAL),
        (CLOSE, (CONSOLE,), 0),
        (CLOSE, (UNBOUND,), 0),
        (CLOSE, (LEFT,), 0),
        (CLOSE, (TIMER,), 0),
        (CLOSE, (AN_IPI,), 0),
        (CLOSE, (0,), errno.EINVAL),
        (CLOSE, (FREE,), errno.EINVAL),
        (CLOSE, (BEYOND,), errno.EINVAL),
        (CLOSE, (MANY,), errno.EINVAL),
        (SEND, (CONSOLE,), 0),
        (SEND, (UNBOUND,), 0),
        (SEND, (RIGHT,), 0),
        (SEND, (AN_IPI,), 0),
        (SEND, (TIMER,), errno.EINVAL),
        (SEND, (0,), errno.EINVAL),
        (SEND, (FREE,), errno.EINVAL),
        (SEND, (MANY,), errno.EINVAL),
        (STATUS, (OWN, 0), 0),
        (STATUS, (SELF, BEYOND - 1), 0),
        (STATUS, (SELF, BEYOND), errno.EINVAL),
        (STATUS, (SELF, MANY), errno.EINVAL),
        (STATUS, (HOST, 1), errno.EPERM),
        (STATUS, (NOBODY, 1), errno.ESRCH),
        (BIND_VCPU, (CONSOLE, 1), 0),
        (BIND_VCPU, (UNBOUND, 1), 0),
        (BIND_VCPU, (GLOBAL, 1), 0),
        (BIND_VCPU, (TIMER, 0), errno.EINVAL),
        (BIND_VCPU, (TIMER, 1), errno.EINVAL),
        (BIND_VCPU, (AN_IPI, 1), errno.EINVAL),
        (BIND_VCPU, (FREE, 1), errno.EINVAL),
        (BIND_VCPU, (0, 0), errno.EINVAL),
        (BIND_VCPU, (BEYOND, 0), errno.EINVAL),
        (BIND_VCPU, (MANY, VCPUS), errno.ENOENT),
        (BIND_VCPU, (CONSOLE, MANY), errno.ENOENT),
        (UNMASK, (CONSOLE,), 0),
        (UNMASK, (0,), 0),
        (UNMASK, (FREE,), 0),
        (UNMASK, (BEYOND,), errno.EINVAL),
        (UNMASK, (MANY,), errno.EINVAL),
        (RESET, (SELF,), 0),
        (RESET, (OWN,), 0),
        (RESET, (HOST,), errno.EPERM),
        (RESET, (NOBODY,), errno.ESRCH),
        (14, (SELF,), errno.EBUSY),
        (15, (0,), errno.ENOSYS),
        (MANY, (0,), errno.ENOSYS),
    ],
)
def test_answers(row: Row, command: int, values: tuple[int, ...], error: int) -> None:
    before = row.channels.save()
    assert row(command, *values) == error
    if error:
        assert row.channels.save() == before


def test_status_of_each_kind(row: Row) -> None:
    assert row.status(0) == (0, 0, 0, 0)
    assert row.status(FREE) == (0, 0, 0, 0)
    assert row.status(CONSOLE) == (2, 0, HOST, CONSOLE)
    assert row.status(UNBOUND) == (1, 0, NOBODY, 0)
    assert row.status(LEFT) == (2, 0, OWN, RIGHT)
    assert row.status(TIMER) == (4, 1, abi.VIRQ_TIMER, 0)
    assert row.status(GLOBAL) == (4, 0, abi.VIRQ_ARCH_0, 0)
    assert row.status(AN_IPI) == (5, 1, 0, 0)


def test_the_lowest_free_port_is_given_out(row: Row) -> None:
    row(CLOSE, RIGHT)
    row(CLOSE, UNBOUND)
    given = []
    for _ in range(3):
        assert row(IPI, 0) == 0
        given.append(row.rig.u32(ARGS + 4))
    assert given == [UNBOUND, RIGHT, FREE]


def test_ports_end_at_the_configured_one(row: Row) -> None:
    while row(IPI, 0) == 0:
        pass
    assert (
        row(IPI, 0)
        == row(ALLOC, SELF, SELF)
        == row(VIRQ, abi.VIRQ_DEBUG, 0)
        == row(BIND, SELF, UNBOUND)
        == errno.ENOSPC
    )
    assert row.status(1023)[0] == ChannelState.IPI and row(STATUS, SELF, 1024) == errno.EINVAL
    assert row(CLOSE, 700) == 0 and row(IPI, 0) == 0 and row.rig.u32(ARGS + 4) == 700


def test_closing_one_end_leaves_the_other_unbound_for_the_same_domain(row: Row) -> None:
    row(BIND_VCPU, LEFT, 1)
    assert row(CLOSE, RIGHT) == 0
    assert row.status(LEFT) == (1, 1, OWN, 0)
    assert row(BIND, SELF, LEFT) == 0 and row.rig.u32(ARGS + 8) == RIGHT
    assert row.channels.is_pending(RIGHT), "the near end is told to look"
    assert row.status(RIGHT) == (2, 0, OWN, LEFT)


def test_a_closed_port_forgets_its_vcpu_and_its_event(row: Row) -> None:
    row(SEND, AN_IPI)
    assert row.channels.is_pending(AN_IPI)
    row(CLOSE, AN_IPI)
    assert row(ALLOC, SELF, SELF) == 0
    assert row.status(AN_IPI) == (1, 0, OWN, 0) and not row.channels.is_pending(AN_IPI)


def test_a_domains_virq_follows_its_port_to_another_vcpu(row: Row) -> None:
    row(BIND_VCPU, GLOBAL, 1)
    row.rig.woken.clear()
    row.rig.put(row.rig.domain.area.shared_info * 4096 + abi.SHARED_INFO_EVTCHN_PENDING, bytes(8))
    row.channels.raise_virq(abi.VIRQ_ARCH_0)
    assert row.rig.woken == [(1, GLOBAL)]
    row.channels.restore(json.loads(json.dumps(row.channels.save())))
    assert row(VIRQ, abi.VIRQ_ARCH_0, 0) == errno.EEXIST
    assert row(CLOSE, GLOBAL) == 0
    assert row(VIRQ, abi.VIRQ_ARCH_0, 0) == 0


def test_every_virq_can_be_bound_and_closed(row: Row) -> None:
    for virq in range(NR_VIRQS):
        vcpu = 0 if virq != abi.VIRQ_ARCH_0 else 1
        expected = errno.EINVAL if vcpu and virq not in VCPU_VIRQS else 0
        assert row(VIRQ, virq, vcpu) == expected
    assert row(RESET, SELF) == 0 and row.channels.virqs == {}


def test_the_host_hears_of_its_ports(row: Row) -> None:
    row(SEND, CONSOLE)
    assert row.host == [CONSOLE]
    row(CLOSE, CONSOLE)
    assert row(SEND, CONSOLE) == errno.EINVAL and row.host == [CONSOLE]
    row.channels.pend(CONSOLE)
    assert row.rig.woken[-1:] != [(0, CONSOLE)], "a closed port gets no events"


def test_reset_and_the_end_close_everything(row: Row) -> None:
    for end in (row.channels.reset, row.channels.destroy):
        row(IPI, 0)
        end()
        assert all(c.state is ChannelState.FREE for c in row.channels.channels)


def test_an_announced_word_is_not_announced_again(row: Row) -> None:
    """While the selector bit is set the vCPU is not called, as in evtchn_2l_set_pending."""
    rig, info = row.rig, row.rig.domain.vcpus[1].state.vcpu_info
    row(UNMASK, AN_IPI)
    rig.put(info, bytes(1))
    rig.put(info + abi.VCPU_INFO_EVTCHN_PENDING_SEL, struct.pack("<Q", 1))
    row(SEND, AN_IPI)
    assert row.channels.is_pending(AN_IPI) and rig.get(info, 1) == b"\0"


@pytest.mark.parametrize(
    "wrong",
    [
        [5, 32, 0, 0, 0],
        [4, 0, 0, 0, 24],
        [2, 0, OWN, 60, 0],
        [2, 0, OWN, 99_999, 0],
        [2, 0, OWN, -1, 0],
        [9, 0, 0, 0, 0],
    ],
)
def test_a_table_that_cannot_be_is_not_restored(row: Row, wrong: list[int]) -> None:
    before = row.channels.save()
    data = json.loads(json.dumps(before))
    data["channels"][FREE] = wrong
    with pytest.raises(ValueError, match=r"port 8|ChannelState"):
        row.channels.restore(data)
    assert row.channels.save() == before
