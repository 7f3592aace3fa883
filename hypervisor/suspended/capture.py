"""Taking a suspended guest from its machine: what it is, and its pages in a form that means the same elsewhere.

After tools/libs/guest/xg_sr_save_x86_pv.c, and as strict: an entry of a page table that leads to a frame outside the
guest's own list (a grant, shared_info) means nothing elsewhere; guests take those away before they suspend.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hypervisor import abi
from hypervisor.core_state import vcpu_context
from hypervisor.cpu.state import Vcpu
from hypervisor.domain import Domain
from hypervisor.domain32 import Domain32
from hypervisor.engines.x86 import PTE_ADDR, PTE_P
from hypervisor.errors import WrongState
from hypervisor.memory.frames import HELD, L1, L2, L2_XEN, L3, L4
from hypervisor.memory.pagetables import LAZY_NX, XEN_SLOT_FIRST, XEN_SLOT_LAST
from hypervisor.memory.pagetables32 import L3_ENTRIES
from hypervisor.memory.xenarea32 import FIRST_XEN_L2_SLOT
from hypervisor.suspended import p2m
from hypervisor.suspended.state import ABSENT, EXTENDED, GuestState, VcpuState
from hypervisor.toolstack.stream.records import PINNED, has_data
from hypervisor.types import PAGE_SIZE

BATCH = 1024

_P, _ADDR, _LAZY, _TWELVE = np.uint64(PTE_P), np.uint64(PTE_ADDR), np.uint64(LAZY_NX), np.uint64(12)
_LEVELS = np.zeros(8, np.uint8)
_LEVELS[[L1, L2, L3, L4, L2_XEN]] = [1, 2, 3, 4, 2]
_UPCALL_PENDING, _UPCALL_MASK = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING, abi.VCPU_INFO_EVTCHN_UPCALL_MASK

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Captured:
    """A suspended guest on its machine; good for as long as it stays suspended. Any thread may read it.

    :ivar frames: index of the frame of each page number, -1 for none. :ivar pfns: page number of each frame, or -1.
    :ivar kinds: what the frames were (`hypervisor.memory.frames`).
    :ivar read: gives pages as they were, by the indexes of their frames; with it this stays good when the guest runs.
    """

    state: GuestState
    frames: Array
    pfns: Array
    kinds: Array
    _domain: Domain
    read: Callable[[Array], Array] | None = None

    def batches(self, memory: int = -1) -> Iterator[tuple[Array, Array, memoryview]]:
        """Page numbers, types and the contents of those that have any, `BATCH` at a time, from the first page on.

        :param memory: descriptor of the domain's memory. Read by that, what was never written stays unallocated.
        """
        types, page = self.state.types, self._domain.memory.array.reshape(-1, 512)
        for first in range(0, len(types), BATCH):
            some = types[first : first + BATCH]
            indexes = self.frames[first : first + BATCH][has_data(some)]
            if self.read is not None:
                pages = self.read(indexes)
            else:
                pages = page[indexes] if memory < 0 else self._read(memory, indexes)  # a copy
            for row in np.flatnonzero(some[has_data(some)]).tolist():
                self._neutral(int(indexes[row]), pages[row])
            yield np.arange(first, first + len(some), dtype=np.uint64), some, pages.reshape(-1).view(np.uint8).data

    def _read(self, memory: int, indexes: Array) -> Array:
        pages, private = read_pages(memory, indexes), self._domain.memory.private
        if private is not None:
            rows = private.among(indexes)
            pages[rows] = self._domain.memory.array.reshape(-1, 512)[indexes[rows]]
        return pages

    def _neutral(self, index: int, table: Array) -> None:
        """Turn the machine frame numbers of a page table into page numbers; take away what is Xen's."""
        kind = self.kinds[index]
        if kind == L4:
            table[XEN_SLOT_FIRST : XEN_SLOT_LAST + 1] = 0
        elif kind == L2_XEN:
            table[FIRST_XEN_L2_SLOT:] = 0
        elif kind == L3 and isinstance(self._domain, Domain32):
            table[L3_ENTRIES:] = 0
        there = (table & _P) != 0
        entries = table[there]
        if kind == L1:
            entries = np.where((entries & _LAZY) == _LAZY, entries & ~_LAZY, entries)
        targets = ((entries & _ADDR) >> _TWELVE).astype(np.int64) - self._domain.memory.base_mfn
        inside = (targets >= 0) & (targets < len(self.pfns))
        found = np.where(inside, self.pfns[np.where(inside, targets, 0)], -1)
        if (found < 0).any():
            mfn = (int(entries[found < 0][0]) & PTE_ADDR) >> 12
            raise WrongState(
                f"the guest cannot be saved: a page table maps frame {mfn:#x}, which is none of its"
                " pages (a grant, or shared_info): it has to unmap it before it suspends"
            )
        table[there] = entries & ~_ADDR | found.astype(np.uint64) << _TWELVE


def read_pages(memory: int, indexes: Array) -> Array:
    """Pages by the indexes of their frames, a system call for each run of neighbours. :raises OSError."""
    pages = np.empty((len(indexes), 512), np.uint64)
    edges = [0, *(np.flatnonzero(np.diff(indexes) != 1) + 1).tolist(), len(indexes)]
    for begin, end in itertools.pairwise(edges):
        # Not into the array: that would be preadv2, which the sandbox of domain processes does not have.
        data = os.pread(memory, (end - begin) * PAGE_SIZE, int(indexes[begin]) * PAGE_SIZE) if end > begin else b""
        if len(data) != (end - begin) * PAGE_SIZE:
            raise OSError(errno.EIO, "the domain's memory ends early")
        pages[begin:end] = np.frombuffer(data, np.uint64).reshape(-1, 512)
    return pages


