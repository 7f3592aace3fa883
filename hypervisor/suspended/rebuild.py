"""Putting a suspended guest into a machine that was made but not started.

After tools/libs/guest/xg_sr_restore_x86_pv.c. Nothing of the state is believed: page tables are validated as when
the guest pins them, registers as for VCPUOP_initialise, and page numbers are looked up. Where the pages came from (a
stream, a file that is mapped) does not matter: they lie in the domain's memory, page tables in them with page numbers.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, NoReturn

import numpy as np

from hypervisor import abi, vcpu_context, vcpu_context32
from hypervisor.abi import structs
from hypervisor.abi.structs import StartInfo, StartInfoCompat
from hypervisor.cpu import time as guest_time
from hypervisor.domain import Domain
from hypervisor.engines.x86 import PTE_ADDR, PTE_P, PTE_US
from hypervisor.errors import GuestFault, StreamInvalid, XenError
from hypervisor.memory.frames import HELD
from hypervisor.memory.pagetables import GUEST_KERNEL
from hypervisor.suspended import p2m
from hypervisor.suspended.state import NOWHERE, GuestState, VcpuState, unpack_extended
from hypervisor.toolstack.stream.records import PINNED, PageType
from hypervisor.types import PAGE_SIZE, Mfn

Array = np.ndarray[Any, Any]

MAX_GDT_ENTRIES = 14 * 512
_GLOBAL = 0x100
_P, _ADDR, _TWELVE, _GLOBAL_BIT = np.uint64(PTE_P), np.uint64(PTE_ADDR), np.uint64(12), np.uint64(_GLOBAL)
_USER, _GUEST_KERNEL = np.uint64(PTE_US), np.uint64(GUEST_KERNEL)
_KNOWN_ASSISTS = sum(
    1 << kind
    for kind in (
        abi.VMASST_TYPE_4gb_segments,
        abi.VMASST_TYPE_4gb_segments_notify,
        abi.VMASST_TYPE_writable_pagetables,
        abi.VMASST_TYPE_pae_extended_cr3,
        abi.VMASST_TYPE_architectural_iopl,
        abi.VMASST_TYPE_runstate_update_flag,
    )
)


@dataclasses.dataclass(frozen=True, slots=True)
class Rebuilt:
    """Where the host finds the guest's rings."""

    store_mfn: Mfn
    console_mfn: Mfn
    start_info_mfn: Mfn


def rebuild(domain: Domain, state: GuestState, frames: Array, ports: tuple[int, int]) -> Rebuilt:
    """Make the guest go on at the instruction behind its suspension, once the machine runs.

    :param domain: of a machine with the state's word size, policy and `mcg_cap`, made with no pages
        (`MachineConfig.nr_pages` 0).
    :param frames: in these its memory holds the pages, by page number (`hypervisor.suspended.state.place`).
    :param ports: of xenstore and console, bound to the host.
    :raises StreamInvalid: the state makes no sense; the domain is of no use then.
    """
    try:
        return _Rebuild(domain, state, frames).all(ports)
    except XenError as exc:
        raise StreamInvalid(f"the image's guest cannot run: {exc.why}; it is damaged, or not of a PV guest") from exc
    except GuestFault as exc:
        raise StreamInvalid(f"the image's guest cannot run: {exc}; it is damaged") from exc


