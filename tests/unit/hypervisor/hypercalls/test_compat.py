"""Hypercalls of 32-bit guests: through the registers, with structures in the 32-bit layouts."""

from __future__ import annotations

import ctypes
import struct

import pytest
from pv_rig import BASE, FIRST_FREE, E
from pv_rig32 import KRO, KRW, ROOT3, ROOT_L1, ROOT_L2X, Rig32

from hypervisor import abi
from hypervisor.abi import structs
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS
from hypervisor.engines import x86
from hypervisor.hypercalls import compat, xlat
from hypervisor.hypercalls.registry import REGISTRY
from hypervisor.memory.frames import L1

ARG, LIST, FREE = 0x10000, 0x11000, FIRST_FREE


@pytest.fixture
def rig() -> Rig32:
    return Rig32(vcpus=2).boot()


def test_every_call_of_64_bit_guests_has_a_form_for_32_bit_ones_or_a_reason() -> None:
    table = compat.compat_table()
    missing = {n for n, handler in enumerate(REGISTRY.table) if handler and not table[n]}
    assert missing <= {abi.HYPERVISOR_set_segment_base}, "ENOSYS in Xen too"


def test_numbers_out_of_range(rig: Rig32) -> None:
    for number in (63, 64, 1000, 0xFFFF_FFFF, abi.HYPERVISOR_set_segment_base):
        assert rig.call(number) == -E.ENOSYS


def test_registers_above_32_bits_do_not_count(rig: Rig32) -> None:
    rig.regs.gpr[x86.RAX] = 0xFFFF_FFFF_0000_0000 | abi.HYPERVISOR_xen_version
    rig.regs.gpr[x86.RBX] = 1 << 40 | abi.XENVER_version
    rig.dispatcher.call()
    assert rig.regs.gpr[x86.RAX] == 4 << 16 | 17


# -- processor


def test_trap_table_and_callbacks(rig: Rig32) -> None:
    rig.pack(ARG, "<BBHIBBHIBBHI", 3, 4, 0x8, 0x1234, 14, 0, 0x1B, 0x5678, 9, 0, 0, 0)
    assert rig.call(abi.HYPERVISOR_set_trap_table, ARG) == 0
    state = rig.state
    assert (state.trap_address[3], state.trap_cs[3], state.trap_flags[3]) == (0x1234, 9, 4)
    assert (state.trap_address[14], state.trap_cs[14], state.trap_address[9]) == (0x5678, 0x1B, 0)
    assert rig.call(abi.HYPERVISOR_set_callbacks, KERNEL_CS, 0x100, 0x8, 0x200) == 0
    assert (state.event_cs, state.event_callback) == (KERNEL_CS, 0x100)
    assert (state.failsafe_cs, state.failsafe_callback) == (9, 0x200)
    rig.pack(ARG, "<HHII", abi.CALLBACKTYPE_sysenter, abi.CALLBACKF_mask_events, 0x10, 0x300)
    assert rig.call(abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == 0
    assert (state.sysenter_cs, state.sysenter_callback, state.sysenter_masks) == (0x11, 0x300, 1)
    assert rig.call(abi.HYPERVISOR_callback_op, abi.CALLBACKOP_unregister, ARG) == 0
    assert state.sysenter_callback == 0
    for kind, wanted in ((abi.CALLBACKTYPE_event, E.EINVAL), (77, E.EINVAL)):
        rig.pack(ARG, "<HHII", kind, 0, 0, 0)
        assert rig.call(abi.HYPERVISOR_callback_op, abi.CALLBACKOP_unregister, ARG) == -wanted
    assert rig.call(abi.HYPERVISOR_callback_op, abi.CALLBACKOP_register, ARG) == -E.ENOSYS
    assert rig.call(abi.HYPERVISOR_set_trap_table, 0) == 0 and state.trap_cs[3] == 0
    assert rig.call(abi.HYPERVISOR_stack_switch, 0xE020, 0x7000) == 0
    assert (state.kernel_ss, state.kernel_sp) == (KERNEL_SS, 0x7000)


def test_gdt_and_descriptors(rig: Rig32) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + FREE, rig.pte(FREE, KRO))
    rig.pack(LIST, "<I", rig.mfn(FREE))
    assert rig.call(abi.HYPERVISOR_set_gdt, LIST, 512) == 0
    assert rig.domain.vcpus[0].gdt_frames == [FREE]
    assert rig.call(abi.HYPERVISOR_set_gdt, LIST, 14 * 512 + 1) == -E.EINVAL
    where, flat = rig.mpa(FREE, 24), 0x00CF_9200_0000_FFFF
    assert rig.call(abi.HYPERVISOR_update_descriptor, where, where >> 32, flat & x86.MASK32, flat >> 32) == 0
    assert rig.word(FREE, 3) == flat | 1 << 45
    long_code = 0x00AF_9A00_0000_FFFF
    refused = rig.call(abi.HYPERVISOR_update_descriptor, where, 0, long_code & x86.MASK32, long_code >> 32)
    assert refused == -E.EINVAL
    rig.check()


