"""Start-of-day of a 64-bit PV guest, written into its memory.

Layouts: struct start_info in public/xen.h; page-table entries as Xen itself
would leave them after validation (``_PAGE_USER`` added, because a 64-bit PV
kernel runs in ring 3). What is the same for 32-bit guests is used by `pv32`.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import numpy.typing as npt

from hypervisor import abi
from hypervisor.abi.structs import StartInfo, StartInfoCompat
from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.builder.kernel import Kernel
from hypervisor.toolstack.builder.layout import Layout
from hypervisor.toolstack.builder.state import BuildMemory
from hypervisor.types import PAGE_SHIFT, PAGE_SIZE

GUEST_TYPE, GUEST_TYPE_32 = b"xen-3.0-x86_64", b"xen-3.0-x86_32p"

_PRESENT, _RW, _USER, _ACCESSED, _DIRTY = 1, 2, 4, 0x20, 0x40
_NX = np.uint64(1 << 63)
_TABLE = _PRESENT | _RW | _USER | _ACCESSED | _DIRTY
# Accessed and dirty set from the start spare the engine from setting them one by one.
_LEAF = _PRESENT | _RW | _USER | _ACCESSED | _DIRTY
_LEAF_READ_ONLY = _PRESENT | _USER | _ACCESSED


def load_image(memory: BuildMemory, kernel: Kernel) -> None:
    """Copy the segments. Pages of zeros are left alone, so that they cost no host memory."""
    for segment in kernel.segments:
        at = segment.paddr - kernel.paddr_offset
        _copy_sparse(memory.view, at, kernel.data[segment.offset : segment.offset + segment.filesz])
    if kernel.symbols:
        _copy_sparse(memory.view, kernel.symbols_at, memoryview(kernel.symbols))


def load_ramdisk(memory: BuildMemory, layout: Layout, ramdisk: bytes | memoryview) -> None:
    _copy_sparse(memory.view, layout.ramdisk_pfn * PAGE_SIZE, memoryview(ramdisk))


def _copy_sparse(target: memoryview, at: int, data: memoryview) -> None:
    """Copy whole runs of pages that hold anything; `target` is zero there already."""
    head = min(-at % PAGE_SIZE, len(data))
    body = (len(data) - head) // PAGE_SIZE
    target[at : at + head] = data[:head]
    if body:
        words = np.frombuffer(data[head : head + body * PAGE_SIZE], dtype=np.uint8).view("<u8")
        used = np.concatenate(([False], words.reshape(body, PAGE_SIZE // 8).any(axis=1), [False]))
        edges = np.flatnonzero(used[1:] != used[:-1]).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            start, end = head + first * PAGE_SIZE, head + last * PAGE_SIZE
            target[at + start : at + end] = data[start:end]
    tail = head + body * PAGE_SIZE
    target[at + tail : at + len(data)] = data[tail:]


def write_p2m(memory: BuildMemory, layout: Layout) -> None:
    words = _words(memory)
    at = layout.p2m_pfn * PAGE_SIZE // 8
    words[at : at + memory.nr_pages] = np.arange(memory.base_mfn, memory.base_mfn + memory.nr_pages, dtype=np.uint64)


def write_page_tables(memory: BuildMemory, kernel: Kernel, layout: Layout, *, nx: bool) -> None:
    """Fill the page tables of the initial mapping, and of the p2m list if it has its own.

    :param nx: mark what is not code as not executable.
    """
    words, tables = _words(memory), layout.tables.tables
    for (level, index), pfn in tables.items():
        if level < layout.tables.top:
            parent = tables[level + 1, index >> 9]
            words[parent * 512 + (index & 511)] = _entry(memory, pfn, _TABLE)
    count = (layout.virt_end - layout.virt_base) // PAGE_SIZE
    # A 32-bit kernel runs in ring 1: its pages need no user bit, and must not have it.
    entries = _leaves(memory, 0, count) & ~np.uint64(0 if kernel.bits == 64 else _USER)
    if nx:
        entries[_not_code(kernel, count)] |= _NX
    first = layout.pt_base_pfn
    entries[first : first + layout.nr_pt_frames] &= ~np.uint64(_RW | _DIRTY)
    _map(words, layout, layout.virt_base, entries)
    if layout.p2m_separate:
        entries = _leaves(memory, layout.p2m_pfn, layout.p2m_list_pages)
        _map(words, layout, layout.p2m_va, entries | _NX if nx else entries)


def _not_code(kernel: Kernel, count: int) -> npt.NDArray[np.bool_]:
    """For each page of the initial mapping: it holds no code and is not the hypercall page."""
    mask = np.ones(count, dtype=np.bool_)
    for start, end in kernel.code_ranges:
        mask[(start - kernel.paddr_offset) >> PAGE_SHIFT : -(-(end - kernel.paddr_offset) >> PAGE_SHIFT)] = False
    if kernel.hypercall_page is not None:
        mask[(kernel.hypercall_page - kernel.virt_base) >> PAGE_SHIFT] = False
    return mask


def _leaves(memory: BuildMemory, pfn: int, count: int) -> npt.NDArray[np.uint64]:
    first = memory.base_mfn + pfn
    frames = np.arange(first, first + count, dtype=np.uint64)
    return (frames << np.uint64(PAGE_SHIFT)) | np.uint64(_LEAF)


def _map(words: npt.NDArray[np.uint64], layout: Layout, va: int, entries: npt.NDArray[np.uint64]) -> None:
    page = (va & ((1 << 48) - 1)) >> PAGE_SHIFT
    done = 0
    while done < len(entries):
        slot = (page + done) & 511
        step = min(512 - slot, len(entries) - done)
        at = layout.tables.tables[1, (page + done) >> 9] * 512 + slot
        words[at : at + step] = entries[done : done + step]
        done += step


def _entry(memory: BuildMemory, pfn: int, flags: int) -> int:
    return (memory.base_mfn + pfn) << PAGE_SHIFT | flags


def _words(memory: BuildMemory) -> npt.NDArray[np.uint64]:
    return np.frombuffer(memory.view[: memory.nr_pages * PAGE_SIZE], dtype="<u8")


def write_start_info(
    memory: BuildMemory,
    layout: Layout,
    *,
    shared_info_mfn: int,
    store_port: int,
    console_port: int,
    flags: int,
    cmdline: bytes,
    ramdisk_len: int,
) -> None:
    """Fill struct start_info, in the layout of the guest's word size.

    :raises SpecInvalid: the command line does not fit or holds a NUL.
    """
    if len(cmdline) >= abi.MAX_GUEST_CMDLINE or b"\0" in cmdline:
        raise SpecInvalid(
            f"the command line has {len(cmdline)} bytes: give at most {abi.MAX_GUEST_CMDLINE - 1}, none of them NUL"
        )
    mod_start = 0
    if ramdisk_len:
        mod_start = layout.va(layout.ramdisk_pfn) if layout.ramdisk_mapped else layout.ramdisk_pfn
        flags |= 0 if layout.ramdisk_mapped else abi.SIF_MOD_START_PFN
    wide = layout.tables.bits == 64
    info = (StartInfo if wide else StartInfoCompat)(
        nr_pages=memory.nr_pages,
        shared_info=shared_info_mfn << PAGE_SHIFT,
        flags=flags,
        store_mfn=memory.base_mfn + layout.store_pfn,
        store_evtchn=store_port,
        pt_base=layout.va(layout.pt_base_pfn),
        nr_pt_frames=layout.nr_pt_frames,
        mfn_list=layout.p2m_va,
        mod_start=mod_start,
        mod_len=ramdisk_len,
    )
    guest_type = GUEST_TYPE if wide else GUEST_TYPE_32
    info.magic[: len(guest_type)] = [*guest_type]
    info.cmd_line[: len(cmdline)] = [*cmdline]
    info.console.domU.mfn = memory.base_mfn + layout.console_pfn
    info.console.domU.evtchn = console_port
    if layout.p2m_separate:
        info.first_p2m_pfn, info.nr_p2m_frames = layout.p2m_pfn, layout.p2m_frames
    at = layout.start_info_pfn * PAGE_SIZE
    memory.view[at : at + ctypes.sizeof(info)] = bytes(info)


def hypercall_page() -> bytes:
    """Xen's hypercall page for 64-bit PV guests: 128 stubs of 32 bytes, number in eax.

    ::

        push rcx; push r11; mov $nr,%eax; syscall; pop r11; pop rcx; ret
        iret (23): push rcx; push r11; push rax; mov $23,%eax; syscall     (jumped to, never returns)
    """
    stubs = []
    for number in range(PAGE_SIZE // 32):
        load = b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"
        code = (
            b"\x51\x41\x53\x50" + load
            if number == abi.HYPERVISOR_iret
            else b"\x51\x41\x53" + load + b"\x41\x5b\x59\xc3"
        )
        stubs.append(code.ljust(32, b"\xcc"))
    return b"".join(stubs)