class _Rebuild:
    def __init__(self, domain: Domain, state: GuestState, frames: Array) -> None:
        self.domain, self.state, self.frames = domain, state, frames
        self.memory = domain.memory
        self.wide = state.bits == 64

    def all(self, ports: tuple[int, int]) -> Rebuilt:
        domain = self.domain
        self._populate()
        for level in (PageType.L1, PageType.L2, PageType.L3, PageType.L4):
            for pfn in np.flatnonzero((self.state.types & 7) == level).tolist():
                if self.state.types[pfn] < PageType.BROKEN:
                    self._localise(pfn, level)
        self._write_p2m()
        self._shared_info()
        contexts = [(vcpu, self._parse(vcpu)) for vcpu in self.state.vcpus]
        if not contexts or contexts[0][0].id != 0:
            self._bad("it says nothing of vCPU 0")
        rebuilt = self._start_info(contexts[0][1], ports)
        domain.engine.reset_pv64(domain.vcpus[0].state.kernel_cr3, domain.area.gdt_va(0), 0xFFFF)
        for saved, context in contexts:
            self._vcpu(saved, context)
        for pfn in np.flatnonzero((self.state.types & PINNED != 0) & (self.state.types < PageType.BROKEN)).tolist():
            domain.tables.pin(self.memory.mfn(int(self.frames[pfn])), int(self.state.types[pfn]) & 7)
        for port in ports:
            domain.events.open_host(port)
        self._start(contexts[0][1])
        return rebuilt

    def _bad(self, why: str) -> NoReturn:
        raise StreamInvalid(f"the image is damaged: {why}; give another")

    def _index(self, pfn: int, what: str, *, ordinary: bool = False) -> int:
        """The frame of a page. :param ordinary: it must be no page table. :raises StreamInvalid: there is none."""
        if not 0 <= pfn < len(self.frames) or self.frames[pfn] < 0:
            self._bad(f"{what} is page {pfn:#x}, which it has not")
        if ordinary and self.state.types[pfn]:
            self._bad(f"{what} is page {pfn:#x}, which is a page table")
        return int(self.frames[pfn])

    def _mfn(self, pfn: int, what: str, *, ordinary: bool = False) -> int:
        return self.memory.mfn(self._index(pfn, what, ordinary=ordinary))

    # -- memory

    def _populate(self) -> None:
        domain, pfns = self.domain, self.state.present
        indexes = self.frames[pfns]
        domain.frames.holding_np[indexes] = HELD
        domain.frames.refs_np[indexes] = 1
        at = domain.area.m2p_offset(self.memory.base_mfn)
        if self.wide:
            self.memory.array[at // 8 + indexes] = pfns.astype(np.uint64)
        else:
            self.memory.array.view(np.uint32)[at // 4 + indexes] = pfns.astype(np.uint32)

    def _localise(self, pfn: int, level: int) -> None:
        """Page numbers in a page table become machine frame numbers; marks that a hypervisor made go."""
        index = int(self.frames[pfn])
        table = self.memory.array[index * 512 : index * 512 + 512]
        there = (table & _P) != 0
        entries = table[there]
        if not entries.size:
            return
        pfns = ((entries & _ADDR) >> _TWELVE).astype(np.int64)
        inside = pfns < len(self.frames)
        found = np.where(inside, self.frames[np.where(inside, pfns, 0)], NOWHERE)
        if (found < 0).any():
            self._bad(f"a page table of level {level} maps page {int(pfns[found < 0][0]):#x}, which it has not")
        entries = entries & ~_ADDR | (found + self.memory.base_mfn).astype(np.uint64) << _TWELVE
        if self.wide and level == 1:
            kernel = (entries & _GUEST_KERNEL) != 0
            entries = np.where(kernel, entries & ~(_USER | _GUEST_KERNEL), entries) & ~_GLOBAL_BIT
        table[there] = entries

    def _write_p2m(self) -> None:
        """Tell the guest its new frames, in the list that it keeps."""
        word = np.uint64 if self.wide else np.uint32
        each = PAGE_SIZE // np.dtype(word).itemsize
        count = len(self.state.p2m_frames) * each
        entries = np.full(count, np.iinfo(word).max, word)
        told = self.frames[:count]
        entries[: len(told)] = np.where(told >= 0, told + self.memory.base_mfn, -1).astype(np.uint64).astype(word)
        if (self.frames[count:] >= 0).any():
            self._bad("its list of frames is too short")
        words = self.memory.array.view(word)
        for number, pfn in enumerate(self.state.p2m_frames):
            index = self._index(pfn, f"page {number} of the list of frames", ordinary=True)
            words[index * each : (index + 1) * each] = entries[number * each : (number + 1) * each]

    def _shared_info(self) -> None:
        """vCPUs' records and the architecture's part are taken over; events begin anew, all masked."""
        page = self.memory.page(self.domain.area.shared_info)
        arch, bits = (abi.SHARED_INFO_ARCH, 64) if self.wide else (abi.COMPAT_SHARED_INFO_ARCH, 32)
        for first, last in ((0, 32 * abi.SIZEOF_VCPU_INFO), (arch, PAGE_SIZE)):
            page[first:last] = self.state.shared_info[first:last]
        size = self.state.bits // 8
        mask, length = abi.SHARED_INFO_EVTCHN_MASK if self.wide else abi.COMPAT_SHARED_INFO_EVTCHN_MASK, 8 * size * size
        page[abi.SHARED_INFO_EVTCHN_PENDING : abi.SHARED_INFO_EVTCHN_PENDING + length] = bytes(length)
        page[mask : mask + length] = b"\xff" * length
        at = p2m.FIELDS[bits].list_list
        page[at : at + size] = bytes(size)
        selector = abi.VCPU_INFO_EVTCHN_PENDING_SEL if self.wide else abi.COMPAT_VCPU_INFO_EVTCHN_PENDING_SEL
        for number in range(32):
            at = number * abi.SIZEOF_VCPU_INFO + selector
            page[at : at + size] = bytes(size)

    def _start_info(self, context: Any, ports: tuple[int, int]) -> Rebuilt:
        kind: Any = StartInfo if self.wide else StartInfoCompat
        register = "rdx" if self.wide else "edx"
        index = self._index(int(getattr(context.user_regs, register)), "start_info", ordinary=True)
        mfn = self.memory.mfn(index)
        setattr(context.user_regs, register, mfn)
        view = self.memory.page(index)
        info = kind.from_buffer_copy(view[: ctypes.sizeof(kind)])
        store = self._mfn(int(info.store_mfn), "xenstore's ring", ordinary=True)
        console = self._mfn(int(info.console.domU.mfn), "the console's ring", ordinary=True)
        if len({mfn, store, console}) != 3:
            self._bad("start_info and the rings share a page")
        info.store_mfn, info.store_evtchn = store, ports[0]
        info.console.domU.mfn, info.console.domU.evtchn = console, ports[1]
        info.nr_pages = len(self.state.types)
        info.shared_info = self.memory.mpa(self.domain.area.shared_info)
        info.flags = 0
        view[: ctypes.sizeof(kind)] = bytes(info)
        return Rebuilt(Mfn(store), Mfn(console), Mfn(mfn))

    # -- vCPUs

    def _parse(self, saved: VcpuState) -> Any:
        """Its context, page numbers turned into frame numbers. :raises StreamInvalid."""
        kind: Any = structs.VcpuGuestContext if self.wide else structs.VcpuGuestContextCompat
        if not 0 <= saved.id < len(self.domain.vcpus) or len(saved.basic) != ctypes.sizeof(kind):
            self._bad(f"vCPU {saved.id} of {len(self.domain.vcpus)}, with {len(saved.basic)} bytes of state")
        context = kind.from_buffer_copy(saved.basic)
        if context.gdt_ents > MAX_GDT_ENTRIES:
            self._bad(f"vCPU {saved.id} has {context.gdt_ents} descriptors")
        for number in range((context.gdt_ents + 511) // 512):
            frame = self._mfn(int(context.gdt_frames[number]), f"the GDT of vCPU {saved.id}", ordinary=True)
            context.gdt_frames[number] = frame
        if self.wide:
            what = f"the page table of vCPU {saved.id}"
            context.ctrlreg[3] = self._mfn(context.ctrlreg[3] >> 12, what) << 12
            user = context.ctrlreg[1]
            context.ctrlreg[1] = self._mfn(user >> 12, what) << 12 if user & 1 else 0
        else:
            cr3 = int(context.ctrlreg[3])
            root = self._mfn((cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF, f"the page table of vCPU {saved.id}")
            context.ctrlreg[3] = (root << 12 | root >> 20) & 0xFFFF_FFFF
        return context

    def _vcpu(self, saved: VcpuState, context: Any) -> None:
        domain, vcpu = self.domain, self.domain.vcpus[saved.id]
        if vcpu.initialised:
            self._bad(f"vCPU {saved.id} is there twice")
        module: Any = vcpu_context if self.wide else vcpu_context32
        module.initialise(domain, vcpu, context)
        if context.ldt_ents:
            domain.set_ldt(vcpu, int(context.ldt_base), int(context.ldt_ents))
            vcpu.cpu = module.registers(domain, vcpu, context)
        if saved.extended:
            self._extended(saved)
        vcpu.up = True
        guest_time.account(vcpu, domain.clock.now(), guest_time.RUNSTATE_RUNNABLE)

    def _extended(self, saved: VcpuState) -> None:
        state = self.domain.vcpus[saved.id].state
        _, _, syscall32, sysenter, cs32, cs, masks32, masks, _ = unpack_extended(saved.extended)
        state.syscall32_callback, state.sysenter_callback = syscall32, sysenter
        state.syscall32_cs, state.sysenter_cs = cs32, cs
        state.syscall32_masks, state.sysenter_masks = int(masks32 != 0), int(masks != 0)

    def _start(self, context: Any) -> None:
        """vCPU 0 goes onto the engine, and the clocks go on."""
        domain, vcpu = self.domain, self.domain.vcpus[0]
        assert vcpu.cpu is not None
        domain.vm_assist = int(context.vm_assist) & _KNOWN_ASSISTS
        domain.clock.base -= self.state.elapsed_ns - domain.clock.now()
        domain.engine.restore_cpu(vcpu.cpu)
        vcpu.cpu = None
        domain.running = vcpu
        domain.traps.set_vcpu(vcpu)
        domain.traps.architectural_iopl = bool(domain.vm_assist & 1 << abi.VMASST_TYPE_architectural_iopl)
        domain.clock.update_wallclock(self.memory, domain.area.shared_info)
        for other in domain.vcpus:
            if other.up:
                other.runstate_since = domain.clock.now()
                domain.publish_time(other)
        domain.engine.flush_all()