def test_version_and_assists(rig: Rig32) -> None:
    assert rig.call(abi.HYPERVISOR_xen_version, abi.XENVER_platform_parameters, ARG) == 0
    assert rig.u32(ARG) == abi.COMPAT_HYPERVISOR_VIRT_START
    rig.pack(ARG, "<2I", 0, 0)
    above = 1 << abi.XENFEAT_pae_pgdir_above_4gb
    assert rig.call(abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == 0
    assert rig.u32(ARG + 4) and not rig.u32(ARG + 4) & above
    extended = abi.VMASST_TYPE_pae_extended_cr3
    assert rig.call(abi.HYPERVISOR_vm_assist, abi.VMASST_CMD_enable, extended) == 0
    assert rig.call(abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == 0
    assert rig.u32(ARG + 4) & above
    assert rig.call(abi.HYPERVISOR_vm_assist, abi.VMASST_CMD_enable, abi.VMASST_TYPE_m2p_strict) == -E.EINVAL
    rig.pack(ARG, "<I", 3)
    assert rig.call(abi.HYPERVISOR_physdev_op, abi.PHYSDEVOP_set_iopl, ARG) == 0 and rig.state.iopl == 3
    rig.pack(ARG, "<2I", 0x2000, 65537)
    assert rig.call(abi.HYPERVISOR_physdev_op, abi.PHYSDEVOP_set_iobitmap, ARG) == -E.EINVAL


# -- page tables


def test_update_va_mapping_takes_its_entry_in_halves(rig: Rig32) -> None:
    entry = rig.pte(FREE, KRW) | x86.PTE_NX
    assert rig.call(abi.HYPERVISOR_update_va_mapping, 20 << 12, entry & x86.MASK32, entry >> 32, 0) == 0
    assert rig.word(ROOT_L1, 20) == entry
    other = abi.HYPERVISOR_update_va_mapping_otherdomain
    assert rig.call(other, 20 << 12, 0, 0, 0, abi.DOMID_SELF) == 0 and rig.word(ROOT_L1, 20) == 0
    assert rig.call(other, 20 << 12, 0, 0, 0, 99) == -E.ESRCH
    assert rig.call(abi.HYPERVISOR_update_va_mapping, abi.COMPAT_HYPERVISOR_VIRT_START, 0, 0, 0) == -E.EINVAL
    rig.check()


def test_mmuext_operations_are_12_bytes(rig: Rig32) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + FREE, 0)
    operations = [(abi.MMUEXT_PIN_L1_TABLE, rig.mfn(FREE), 0), (abi.MMUEXT_UNPIN_TABLE, rig.mfn(FREE), 0)]
    operations += [(abi.MMUEXT_TLB_FLUSH_LOCAL, 0, 0)] * 300
    operations += [(abi.MMUEXT_PIN_L1_TABLE, rig.mfn(FREE), 0), (abi.MMUEXT_NEW_BASEPTR, rig.mfn(ROOT3), 0)]
    rig.put(LIST, b"".join(struct.pack("<3I", *operation) for operation in operations))
    assert rig.call(abi.HYPERVISOR_mmuext_op, LIST, len(operations), ARG, abi.DOMID_SELF) == 0
    assert rig.u32(ARG) == len(operations), "all of them counted"
    assert rig.frames.kind[FREE] == L1 and rig.frames.pinned[FREE]
    rig.pack(LIST, "<3I", abi.MMUEXT_NEW_USER_BASEPTR, rig.mfn(ROOT3), 0)
    assert rig.call(abi.HYPERVISOR_mmuext_op, LIST, 1, 0, abi.DOMID_SELF) == -E.EINVAL
    assert rig.call(abi.HYPERVISOR_mmuext_op, 0xF580_0000, 1, 0, abi.DOMID_SELF) == -E.EFAULT
    rig.check()


def test_a_long_mmuext_list_gives_way_and_goes_on(rig: Rig32) -> None:
    count = 500
    rig.put(LIST, struct.pack("<3I", abi.MMUEXT_TLB_FLUSH_LOCAL, 0, 0) * count)
    rig.domain.preempt = True
    rig.regs.rip = 0x5002
    gpr = rig.regs.gpr
    rig.call(abi.HYPERVISOR_mmuext_op, LIST, count, ARG, abi.DOMID_SELF)
    turns = 0
    while rig.regs.rip == 0x5000:
        turns += 1
        assert gpr[x86.RAX] == abi.HYPERVISOR_mmuext_op and gpr[x86.RDX] == ARG
        rig.regs.rip += 2
        rig.dispatcher.call()
    assert turns >= 2 and gpr[x86.RAX] == 0 and rig.u32(ARG) == count
    assert rig.engine.flushes >= count


def test_mmu_update_refuses_xens_slots(rig: Rig32) -> None:
    rig.pack(LIST, "<2Q", rig.mpa(ROOT_L2X, 511 * 8), 0)
    assert rig.call(abi.HYPERVISOR_mmu_update, LIST, 1, 0, abi.DOMID_SELF) == -E.EPERM


# -- memory


def reservation(rig: Rig32, frames: list[int]) -> int:
    rig.put(LIST, struct.pack(f"<{len(frames)}I", *frames))
    return rig.pack(ARG, "<4IH", LIST, len(frames), 0, 0, abi.DOMID_SELF)


def test_reservations_take_4_byte_lists(rig: Rig32) -> None:
    rig.unmap(40, 41)
    assert (
        rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, reservation(rig, [BASE + 40, BASE + 41]))
        == 2
    )
    assert rig.area.m2p(BASE + 40) == x86.MASK32
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, reservation(rig, [7, 8, 9])) == 2
    assert rig.unpack(LIST, "<3I") == (BASE + 40, BASE + 41, 9)
    assert rig.area.m2p(BASE + 41) == 8
    rig.check()