def capture(domain: Domain) -> Captured:
    """In the run loop's thread, while the guest is suspended.

    :raises WrongState: what the guest says of itself makes no sense, so it cannot be saved.
    """
    if domain.running.id:
        raise WrongState(f"the guest cannot be saved: vCPU {domain.running.id} suspended it, and not vCPU 0")
    known = p2m.read(domain)
    frames, pfns = _pages(domain, known)
    types = _types(domain, frames)
    each = PAGE_SIZE * 8 // domain.config.bits
    held = np.array(known.leaves)
    leaves = pfns[held]
    for number in np.flatnonzero(np.bincount(held)[held] > 1).tolist():
        if (frames[number * each : (number + 1) * each] >= 0).any():
            raise WrongState("the guest cannot be saved: pages of its list of frames are the same, but not empty")
    if (leaves < 0).any() or types[leaves].any():
        raise WrongState("the guest cannot be saved: its list of frames lies in pages that are no ordinary ones")
    state = GuestState(
        bits=domain.config.bits,
        types=types,
        p2m_frames=tuple(leaves.tolist()),
        shared_info=_shared_info(domain),
        vcpus=tuple(_vcpu(domain, vcpu, pfns) for vcpu in domain.vcpus if vcpu.up),
        policy=domain.cpuid.policy,
        tsc_khz=domain.scale.khz,
        elapsed_ns=domain.clock.now(),
    )
    return Captured(state, frames, pfns, domain.frames.kind_np.copy(), domain)


def _pages(domain: Domain, known: p2m.P2m) -> tuple[Array, Array]:
    """`Captured.frames` and `Captured.pfns`: what both the guest's list and the machine's (M2P) say."""
    memory, ram = domain.memory, domain.frames.ram
    at = domain.area.m2p_offset(memory.base_mfn)
    if domain.config.bits == 64:
        m2p = memory.array[at // 8 : at // 8 + ram].astype(np.int64)
    else:
        m2p = memory.array.view(np.uint32)[at // 4 : at // 4 + ram].astype(np.int64)
    m2p[domain.frames.holding_np != HELD] = -1
    count = len(known.entries)
    entries = known.entries.astype(np.int64) - memory.base_mfn
    inside = (entries >= 0) & (entries < ram)
    agreed = inside & (m2p[np.where(inside, entries, 0)] == np.arange(count))
    frames = np.where(agreed, entries, -1)
    pfns = np.full(ram, -1, np.int64)
    pfns[frames[agreed]] = np.flatnonzero(agreed)
    return frames, pfns


def _types(domain: Domain, frames: Array) -> Array:
    table = domain.frames
    there = frames >= 0
    indexes = frames[there]
    levels = np.where(table.count_np[indexes] > 0, _LEVELS[table.kind_np[indexes]], 0).astype(np.uint8)
    pinned = np.frombuffer(bytes(table.pinned), np.uint8)[indexes] != 0
    types = np.full(len(frames), ABSENT, np.uint8)
    types[there] = levels | np.where(pinned & (levels > 0), PINNED, 0).astype(np.uint8)
    return types


def _shared_info(domain: Domain) -> bytes:
    """The page, each vCPU's record in its old place, where it finds it when it wakes."""
    page = bytearray(domain.memory.page(domain.area.shared_info))
    for vcpu in domain.vcpus:
        live, at = vcpu.state.vcpu_info, vcpu.id * abi.SIZEOF_VCPU_INFO
        page[at : at + abi.SIZEOF_VCPU_INFO] = domain.memory.bytes[live : live + abi.SIZEOF_VCPU_INFO]
        page[at + _UPCALL_PENDING] = 0
    page[_UPCALL_MASK] = 1  # the one that suspended is not to be called before it is ready
    return bytes(page)


def _vcpu(domain: Domain, vcpu: Vcpu, pfns: Array) -> VcpuState:
    context = vcpu_context(domain, vcpu)

    def pfn(mfn: int, what: str) -> int:
        index = mfn - domain.memory.base_mfn
        if not 0 <= index < len(pfns) or pfns[index] < 0:
            raise WrongState(f"the guest cannot be saved: {what} of vCPU {vcpu.id} is none of its pages ({mfn:#x})")
        return int(pfns[index])

    context.vm_assist = domain.vm_assist
    for number in range((int(context.gdt_ents) + 511) // 512):
        context.gdt_frames[number] = pfn(int(context.gdt_frames[number]), "the GDT")
    regs = context.user_regs
    if domain.config.bits == 64:
        context.ctrlreg[3] = pfn(context.ctrlreg[3] >> 12, "the page table") << 12
        if context.ctrlreg[1]:
            context.ctrlreg[1] = pfn(context.ctrlreg[1] >> 12, "the user page table") << 12 | 1
        if vcpu is domain.running:
            regs.rdx = pfn(regs.rdx, "start_info")
    else:
        cr3 = int(context.ctrlreg[3])
        root = pfn((cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF, "the page table")
        context.ctrlreg[3] = (root << 12 | root >> 20) & 0xFFFF_FFFF
        if vcpu is domain.running:
            regs.edx = pfn(regs.edx, "start_info")
    return VcpuState(vcpu.id, bytes(context), _extended(domain, vcpu))


def _extended(domain: Domain, vcpu: Vcpu) -> bytes:
    state = vcpu.state
    return EXTENDED.pack(
        vcpu.id,
        EXTENDED.size,
        state.syscall32_callback,
        state.sysenter_callback,
        state.syscall32_cs,
        state.sysenter_cs,
        state.syscall32_masks,
        state.sysenter_masks,
        domain.config.mcg_cap,
    )
