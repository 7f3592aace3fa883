"""The generated ABI table: sizes that Xen itself checks, and offsets that must agree with ctypes."""

from __future__ import annotations

import ctypes

import pytest

from hypervisor import abi
from hypervisor.abi import errno, hypercalls, structs

# Xen checks these at its own build (tools/include/xen-foreign/reference.size): name, x86_32, x86_64.
REFERENCE = (
    ("start_info", 1112, 1168),
    ("trap_info", 8, 16),
    ("cpu_user_regs", 68, 200),
    ("vcpu_guest_context", 2800, 5168),
    ("arch_vcpu_info", 24, 16),
    ("vcpu_time_info", 32, 32),
    ("vcpu_info", 64, 64),
    ("arch_shared_info", 28, 48),
    ("shared_info", 2344, 3136),
)


@pytest.mark.parametrize(("name", "size32", "size64"), REFERENCE)
def test_sizes_are_those_xen_checks(name: str, size32: int, size64: int) -> None:
    assert (abi.COMPAT_SIZES[name], abi.SIZES[name]) == (size32, size64)
    assert getattr(abi, f"SIZEOF_{name.upper()}") == size64


def test_offsets_a_pv_kernel_relies_on() -> None:
    # asm-offsets of a 64-bit PV kernel: vcpu_info's upcall pair, the event bitmaps, the regs of iret.
    assert abi.VCPU_INFO_EVTCHN_UPCALL_PENDING == 0
    assert abi.VCPU_INFO_EVTCHN_UPCALL_MASK == 1
    assert abi.VCPU_INFO_ARCH == 16
    assert abi.VCPU_INFO_TIME == 32
    assert (abi.SHARED_INFO_EVTCHN_PENDING, abi.SHARED_INFO_EVTCHN_MASK) == (2048, 2560)
    assert abi.SHARED_INFO_WC_VERSION == 3072
    assert abi.START_INFO_CONSOLE_DOMU_EVTCHN == abi.START_INFO_CONSOLE_DOMU_MFN + 8
    assert abi.IRET_CONTEXT_RIP == 32
    assert abi.XENSTORE_DOMAIN_INTERFACE_REQ_CONS == 2048
    assert abi.XENCONS_INTERFACE_IN_CONS == 3072
    assert abi.COMPAT_START_INFO_SHARED_INFO == 36


def test_numbers_of_both_word_sizes() -> None:
    assert abi.HYPERVISOR_VIRT_START == 0xFFFF_8000_0000_0000
    assert abi.FIRST_RESERVED_GDT_ENTRY == 7168
    assert (abi.FLAT_KERNEL_CS64, abi.FLAT_RING3_CS64) == (0xE033, 0xE033)
    assert abi.COMPAT_FLAT_RING1_CS == 0xE019
    assert abi.GNTST_general_error == -1
    assert (abi.GTF_reading, abi.GTF_reading_BIT) == (8, 3)
    assert abi.XS_DIRECTORY_PART == 22
    assert abi.XEN_ELFNOTE_HYPERCALL_PAGE == 2


@pytest.mark.parametrize("bits", [64, 32])
def test_classes_have_the_compilers_layout(bits: int) -> None:
    checked = 0
    for name in structs.BY_NAME:
        layout = abi.COMPAT_LAYOUTS.get(name, abi.LAYOUTS[name]) if bits == 32 else abi.LAYOUTS[name]
        cls = structs.for_bits(name, bits)
        is_union, size, fields = layout
        assert ctypes.sizeof(cls) == size, name
        assert issubclass(cls, ctypes.Union) == is_union, name
        for (member, *_), (_, offset, _, _) in zip(cls._fields_, (f for f in fields if f[3] >= 0), strict=True):
            assert getattr(cls, member).offset == offset, f"{name}.{member}"
            checked += 1
    assert checked > 400


def test_a_misspelt_member_is_an_error() -> None:
    argument = structs.MmuUpdate.from_buffer_copy(bytes(range(16)))
    assert argument.ptr == 0x0706050403020100
    with pytest.raises(AttributeError):
        argument.pointer = 1  # type: ignore[attr-defined]


def test_a_short_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 24 bytes"):
        structs.MmuextOp.from_buffer_copy(bytes(23))


def test_names_for_traces() -> None:
    assert (errno.EPERM, errno.ENOSYS, errno.EAGAIN) == (1, 38, 11)
    assert errno.name(-38) == "ENOSYS"
    assert errno.name(-4000) == "-4000"
    assert hypercalls.name(abi.HYPERVISOR_mmu_update) == "mmu_update"
    assert hypercalls.name(99) == "hypercall 99"
    assert hypercalls.SUBOPS["sched_op"][abi.SCHEDOP_block] == "SCHEDOP_block"
    assert "XENMEM_paging_op_evict" not in hypercalls.SUBOPS["memory_op"].values()
    assert set(hypercalls.SUBOPS) <= set(hypercalls.NAMES.values())