def test_memory_without_a_list_of_its_frames(rig: Rig32) -> None:
    """increase_reservation: a guest that does not care which frames it gets passes none."""
    rig.unmap(40, 41)
    back = reservation(rig, [BASE + 40, BASE + 41])
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, back) == 2
    pages = rig.frames.pages()
    nobody = rig.pack(ARG, "<4IH", 0, 3, 0, 0, abi.DOMID_SELF)
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_increase_reservation, nobody) == 2, (
        "two, then there are no more"
    )
    assert rig.frames.pages() == pages + 2
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, nobody) == 0, "these it has to name"
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, nobody) == 0
    rig.check()


def test_a_list_of_many_pieces(rig: Rig32) -> None:
    """More extents than are translated at a time; what is given back first can be taken again."""
    frames = list(range(BASE + 40, BASE + 60))
    rig.unmap(*range(40, 60))
    small = 7
    original, compat.compat_memory.CHUNK = compat.compat_memory.CHUNK, small
    try:
        assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, reservation(rig, frames)) == 20
        argument = reservation(rig, list(range(20)))
        assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, argument) == 20
    finally:
        compat.compat_memory.CHUNK = original
    assert sorted(rig.unpack(LIST, "<20I")) == frames
    rig.check()


def test_what_cannot_be_read_of_a_list_is_not_done(rig: Rig32) -> None:
    rig.unmap(40, 41, 63)
    end = (63 << 12) - 8
    rig.put(end, struct.pack("<2I", BASE + 40, BASE + 41))
    rig.pack(ARG, "<4IH", end, 5, 0, 0, abi.DOMID_SELF)
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, ARG) == 2
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, 0xF580_0000) == 0
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation | 7 << 6, 0xF580_0000) == 7
    rig.check()


