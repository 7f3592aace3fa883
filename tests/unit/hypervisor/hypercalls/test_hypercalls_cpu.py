"""Traps, descriptors, scheduling and time by hypercall: arguments, result, what is left behind."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from pv_rig import BASE, FIRST_FREE, PAGES, ROOT, ROOT_L1, E, Rig, call, put

from hypervisor import abi
from hypervisor.engines import x86

ARG, OUT = FIRST_FREE * 4096, (FIRST_FREE + 1) * 4096
DATA = FIRST_FREE + 3
HANDLER = 0x1234_5000
NOT_CANONICAL = 1 << 62


@pytest.fixture
def rig() -> Rig:
    return Rig(max_pages=PAGES + 8).boot()


# -- traps and callbacks


def test_set_trap_table_takes_all_up_to_the_terminator(rig: Rig) -> None:
    entry = struct.Struct("<BBH4xQ")
    rig.put(
        ARG, entry.pack(14, 4, 0xE030, HANDLER) + entry.pack(0x80, 3, 0xE033, HANDLER + 16) + entry.pack(3, 3, 0, 0)
    )
    assert call(rig, abi.HYPERVISOR_set_trap_table, ARG) == 0
    state = rig.state
    assert (state.trap_address[14], state.trap_flags[14], state.trap_cs[14]) == (HANDLER, 4, 0xE033)
    assert state.trap_address[0x80] == HANDLER + 16 and state.trap_address[3] == 0
    rig.put(ARG, entry.pack(1, 0, 0xE033, NOT_CANONICAL))
    assert call(rig, abi.HYPERVISOR_set_trap_table, ARG) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_set_trap_table, 0) == 0
    assert not any(state.trap_address)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("event", "event_callback"), ("failsafe", "failsafe_callback"), ("syscall", "syscall_callback"),
     ("syscall32", "syscall32_callback"), ("sysenter", "sysenter_callback")],
)  # fmt: skip
def test_callbacks(rig: Rig, kind: str, field: str) -> None:
    number = getattr(abi, f"CALLBACKTYPE_{kind}")
    put(rig, "<HH4xQ", number, abi.CALLBACKF_mask_events, HANDLER)
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == 0
    assert getattr(rig.state, field) == HANDLER
    masks = field.replace("callback", "masks")
    assert kind == "event" or getattr(rig.state, masks) == 1
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_unregister, ARG) == -E.EINVAL
    put(rig, "<HH4xQ", number, 0, NOT_CANONICAL)
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == -E.EINVAL
    assert getattr(rig.state, field) == HANDLER


def test_callbacks_that_are_none(rig: Rig) -> None:
    put(rig, "<HH4xQ", 99, 0, HANDLER)
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == -E.ENOSYS
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_unregister, ARG) == -E.ENOSYS
    assert call(rig, abi.HYPERVISOR_callback_op, 2, ARG) == -E.ENOSYS
    put(rig, "<HH4xQ", abi.CALLBACKTYPE_nmi, 0, HANDLER)
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == 0
    assert call(rig, abi.HYPERVISOR_callback_op, abi.CALLBACKOP_unregister, ARG) == 0


def test_set_callbacks(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_set_callbacks, HANDLER, HANDLER + 1, HANDLER + 2) == 0
    assert (rig.state.event_callback, rig.state.failsafe_callback, rig.state.syscall_callback) == (
        HANDLER, HANDLER + 1, HANDLER + 2,
    )  # fmt: skip
    assert call(rig, abi.HYPERVISOR_set_callbacks, 0, NOT_CANONICAL, 0) == -E.EINVAL
    assert rig.state.event_callback == HANDLER


# -- descriptors, segments, debug registers, FPU


def test_set_gdt_of_nothing_reads_nothing(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_set_gdt, 0, 0) == 0
    assert call(rig, abi.HYPERVISOR_set_gdt, 0, 14 * 512 + 1) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_set_gdt, 1 << 40, 1) == -E.EFAULT


def test_update_descriptor(rig: Rig) -> None:
    good, bad = 0x00CF_9300_0000_FFFF, 0x0000_8200_0000_0000
    assert call(rig, abi.HYPERVISOR_update_descriptor, rig.mpa(DATA, 8), good) == 0
    assert rig.word(DATA, 1) == 0x00CF_F300_0000_FFFF
    for address, value in ((rig.mpa(DATA, 8), bad), (rig.mpa(DATA, 9), good), (rig.mpa(ROOT_L1), good), (0, good)):
        assert call(rig, abi.HYPERVISOR_update_descriptor, address, value) == -E.EINVAL
    assert rig.word(DATA, 1) == 0x00CF_F300_0000_FFFF


@pytest.mark.parametrize(
    ("which", "read"),
    [
        (abi.SEGBASE_FS, lambda r: r.regs.fs_base),
        (abi.SEGBASE_GS_KERNEL, lambda r: r.regs.gs_base),
        (abi.SEGBASE_GS_USER, lambda r: r.state.gs_base_other),
    ],
)
def test_segment_bases(rig: Rig, which: int, read: Any) -> None:
    assert call(rig, abi.HYPERVISOR_set_segment_base, which, 0xFFFF_8880_0000_0000) == 0
    assert read(rig) == 0xFFFF_8880_0000_0000
    assert call(rig, abi.HYPERVISOR_set_segment_base, which, NOT_CANONICAL) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_set_segment_base, 9, 0) == -E.EINVAL


def test_debug_registers_by_hypercall(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_set_debugreg, 0, 0x1000) == 0
    assert call(rig, abi.HYPERVISOR_get_debugreg, 0) == 0x1000
    assert call(rig, abi.HYPERVISOR_get_debugreg, 7) == 0x400
    assert call(rig, abi.HYPERVISOR_set_debugreg, 0, 0xFFFF_8100_0000_0000) == -E.EPERM
    assert call(rig, abi.HYPERVISOR_set_debugreg, 8, 0) == call(rig, abi.HYPERVISOR_get_debugreg, 8) == -E.EINVAL


def test_stack_fpu_iopl_assists(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_stack_switch, 0xE028, 0x7000) == 0
    assert (rig.state.kernel_ss, rig.state.kernel_sp) == (0xE02B, 0x7000)
    assert call(rig, abi.HYPERVISOR_fpu_taskswitch, 1) == 0 and rig.regs.task_switched
    assert call(rig, abi.HYPERVISOR_fpu_taskswitch, 0) == 0 and not rig.regs.task_switched
    put(rig, "<I", 3)
    assert call(rig, abi.HYPERVISOR_physdev_op, abi.PHYSDEVOP_set_iopl, ARG) == 0 and rig.state.iopl == 3
    put(rig, "<I", 4)
    assert call(rig, abi.HYPERVISOR_physdev_op, abi.PHYSDEVOP_set_iopl, ARG) == -E.EINVAL and rig.state.iopl == 3
    assist = abi.VMASST_TYPE_architectural_iopl
    assert call(rig, abi.HYPERVISOR_vm_assist, abi.VMASST_CMD_enable, assist) == 0
    assert rig.domain.traps.architectural_iopl
    assert call(rig, abi.HYPERVISOR_vm_assist, abi.VMASST_CMD_disable, assist) == 0
    assert not rig.domain.traps.architectural_iopl
    assert call(rig, abi.HYPERVISOR_vm_assist, abi.VMASST_CMD_enable, 30) == -E.EINVAL


# -- scheduling and time


def shutdown(rig: Rig, command: int, reason: int) -> int:
    put(rig, "<I", reason)
    return call(rig, abi.HYPERVISOR_sched_op, command, ARG)


def test_shutdown(rig: Rig) -> None:
    assert shutdown(rig, abi.SCHEDOP_shutdown, abi.SHUTDOWN_MAX + 1) == -E.EINVAL and rig.domain.shutdown_code is None
    assert shutdown(rig, abi.SCHEDOP_shutdown, abi.SHUTDOWN_reboot) == 0
    assert rig.domain.shutdown_code == abi.SHUTDOWN_reboot and rig.leaves == 1
    shutdown(rig, abi.SCHEDOP_shutdown, abi.SHUTDOWN_crash)
    assert rig.domain.shutdown_code == abi.SHUTDOWN_reboot, "the first word counts"


def test_a_declared_shutdown_code_waits_for_the_end(rig: Rig) -> None:
    assert shutdown(rig, abi.SCHEDOP_shutdown_code, abi.SHUTDOWN_crash) == 0
    assert rig.domain.shutdown_code is None
    shutdown(rig, abi.SCHEDOP_shutdown, abi.SHUTDOWN_poweroff)
    assert rig.domain.shutdown_code == abi.SHUTDOWN_crash


def test_the_last_vcpu_that_goes_down_powers_the_domain_off(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_is_up, 0) == 1
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_down, 0) == 0
    assert rig.domain.shutdown_code == abi.SHUTDOWN_poweroff
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_is_up, 1) == -E.ENOENT


@pytest.mark.parametrize("pending", [False, True])
def test_block_opens_the_mask_and_waits_unless_something_is_pending(rig: Rig, pending: bool) -> None:
    info = rig.state.vcpu_info
    rig.memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = int(pending)
    assert call(rig, abi.HYPERVISOR_sched_op, abi.SCHEDOP_block) == 0
    assert rig.memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] == 0
    assert rig.domain.running.blocked is not pending and rig.leaves == (not pending)


def open_port(rig: Rig) -> int:
    return int(rig.domain.events.bind_ipi(0, 1))


@pytest.mark.parametrize("case", ["waits", "pending", "past", "many", "closed"])
def test_poll(rig: Rig, case: str) -> None:
    port = open_port(rig)
    put(rig, "<I", 4000 if case == "closed" else port, at=OUT)
    timeout = {"past": 1}.get(case, rig.domain.clock.now() + 10**12)
    put(rig, "<QI4xQ", OUT, 129 if case == "many" else 1, timeout)
    if case == "pending":
        rig.domain.events.pend(port)
    result = call(rig, abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, ARG)
    vcpu = rig.domain.running
    assert result == (-E.EINVAL if case in ("many", "closed") else 0)
    assert vcpu.blocked is (case == "waits")
    if case == "waits":
        assert vcpu.poll == (port,) and vcpu.poll_deadline == timeout


HUNDRED_MS = 100_000_000


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (1 << 63, HUNDRED_MS, 2 * HUNDRED_MS),
        (1 << 62, HUNDRED_MS, 2 * HUNDRED_MS),
        (1 << 49, 1 << 49, 1 << 49),
    ],
)
def test_set_timer(rig: Rig, given: int, least: int, most: int) -> None:
    """Huge and negative times are Linux's way to say that there is none: Xen fires after 100 ms."""
    now = rig.domain.clock.now()
    assert call(rig, abi.HYPERVISOR_set_timer_op, given) == 0
    if least == HUNDRED_MS:
        assert now + least <= rig.state.deadline < now + most + 10**10
    else:
        assert rig.state.deadline == given


