"""The way of a hypercall: numbers, continuations, multicalls."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from pv_rig import FIRST_FREE, PAGES, E, Rig

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.hypercalls.dispatch import Dispatcher
from hypervisor.hypercalls.mmu import BUDGET, PREEMPTED
from hypervisor.hypercalls.registry import REGISTRY, TABLE_SIZE
from hypervisor.memory.frames import L1

ARG, LIST, TABLE, DATA = FIRST_FREE * 4096, (FIRST_FREE + 1) * 4096, FIRST_FREE + 12, FIRST_FREE + 13
BAD = 1 << 40
XEN = 0xFFFF_8000_0000_0000
RIP = 0x1000


class Caller:
    """Calls as a guest kernel does, through the registers."""

    def __init__(self) -> None:
        self.rig = Rig(pages=PAGES, max_pages=PAGES + 8).boot()
        self.dispatcher = Dispatcher(self.rig.domain)
        self.calls = 0

    def once(self, number: int, *arguments: int) -> int | None:
        """The result, None when the call wants to be called again."""
        regs = self.rig.regs
        gpr = regs.gpr
        gpr[x86.RAX] = number & x86.MASK64
        for register, value in zip((x86.RDI, x86.RSI, x86.RDX, x86.R10, x86.R8, x86.R9), arguments, strict=False):
            gpr[register] = value & x86.MASK64
        return self.again()

    def again(self) -> int | None:
        regs = self.rig.regs
        regs.rip = RIP
        self.calls += 1
        self.dispatcher.hypercall()
        if regs.rip != RIP:
            assert regs.rip == RIP - 2, "the syscall is executed again"
            return None
        value = int(regs.gpr[x86.RAX])
        return value - (1 << 64) if value >> 63 else value

    def __call__(self, number: int, *arguments: int) -> int:
        result = self.once(number, *arguments)
        while result is None:
            result = self.again()
        return result

    def put(self, va: int, layout: str, *values: int) -> int:
        return self.rig.put(va, struct.pack(layout, *values))


@pytest.fixture
def call() -> Caller:
    return Caller()


PRIVILEGED = (abi.HYPERVISOR_domctl, abi.HYPERVISOR_sysctl, abi.HYPERVISOR_platform_op, abi.HYPERVISOR_kexec_op)


@pytest.mark.parametrize(
    "number", [*(n for n in range(TABLE_SIZE) if REGISTRY.table[n] is None), 64, 1000, 1 << 31, 1 << 32, 1 << 63]
)
def test_unknown_numbers(call: Caller, number: int) -> None:
    """The whole register counts, not its lower half. (iret has its own way.)"""
    if number != abi.HYPERVISOR_iret:
        assert call(number, 1, 2, 3) == -E.ENOSYS


@pytest.mark.parametrize("number", PRIVILEGED)
def test_privileged_calls(call: Caller, number: int) -> None:
    assert call(number, ARG) == -E.EPERM


def test_counts_of_calls_do_not_grow_with_their_numbers(call: Caller) -> None:
    for number in range(100, 400):
        call(number)
    call(abi.HYPERVISOR_xen_version, abi.XENVER_version)
    assert set(call.dispatcher.counts) == {-1, abi.HYPERVISOR_xen_version}


# number, arguments with the pointer as None
TAKES_POINTER: list[tuple[int, tuple[Any, ...]]] = [
    (abi.HYPERVISOR_set_trap_table, (None,)),
    (abi.HYPERVISOR_mmu_update, (None, 1, 0, abi.DOMID_SELF)),
    (abi.HYPERVISOR_mmuext_op, (None, 1, 0, abi.DOMID_SELF)),
    (abi.HYPERVISOR_set_gdt, (None, 512)),
    (abi.HYPERVISOR_callback_op, (abi.CALLBACKOP_register, None)),
    (abi.HYPERVISOR_callback_op, (abi.CALLBACKOP_unregister, None)),
    (abi.HYPERVISOR_multicall, (None, 1)),
    (abi.HYPERVISOR_xen_version, (abi.XENVER_extraversion, None)),
    (abi.HYPERVISOR_xen_version, (abi.XENVER_get_features, None)),
    (abi.HYPERVISOR_console_io, (abi.CONSOLEIO_write, 1, None)),
    (abi.HYPERVISOR_physdev_op, (abi.PHYSDEVOP_set_iopl, None)),
    (abi.HYPERVISOR_sched_op, (abi.SCHEDOP_shutdown, None)),
    (abi.HYPERVISOR_sched_op, (abi.SCHEDOP_poll, None)),
    (abi.HYPERVISOR_vcpu_op, (abi.VCPUOP_get_runstate_info, 0, None)),
    (abi.HYPERVISOR_vcpu_op, (abi.VCPUOP_set_periodic_timer, 0, None)),
    (abi.HYPERVISOR_vcpu_op, (abi.VCPUOP_set_singleshot_timer, 0, None)),
    (abi.HYPERVISOR_vcpu_op, (abi.VCPUOP_register_vcpu_info, 0, None)),
    (abi.HYPERVISOR_memory_op, (abi.XENMEM_memory_map, None)),
    (abi.HYPERVISOR_memory_op, (abi.XENMEM_machphys_mapping, None)),
    (abi.HYPERVISOR_memory_op, (abi.XENMEM_current_reservation, None)),
    *((abi.HYPERVISOR_event_channel_op, (op, None)) for op in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10)),
]


@pytest.mark.parametrize(
    "pointer", [BAD, XEN, 0x9000_0000_0000_0000, x86.MASK64 - 3], ids=["unmapped", "Xen", "bad", "end"]
)
@pytest.mark.parametrize(("number", "arguments"), TAKES_POINTER)
def test_bad_pointers(call: Caller, number: int, arguments: tuple[Any, ...], pointer: int) -> None:
    call.rig.domain.console = lambda _data: None
    before = call.rig.snapshot()
    given = [pointer if a is None else a for a in arguments]
    assert call(number, *given) == -E.EFAULT
    assert call.rig.snapshot() == before


def test_a_structure_across_the_end_of_what_is_mapped(call: Caller) -> None:
    call.rig.unmap(FIRST_FREE + 1)
    at = LIST - 4
    assert call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_send, at) == -E.EINVAL, "four bytes are there"
    assert call(abi.HYPERVISOR_event_channel_op, abi.EVTCHNOP_bind_vcpu, at) == -E.EFAULT, "eight are not"


# -- multicall


def entry(op: int, *arguments: int) -> bytes:
    return struct.pack("<8Q", op, 0xAAAA, *(list(arguments) + [0] * 6)[:6])


def results(call: Caller, count: int) -> list[int]:
    raw = [call.rig.u64(LIST + 64 * n + 8) for n in range(count)]
    return [v - (1 << 64) if v >> 63 else v for v in raw]


VERSION = entry(abi.HYPERVISOR_xen_version, abi.XENVER_version)
PAGESIZE = entry(abi.HYPERVISOR_xen_version, abi.XENVER_pagesize)


def test_a_multicall_goes_on_behind_errors(call: Caller) -> None:
    calls = [
        entry(63),
        entry(1 << 32),
        entry(abi.HYPERVISOR_domctl),
        entry(abi.HYPERVISOR_multicall, LIST, 1),
        entry(abi.HYPERVISOR_update_va_mapping, BAD, 0, 0),
        PAGESIZE,
    ]
    call.rig.put(LIST, b"".join(calls))
    assert call(abi.HYPERVISOR_multicall, LIST, len(calls)) == 0
    assert results(call, 6) == [-E.ENOSYS, -E.ENOSYS, -E.EPERM, -E.EINVAL, -E.EINVAL, 4096]


def test_a_multicall_stops_where_its_list_ends(call: Caller) -> None:
    call.rig.put(LIST, PAGESIZE * 64)
    call.rig.unmap(FIRST_FREE + 2)
    assert call(abi.HYPERVISOR_multicall, LIST, 0xFFFF_FFFF) == -E.EFAULT, "a huge count is bounded by memory"
    assert results(call, 64) == [4096] * 64
    assert call(abi.HYPERVISOR_multicall, BAD, 0) == 0


def test_a_read_only_list_fails_with_its_first_result(call: Caller) -> None:
    call.rig.put(LIST, PAGESIZE * 2)
    call.rig.make_readonly(FIRST_FREE + 1)
    assert call(abi.HYPERVISOR_multicall, LIST, 2) == -E.EFAULT


def test_a_multicall_gives_way_between_its_calls(call: Caller) -> None:
    call.rig.put(LIST, PAGESIZE * 5)
    call.rig.domain.preempt = True
    assert call.once(abi.HYPERVISOR_multicall, LIST, 5) is None
    assert results(call, 5) == [4096, 0xAAAA, 0xAAAA, 0xAAAA, 0xAAAA]
    gpr = call.rig.regs.gpr
    assert (gpr[x86.RDI], gpr[x86.RSI], gpr[x86.RAX]) == (LIST + 64, 4, abi.HYPERVISOR_multicall)
    call.rig.domain.preempt = False
    assert call.again() == 0
    assert results(call, 5) == [4096] * 5


def update(ptr: int, value: int) -> bytes:
    return struct.pack("<2Q", ptr, value)


def test_mmu_update_counts_what_it_did(call: Caller) -> None:
    rig = call.rig
    rig.put(
        LIST, update(rig.mpa(DATA, 8), 7) + update(rig.mpa(DATA, 16), 8) + update(0, 9) + update(rig.mpa(DATA, 24), 9)
    )
    assert call(abi.HYPERVISOR_mmu_update, LIST, 4, ARG, abi.DOMID_SELF) == -E.EINVAL
    assert rig.u32(ARG) == 2, "the two before the bad one"
    assert [rig.word(DATA, n) for n in (1, 2, 3)] == [7, 8, 0]
    assert call(abi.HYPERVISOR_mmu_update, LIST, 2, BAD, abi.DOMID_SELF) == 0, "a bad pdone is no error"
    assert call(abi.HYPERVISOR_mmu_update, LIST, 0, ARG, abi.DOMID_SELF) == 0 and rig.u32(ARG) == 0


@pytest.mark.parametrize("at", [LIST, LIST + 8, LIST + 4080, LIST + 4088])
def test_mmu_update_does_what_precedes_an_unreadable_request(call: Caller, at: int) -> None:
    rig = call.rig
    rig.unmap(FIRST_FREE + 3)
    room = ((FIRST_FREE + 3) * 4096 - at) // 16
    rig.put(at, update(rig.mpa(DATA, 8), 7) * room)
    assert call(abi.HYPERVISOR_mmu_update, at, room + 1, ARG, abi.DOMID_SELF) == -E.EFAULT
    assert rig.u32(ARG) == room


def test_a_long_mmu_update_gives_way_and_resumes_where_it_was(call: Caller) -> None:
    rig = call.rig
    count = 2 * BUDGET + 300
    raw = b"".join(update(rig.mpa(7, 8 * (n % 512)), n + 1) for n in range(count))
    base = FIRST_FREE * 4096 + 4096
    assert base + len(raw) <= PAGES * 4096
    rig.put(base, raw)
    gave_way = 0
    result = call.once(abi.HYPERVISOR_mmu_update, base, count, ARG, abi.DOMID_SELF)
    while result is None:
        gave_way += 1
        left = rig.regs.gpr[x86.RSI]
        assert left & PREEMPTED and rig.u32(ARG) + (left & ~PREEMPTED) == count
        assert rig.regs.gpr[x86.RDI] == base + 16 * rig.u32(ARG)
        result = call.again()
    assert result == 0 and gave_way == 2 and rig.u32(ARG) == count
    assert [rig.word(7, n) for n in range(512)] == [n + 1 + (count - 1 - n) // 512 * 512 for n in range(512)]


def test_a_preempted_update_within_a_multicall(call: Caller) -> None:
    rig = call.rig
    count = 600
    base = (FIRST_FREE + 4) * 4096
    rig.put(base, b"".join(update(rig.mpa(7, 8 * (n % 512)), n + 1) for n in range(count)))
    rig.put(LIST, PAGESIZE + entry(abi.HYPERVISOR_mmu_update, base, count, ARG, abi.DOMID_SELF) + PAGESIZE)
    rig.domain.preempt = True
    rounds = 0
    result = call.once(abi.HYPERVISOR_multicall, LIST, 3)
    while result is None:
        rounds += 1
        assert rounds < 20
        result = call.again()
    assert result == 0 and rounds >= 4
    assert results(call, 3) == [4096, 0, 4096]
    assert rig.u32(ARG) == count
    assert rig.word(7, (count - 1) % 512) == count


def test_mmuext_gives_way_too(call: Caller) -> None:
    rig = call.rig
    rig.unmap(TABLE)
    op = struct.Struct("<I4xQQ")
    pin, unpin = op.pack(abi.MMUEXT_PIN_L1_TABLE, rig.mfn(TABLE), 0), op.pack(abi.MMUEXT_UNPIN_TABLE, rig.mfn(TABLE), 0)
    rig.put(LIST, (pin + unpin) * 5 + pin)
    rig.domain.preempt = True
    assert call(abi.HYPERVISOR_mmuext_op, LIST, 11, ARG, abi.DOMID_SELF) == 0
    assert call.calls == 11 and rig.u32(ARG) == 11
    assert rig.frames.kind[TABLE] == L1
    rig.check()


def test_console_output_gives_way_without_loss(call: Caller) -> None:
    said: list[bytes] = []
    call.rig.domain.console = said.append
    text = bytes(range(256)) * 48
    call.rig.put(LIST, text)
    call.rig.domain.preempt = True
    assert call(abi.HYPERVISOR_console_io, abi.CONSOLEIO_write, len(text), LIST) == 0
    assert b"".join(said) == text and call.calls == 3
    assert call(abi.HYPERVISOR_console_io, abi.CONSOLEIO_read, 1, LIST) == -E.EPERM


def test_console_output_is_refused_where_nobody_takes_it(call: Caller) -> None:
    """So that Linux's earlyprintk=xen turns to the console's ring instead."""
    for count, at in ((5, LIST), (0, 0), (5, BAD)):
        assert call(abi.HYPERVISOR_console_io, abi.CONSOLEIO_write, count, at) == -E.EPERM