def test_maps_and_counts(rig: Rig32) -> None:
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_machphys_mapping, ARG) == 0
    assert rig.unpack(ARG, "<3I") == (abi.COMPAT_HYPERVISOR_VIRT_START, 0xFFE0_0000, (168 << 18) - 1)
    rig.pack(ARG, "<2I", 4, LIST)
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_memory_map, ARG) == 0
    assert rig.u32(ARG) == 1 and rig.unpack(LIST, "<QQI")[0] == 0
    rig.pack(ARG, "<H", abi.DOMID_SELF)
    assert rig.call(abi.HYPERVISOR_memory_op, abi.XENMEM_current_reservation, ARG) == rig.frames.pages()
    assert rig.call(abi.HYPERVISOR_memory_op, 60, ARG) == -E.ENOSYS


# -- vCPUs, events, grants


def test_runstate_and_timers(rig: Rig32) -> None:
    vcpu = rig.domain.vcpus[0]
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_get_runstate_info, 0, ARG) == 0
    assert rig.unpack(ARG, "<iQ")[0] == vcpu.runstate
    rig.pack(ARG, "<I", 0x12004)
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_register_runstate_memory_area, 0, ARG) == 0
    assert vcpu.runstate_area == 0x12004
    vcpu.runstate_since = 0x1_2345_6789
    rig.domain.publish_runstate(vcpu)
    assert rig.unpack(0x12004, "<iQ") == (vcpu.runstate, 0x1_2345_6789)
    deadline = rig.domain.clock.now() + 10**9
    rig.pack(ARG, "<QI", deadline, 0)
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_set_singleshot_timer, 0, ARG) == 0
    assert rig.state.deadline == deadline
    later = deadline + 10**9
    assert rig.call(abi.HYPERVISOR_set_timer_op, later & x86.MASK32, later >> 32) == 0
    assert rig.state.deadline == later


def test_poll_reads_a_short_structure(rig: Rig32) -> None:
    port = rig.domain.events.bind_virq(abi.VIRQ_TIMER, 0, 2)
    rig.pack(LIST, "<I", port)
    rig.pack(ARG, "<IIQ", LIST, 1, rig.domain.clock.now() + 10**12)
    assert rig.call(abi.HYPERVISOR_sched_op, abi.SCHEDOP_poll, ARG) == 0
    assert rig.domain.vcpus[0].blocked and rig.domain.vcpus[0].poll == (port,)


def test_vcpu_info_moves_with_its_32_bit_layout(rig: Rig32) -> None:
    legacy = rig.state.vcpu_info
    rig.memory.dwords[(legacy + 8) >> 2] = 0xCAFE  # CR2
    rig.pack(ARG, "<QII", rig.mfn(FREE), 64, 0)
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_register_vcpu_info, 0, ARG) == 0
    at = FREE * 4096 + 64
    assert rig.state.vcpu_info == at
    assert rig.unpack(at, "<BBxxII") == (1, rig.memory.bytes[legacy + 1], x86.MASK32, 0xCAFE)