@pytest.mark.parametrize(
    ("deadline", "flags", "result", "stored"),
    [
        (5, 0, 0, 5),
        (0, 0, 0, 1),
        (1 << 63, 0, 0, 1),
        ((1 << 63) - 1, 0, 0, (1 << 63) - 1),
        (5, abi.VCPU_SSHOTTMR_future, 0, 5),  # may be ignored, and Xen does
    ],
)
def test_single_shot_timer(rig: Rig, deadline: int, flags: int, result: int, stored: int) -> None:
    put(rig, "<QI", deadline, flags)
    rig.domain.clock.base -= 10**9
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_set_singleshot_timer, 0, ARG) == result
    assert rig.state.deadline == stored
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_stop_singleshot_timer, 0) == 0 and rig.state.deadline == 0


@pytest.mark.parametrize(
    ("period", "result"), [(999_999, -E.EINVAL), (1_000_000, 0), (1 << 62, -E.EINVAL), (1 << 40, 0)]
)
def test_periodic_timer(rig: Rig, period: int, result: int) -> None:
    put(rig, "<Q", period)
    before = rig.domain.running.periodic_ns
    assert before == 10_000_000, "100 Hz from the start"
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_set_periodic_timer, 0, ARG) == result
    assert rig.domain.running.periodic_ns == (before if result else period)
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_stop_periodic_timer, 0) == 0
    assert rig.domain.running.periodic_next == 0


