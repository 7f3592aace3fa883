"""The state of a domain and its vCPUs, and the operations that several hypercall families share."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import struct
from collections.abc import Callable
from typing import Any

from hypervisor import abi, domain_state
from hypervisor.abi import errno
from hypervisor.cpu import policy
from hypervisor.cpu.cpuid import GuestCpuid
from hypervisor.cpu.emulate import PrivilegedOps
from hypervisor.cpu.ptwr import PageTableWrites
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.time import RUNSTATE_OFFLINE, RUNSTATE_RUNNABLE, Clock, account
from hypervisor.cpu.traps import Traps
from hypervisor.engines import x86
from hypervisor.engines.tsc import TscScale, read_tsc
from hypervisor.errors import XenError
from hypervisor.evtchn.core import DEFAULT_MAX_PORT, EventChannels, Router
from hypervisor.evtchn.fifo import Fifo, FifoControl
from hypervisor.evtchn.twolevel import TwoLevel
from hypervisor.grants.core import Grants
from hypervisor.memory.frames import L4, SEGDESC, WRITABLE, FrameTable
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.pagetables import PageTables
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.recount import recount
from hypervisor.memory.reservation import Reservation
from hypervisor.memory.xenarea import XenArea
from hypervisor.sched.watchdog import Watchdogs
from hypervisor.toolstack.builder.state import BootState
from hypervisor.types import PAGE_SIZE, DomId

RUNSTATE_UPDATE = 1 << 63  # XEN_RUNSTATE_UPDATE (public/vcpu.h)
PERIOD_NS = 10_000_000
"""A PV vCPU starts with a tick of 100 Hz (pv_vcpu_initialise)."""
_RUNSTATE = struct.Struct("<i4x5Q")


@dataclasses.dataclass(frozen=True, slots=True)
class MachineConfig:
    """What a machine is made of.

    :ivar uuid: the domain's identity, 36 characters.
    :ivar base_mfn: first machine frame of its extent; `nr_pages` of RAM at boot, at most `max_pages`.
    :ivar tsc_khz: frequency of the time stamp counter, kHz.
    :ivar bits: word size of the guest: 64 or 32.
    :ivar max_event_port: highest event channel port, up to 131071; the 2-level ABI ends at 4095.
    :ivar lazy_nx: see `PageTables.lazy_nx`: for guests that map all their memory executable and do not look at it.
    :ivar cpu_policy: a level and features in words, or a policy that was saved (`hypervisor.cpu.policy`).
    :ivar mcg_cap: MSR 0x179, for guests that were shown machine-check banks elsewhere (`hypervisor.cpu.msr`).
    """

    uuid: str
    name: str
    domid: int
    base_mfn: int
    nr_pages: int
    max_pages: int
    vcpus: int = 1
    max_vcpus: int = 1
    tsc_khz: int = 0
    linear_page_tables: bool = False
    bits: int = 64
    max_event_port: int = DEFAULT_MAX_PORT
    lazy_nx: bool = False
    cpu_policy: str | dict[str, Any] = policy.DEFAULT
    mcg_cap: int = 0

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MachineConfig:
        return cls(**data)


class Domain:
    """Everything of one domain but the run loop.

    :ivar running: the vCPU whose registers the engine holds.
    :ivar shutdown_code: SHUTDOWN_* once the guest ended itself, else None.
    :ivar declared_code: what the guest wants a later end to count as (SCHEDOP_shutdown_code), else None.
    :ivar console: takes what the guest writes with console_io; None: it may not, as under a release build of Xen.
    :ivar vm_assist: bit mask of VMASST_TYPE_* that are on.
    """

    # What `hypervisor.domain32` has others for.
    AREA, TABLES, GUEST, CLOCK, EVENTS = XenArea, PageTables, GuestAccess, Clock, TwoLevel
    TRAPS, TABLE_WRITES, PRIVILEGED = Traps, PageTableWrites, PrivilegedOps

    def __init__(
        self,
        config: MachineConfig,
        mapping: mmap.mmap,
        engine: Any,
        router: Router,
        wake: Callable[[int, int], None],
    ) -> None:
        self.config = config
        self.engine = engine
        self.memory = DomainMemory(mapping, config.base_mfn, config.max_pages)
        self.frames = FrameTable(self.memory.frames, config.max_pages, config.nr_pages)
        self.area = self.AREA(self.memory, self.frames)
        self.area.fill_m2p(config.nr_pages)
        self.tables = self.TABLES(self.memory, self.frames, engine, self.area.slots)
        self.tables.linear.allowed = config.linear_page_tables
        self.tables.lazy_nx = config.lazy_nx
        self.reservation = Reservation(self.frames, self.tables, self.area)
        self.guest = self.GUEST(self.memory, lambda: engine.regs.cr3, self.tables.code)
        self.scale = TscScale.from_khz(config.tsc_khz)
        self.clock = self.CLOCK(self.scale, read_tsc)
        self.vcpus = [Vcpu(i) for i in range(config.max_vcpus)]
        for vcpu in self.vcpus:
            vcpu.periodic_ns = vcpu.periodic_next = PERIOD_NS
            vcpu.state.vcpu_info = self.area.shared_info * PAGE_SIZE + vcpu.id * abi.SIZEOF_VCPU_INFO
            self.memory.bytes[vcpu.state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = 1
        self.running = self.vcpus[0]
        events = self.EVENTS(self.memory, self.area.shared_info, self.vcpus, wake)
        self.events = EventChannels(DomId(config.domid), events, router, config.max_event_port)
        self.fifo = FifoControl(self.events, lambda: Fifo(self.memory, self.tables, self.vcpus, wake))
        self.grants = Grants(config.domid, self.tables, self.area, self.guest)
        self.traps = self.TRAPS(engine, self.memory, self.guest, self.area)
        self.traps.set_vcpu(self.running)
        self.cpuid = GuestCpuid(self._cpu_policy(), self.scale)
        self.table_writes = self.TABLE_WRITES(engine.regs, self.guest, self.tables)
        self.privileged = self.PRIVILEGED(self.traps, self.cpuid, self.new_baseptr)
        self.privileged.msr.mcg_cap = config.mcg_cap
        self.watchdogs = Watchdogs()
        self.vm_assist = 0
        self.shutdown_code: int | None = None
        self.declared_code: int | None = None
        self.preempt = False
        self.console: Callable[[bytes], None] | None = None
        self.leave: Callable[[], None] = lambda: None
        self.vcpus_changed: Callable[[Vcpu], None] = lambda _vcpu: None
        self.give_way: Callable[[], None] = lambda: None
        self.timer_changed: Callable[[int], None] = lambda _deadline: None

    def _cpu_policy(self) -> policy.CpuPolicy:
        """:raises ToolstackError: the configuration asks for what there is not."""
        config, engine = self.config, self.engine
        chosen = policy.for_domain(config.cpu_policy, engine.cpuid, config.bits)
        engine.hide_features(chosen.hidden(engine.cpuid))
        return chosen

    # -- start of day

    def load_first_vcpu(self, boot: BootState) -> None:
        """Registers and page tables of vCPU 0. :raises XenError: the initial tables do not validate."""
        engine, state = self.engine, self.vcpus[0].state
        regs = engine.regs
        self.tables.pin(boot.l4_mfn, L4)
        self.tables.get_type(self.tables.owned_index(boot.l4_mfn), L4)
        state.kernel_cr3 = boot.l4_mfn << 12
        engine.reset_pv64(boot.l4_mfn << 12, self.area.gdt_va(0), 0xFFFF)
        engine.load_flat64(abi.FLAT_KERNEL_CS64, abi.FLAT_KERNEL_SS64)
        for index in (x86.DS, x86.ES, x86.FS, x86.GS):
            engine.load_segment(index, 0, 0)
        for number in range(16):
            regs.gpr[number] = 0
        regs.fs_base = regs.gs_base = 0
        regs.gpr[x86.RSP], regs.gpr[x86.RSI], regs.rip = boot.rsp, boot.rsi, boot.entry
        regs.rflags = x86.FLAG_IF | 2

    # -- vCPUs

    def vcpu(self, number: int) -> Vcpu:
        """:raises XenError: ENOENT."""
        if not 0 <= number < len(self.vcpus):
            raise XenError(errno.ENOENT, f"no vCPU {number}")
        return self.vcpus[number]

    def block(self) -> None:
        """SCHEDOP_block of the running vCPU: events on, then wait for one."""
        vcpu = self.running
        info = vcpu.state.vcpu_info
        self.memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = 0
        if not self.memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING]:
            vcpu.blocked = True
            self.leave()

    def set_up(self, vcpu: Vcpu, up: bool) -> None:
        """VCPUOP_up and VCPUOP_down of an initialised vCPU; when the last one goes down the domain ends."""
        if up:
            if not vcpu.up:
                vcpu.up = True
                account(vcpu, self.clock.now(), RUNSTATE_RUNNABLE)
                self.vcpus_changed(vcpu)
        elif not any(other.up for other in self.vcpus if other is not vcpu):
            self.shut_down(abi.SHUTDOWN_poweroff)
        else:
            vcpu.up = False
            account(vcpu, self.clock.now(), RUNSTATE_OFFLINE)
            self.leave()

    def register_runstate_area(self, vcpu: Vcpu, address: int) -> None:
        """Where the guest wants a vCPU's `struct vcpu_runstate_info` kept. :raises XenError: EFAULT."""
        if not x86.is_canonical(address):
            raise XenError(errno.EFAULT, f"runstate area at {address:#x}")
        vcpu.runstate_area = address
        if vcpu is self.running:
            self.publish_runstate(vcpu)

    def register_time_area(self, vcpu: Vcpu, address: int) -> None:
        """Where the guest wants a copy of a vCPU's time record, for its programs. :raises XenError: EFAULT."""
        if not x86.is_canonical(address):
            raise XenError(errno.EFAULT, f"time area at {address:#x}")
        vcpu.time_area = address
        if vcpu is self.running:
            self.publish_time(vcpu)

    def kernel_view(self, vcpu: Vcpu) -> GuestAccess:
        """Access through a vCPU's kernel page table, whatever mode it is in."""
        return self.GUEST(self.memory, lambda: vcpu.state.kernel_cr3, self.tables.code)

    def publish_time(self, vcpu: Vcpu) -> None:
        """Bring a vCPU's time records up to date. A registered copy that cannot be written is the guest's loss."""
        self.clock.update_vcpu(self.memory, vcpu)
        if vcpu.time_area:
            at = vcpu.state.vcpu_info + abi.VCPU_INFO_TIME
            record = bytes(self.memory.bytes[at : at + abi.SIZEOF_VCPU_TIME_INFO])
            with contextlib.suppress(XenError):
                self.kernel_view(vcpu).write(vcpu.time_area, record)

    def refresh_time(self, vcpu: Vcpu, now: int) -> None:
        """Bring the time records that code on a vCPU reads up to date, if they are not.

        Linux programs read the copy of vCPU 0, on whichever they run.
        """
        if not self.clock.due(vcpu, now):
            return
        self.publish_time(vcpu)
        first = self.vcpus[0]
        if first.time_area and first.up and self.clock.due(first, now):
            self.publish_time(first)

    def publish_runstate(self, vcpu: Vcpu) -> None:
        """Write a vCPU's runstate where the guest asked for it, marked while it changes if it asked for that too."""
        if not vcpu.runstate_area:
            return
        view = self.kernel_view(vcpu)
        entry, marked = vcpu.runstate_since, self.vm_assist & 1 << abi.VMASST_TYPE_runstate_update_flag
        with contextlib.suppress(XenError):
            if marked:
                view.write_u64(vcpu.runstate_area + 8, entry | RUNSTATE_UPDATE)
            view.write(vcpu.runstate_area, _RUNSTATE.pack(vcpu.runstate, entry, *vcpu.runstate_times))

    def set_timer(self, vcpu: Vcpu, deadline: int) -> None:
        """One-shot timer at system time `deadline` (ns), 0 to stop it."""
        vcpu.state.deadline = deadline
        if deadline:
            self.timer_changed(deadline)

    # -- page-table roots and descriptor tables

    def new_baseptr(self, mfn: int) -> None:
        """Switch the kernel page-table root. :raises XenError: EINVAL."""
        state = self.running.state
        index = self.tables.owned_index(mfn)
        old = state.kernel_cr3
        if old != mfn << 12:
            self.tables.get_type(index, L4)
            state.kernel_cr3 = mfn << 12
            self.engine.load_cr3(mfn << 12)
            if old:
                self.tables.put_type(self.memory.index(old >> 12))
        else:
            self.engine.load_cr3(old)

    def root_uses(self, vcpu: Vcpu) -> list[tuple[int, int]]:
        """(frame, kind) of the page-table roots that a vCPU holds."""
        state = vcpu.state
        return [(self.memory.index(cr3 >> 12), L4) for cr3 in (state.kernel_cr3, state.user_cr3) if cr3]

    def new_user_baseptr(self, mfn: int) -> None:
        """Set the user page-table root, 0 for none. :raises XenError: EINVAL."""
        state = self.running.state
        old = state.user_cr3
        if old == mfn << 12:
            return
        if mfn:
            self.tables.get_type(self.tables.owned_index(mfn), L4)
        state.user_cr3 = mfn << 12
        if old:
            self.tables.put_type(self.memory.index(old >> 12))

    def set_gdt(self, vcpu: Vcpu, mfns: list[int], entries: int) -> None:
        """:raises XenError: EINVAL; the old GDT stays."""
        taken: list[int] = []
        try:
            for mfn in mfns:
                index = self.tables.owned_index(mfn)
                self.tables.get_type(index, SEGDESC)
                taken.append(index)
        except XenError as exc:
            for index in taken:
                self.tables.put_type(index)
            raise XenError(errno.EINVAL, exc.why) from exc
        for index in vcpu.gdt_frames:
            self.tables.put_type(index)
        vcpu.gdt_frames, vcpu.gdt_entries = taken, entries
        self.area.map_gdt(vcpu.id, taken)
        self.engine.flush_all()

    def set_ldt(self, vcpu: Vcpu, base: int, entries: int) -> None:
        """:param base: page-aligned guest address; 0 `entries` for none. :raises XenError: EINVAL."""
        taken: list[int] = []
        try:
            for page in range((entries * 8 + PAGE_SIZE - 1) // PAGE_SIZE):
                at = self.kernel_view(vcpu).translate(base + page * PAGE_SIZE)
                if at < 0:
                    raise XenError(errno.EINVAL, "LDT is not mapped")
                self.tables.get_type(at >> 12, SEGDESC)
                taken.append(at >> 12)
        except XenError as exc:
            for index in taken:
                self.tables.put_type(index)
            raise XenError(errno.EINVAL, exc.why) from exc
        for index in vcpu.ldt_frames:
            self.tables.put_type(index)
        vcpu.ldt_frames, vcpu.ldt_entries, vcpu.ldt_base = taken, entries, base
        self.area.map_ldt(vcpu.id, taken)
        self.engine.flush_all()
        if vcpu is self.running:
            self.load_ldt(vcpu)

    def load_ldt(self, vcpu: Vcpu) -> None:
        selector = 0xE048 if vcpu.ldt_entries else 0
        self.engine.set_ldt(selector, self.area.ldt_va(vcpu.id), max(0, vcpu.ldt_entries * 8 - 1))

    def register_vcpu_info(self, vcpu: Vcpu, mfn: int, offset: int) -> None:
        """Move a vCPU's vcpu_info into guest memory. :raises XenError: ENXIO for the offset, else EINVAL."""
        if offset > PAGE_SIZE - abi.SIZEOF_VCPU_INFO or offset & 7:
            raise XenError(errno.ENXIO, f"vcpu_info at offset {offset}")
        if vcpu is not self.running and vcpu.up:
            raise XenError(errno.EINVAL, f"vCPU {vcpu.id} runs: it moves its vcpu_info itself")
        legacy = self.area.shared_info * PAGE_SIZE
        state = vcpu.state
        if not legacy <= state.vcpu_info < legacy + PAGE_SIZE:
            raise XenError(errno.EINVAL, "vcpu_info is registered already")
        index = self.tables.owned_index(mfn)
        if index == self.area.shared_info:
            # It is there already; and a place in that page does not tell that one was registered.
            raise XenError(errno.EINVAL, "vcpu_info inside shared_info")
        self.tables.get_type(index, WRITABLE)
        new, old, size = index * PAGE_SIZE + offset, state.vcpu_info, abi.SIZEOF_VCPU_INFO
        self.memory.bytes[new : new + size] = bytes(self.memory.bytes[old : old + size])
        state.vcpu_info = new
        # Nothing may be lost in between: look at all events once.
        self.memory.bytes[new + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = 1
        self.memory.words[(new + abi.VCPU_INFO_EVTCHN_PENDING_SEL) >> 3] = (1 << 64) - 1
        self.clock.update_vcpu(self.memory, vcpu)

    # -- ending

    def shut_down(self, code: int) -> None:
        if self.shutdown_code is None:
            self.shutdown_code = code if self.declared_code is None else self.declared_code
        self.leave()

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """See `hypervisor.domain_state.save`."""
        return domain_state.save(self)

    def restore(self, data: dict[str, Any]) -> None:
        """See `hypervisor.domain_state.restore`."""
        domain_state.restore(self, data)

    # -- consistency

    def holds(self) -> list[tuple[int, int]]:
        """(frame, kind) of each use that no page table shows."""
        holds: list[tuple[int, int]] = []
        for vcpu in self.vcpus:
            state = vcpu.state
            holds += self.root_uses(vcpu)
            holds += [(index, SEGDESC) for index in (*vcpu.gdt_frames, *vcpu.ldt_frames)]
            if state.vcpu_info >> 12 != self.area.shared_info:
                holds.append((state.vcpu_info >> 12, WRITABLE))
        holds += [(index, WRITABLE) for index in self.fifo.held_frames()]
        return holds + self.grants.mapper.device_holds()

    def recount(self) -> list[str]:
        """Broken invariants of the domain's memory; empty when all is well."""
        return recount(self.tables, self.holds())