def test_events_of_32_bit_words(rig: Rig32) -> None:
    events, shared = rig.domain.events.events, rig.area.shared_info * 4096
    assert events.max_ports == 1024
    events.set_pending(37, 0)
    assert rig.memory.dwords[(shared + 2048) // 4 + 1] == 1 << 5
    assert rig.memory.dwords[(rig.state.vcpu_info + 4) >> 2] == 1 << 1 and rig.memory.bytes[rig.state.vcpu_info] == 1
    rig.memory.dwords[(shared + 2176) // 4 + 2] = 1 << 6
    events.set_pending(70, 0)
    assert rig.memory.dwords[(rig.state.vcpu_info + 4) >> 2] == 1 << 1, "masked"
    events.unmask(70, 0)
    assert rig.memory.dwords[(rig.state.vcpu_info + 4) >> 2] == 1 << 1 | 1 << 2


def test_grant_table_set_up_lists_4_byte_frames(rig: Rig32) -> None:
    rig.put(ARG, struct.pack("<HxxIhxxI", abi.DOMID_SELF, 2, 99, LIST))
    assert rig.call(abi.HYPERVISOR_grant_table_op, abi.GNTTABOP_setup_table, ARG, 1) == 0
    assert rig.unpack(ARG + 8, "<h") == (0,)
    first, second = rig.unpack(LIST, "<2I")
    assert rig.memory.index(first) >= 0 and rig.memory.index(second) >= 0 and first != second


def test_a_second_vcpu_from_a_32_bit_context(rig: Rig32) -> None:
    saved = b"state of the engine"
    rig.engine.save_cpu = lambda: saved
    rig.engine.restore_cpu = lambda _state: None
    rig.engine.set_gdt = lambda _base, _limit: None
    context = structs.VcpuGuestContextCompat()
    context.user_regs.eip, context.user_regs.cs, context.user_regs.ss = 0x1000, KERNEL_CS & ~3, KERNEL_SS
    context.kernel_ss, context.kernel_sp = KERNEL_SS, 0x8000
    context.ctrlreg[3] = rig.mfn(ROOT3) << 12
    context.event_callback_cs, context.event_callback_eip = 0xE018, 0x77
    rig.put(ARG, bytes(context))
    assert ctypes.sizeof(context) < 4096
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_initialise, 1, ARG) == 0
    vcpu = rig.domain.vcpus[1]
    assert vcpu.initialised and vcpu.cpu == saved and vcpu.state.kernel_mode == 1
    assert rig.area.guest_root(1) == rig.mfn(ROOT3) and vcpu.state.kernel_cr3 == rig.area.root(1)
    assert (vcpu.state.event_cs, vcpu.state.event_callback) == (KERNEL_CS, 0x77)
    rig.check()
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_initialise, 1, ARG) == -E.EEXIST
    context.ctrlreg[3] = rig.mfn(FREE) << 12
    rig.put(ARG, bytes(context))
    rig.domain.vcpus[1].initialised = False
    assert rig.call(abi.HYPERVISOR_vcpu_op, abi.VCPUOP_initialise, 1, ARG) == -E.EINVAL


# -- multicalls


def entry(number: int, *arguments: int) -> bytes:
    return struct.pack("<II6I", number, 99, *(*arguments, *[0] * 6)[:6])


def test_multicall(rig: Rig32) -> None:
    pte = rig.pte(FREE, KRW)
    calls = entry(abi.HYPERVISOR_update_va_mapping, 20 << 12, pte & x86.MASK32, pte >> 32)
    calls += entry(abi.HYPERVISOR_multicall) + entry(1000) + entry(abi.HYPERVISOR_xen_version, abi.XENVER_version)
    rig.put(LIST, calls)
    assert rig.call(abi.HYPERVISOR_multicall, LIST, 4) == 0
    results = [struct.unpack("<i", rig.get(LIST + 32 * n + 4, 4))[0] for n in range(4)]
    assert results == [0, -E.EINVAL, -E.ENOSYS, 4 << 16 | 17]
    assert rig.word(ROOT_L1, 20) == pte
    assert rig.call(abi.HYPERVISOR_multicall, 0xF580_0000, 1) == -E.EFAULT


def test_a_multicall_gives_way_between_calls(rig: Rig32) -> None:
    rig.put(LIST, entry(abi.HYPERVISOR_xen_version, abi.XENVER_version) * 3)
    rig.domain.preempt = True
    rig.regs.rip = 0x5002
    rig.call(abi.HYPERVISOR_multicall, LIST, 3)
    assert rig.regs.rip == 0x5000 and rig.regs.gpr[x86.RBX] == LIST + 32 and rig.regs.gpr[x86.RCX] == 2


# -- translation


def test_a_union_is_zero_extended_and_cut_off() -> None:
    pair = xlat.Pair("gnttab_copy")
    narrow = struct.pack("<IHH IHH HHh", 0xFFFF_FFFE, 1, 2, 0x1234, 3, 4, 5, 6, -7)
    wide = pair.widen(narrow.ljust(pair.size, b"\0"))
    assert (wide.source.u.gmfn, wide.source.domid, wide.source.offset) == (0xFFFF_FFFE, 1, 2)
    assert (wide.dest.u.ref, wide.len, wide.flags, wide.status) == (0x1234, 5, 6, -7)
    assert pair.narrow(bytes(wide)) == narrow.ljust(pair.size, b"\0")


def test_words_are_widened_and_cut_off() -> None:
    assert xlat.widen_words(struct.pack("<2I", 1, 0xFFFF_FFFF)) == struct.pack("<2Q", 1, 0xFFFF_FFFF)
    assert xlat.narrow_words(struct.pack("<2Q", 1 << 32 | 5, (1 << 64) - 1)) == struct.pack("<2I", 5, 0xFFFF_FFFF)