def test_runstate_info_counts_the_current_state_up_to_now(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_get_runstate_info, 0, OUT) == 0
    state, since, *times = struct.unpack("<i4x5Q", rig.get(OUT, 48))
    assert state == rig.domain.running.runstate and since <= rig.domain.clock.now() and sum(times) > 0


@pytest.mark.parametrize(
    ("frame", "offset", "result"),
    [
        (DATA, 0, 0),
        (DATA, 4096 - 64, 0),
        (DATA, 4096 - 32, -E.ENXIO),
        (DATA, 4, -E.ENXIO),
        (ROOT, 0, -E.EINVAL),
        (-1, 0, -E.EINVAL),
    ],
)
def test_register_vcpu_info(rig: Rig, frame: int, offset: int, result: int) -> None:
    rig.domain.events.pend(open_port(rig))
    put(rig, "<QI", BASE + frame, offset)
    before = rig.snapshot()
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_register_vcpu_info, 0, ARG) == result
    if result:
        assert rig.snapshot() == before
        return
    at = frame * 4096 + offset
    assert rig.state.vcpu_info == at
    assert rig.memory.bytes[at + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] == 1, "look at all events once"
    assert rig.u64(at + abi.VCPU_INFO_EVTCHN_PENDING_SEL) == x86.MASK64
    rig.check()
    put(rig, "<QI", BASE + DATA + 1, 0)
    assert call(rig, abi.HYPERVISOR_vcpu_op, abi.VCPUOP_register_vcpu_info, 0, ARG) == -E.EINVAL, "once only"
