"""A PV domain on an engine that executes nothing: for tests of memory, traps and hypercalls.

The guest's first pages are mapped from virtual address 0 on, a page table page where the test makes one is mapped
read-only there as in a real guest.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

from hypervisor.abi import errno
from hypervisor.domain import Domain, MachineConfig
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls import dispatch  # noqa: F401  fills the table
from hypervisor.hypercalls.registry import REGISTRY
from hypervisor.memory import layout
from hypervisor.memory.frames import L4

BASE = 0x20000
PAGES = 64
PAGE = 4096
RW, RO = x86.PTE_P | x86.PTE_RW | x86.PTE_US | x86.PTE_A, x86.PTE_P | x86.PTE_US | x86.PTE_A
NX = x86.PTE_NX

# Where the rig keeps the tables of its own address space, and what a test may use.
ROOT, ROOT_L3, ROOT_L2, ROOT_L1 = 1, 2, 3, 4
FIRST_FREE = 8


class FakeRegisters:
    """Plain attributes for `hypervisor.engines.base.Registers`."""

    def __init__(self) -> None:
        self.gpr = [0] * 16
        self.rip = 0
        self._rflags = 0x202
        self.cr2 = self.cr3 = 0
        self.cs, self.ss = 0xE033, 0xE02B
        self.ds = self.es = self.fs = self.gs = 0
        self.fs_base = self.gs_base = 0
        self.task_switched = False
        self.long_mode_code = True

    @property
    def rflags(self) -> int:
        return self._rflags

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._rflags = value | 2

    @property
    def single_step(self) -> bool:
        return bool(self._rflags & x86.FLAG_TF)

    def clear_flags(self, mask: int) -> None:
        self._rflags &= ~mask

    def load_flat64(self, cs: int, ss: int) -> None:
        self.cs, self.ss = cs, ss
        self.long_mode_code = True


class FakeEngine:
    """Records what is asked of it."""

    name = "fake"
    runs_32_bit = False

    def __init__(self) -> None:
        self.regs = FakeRegisters()
        self.flush_epoch = 1
        self.flushes = 0
        self.pages_flushed: list[int] = []
        self.written: list[int] = []
        self.segments: list[tuple[int, int, int]] = []
        self.ldt: tuple[int, int, int] = (0, 0, 0)
        self.neighbours: dict[int, tuple[int, int]] = {}

    def load_cr3(self, mpa: int) -> None:
        self.regs.cr3 = mpa
        self.flush_epoch += 1

    def switch_tables(self, mpa: int, kernel: bool) -> None:
        self.load_cr3(mpa)

    def flush_all(self) -> None:
        self.flush_epoch += 1
        self.flushes += 1

    def flush_page(self, va: int) -> None:
        self.pages_flushed.append(va)

    def memory_written(self, mpa: int, _size: int) -> None:
        self.written.append((mpa >> 12) - BASE)

    def map_neighbour(self, mpa: int, size: int, address: int) -> None:
        self.neighbours[mpa] = (size, address)

    def unmap_neighbour(self, mpa: int, size: int) -> None:
        assert self.neighbours.pop(mpa)[0] == size

    def load_flat64(self, cs: int, ss: int) -> None:
        self.regs.load_flat64(cs, ss)

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        self.segments.append((index, selector, descriptor))
        if index == x86.CS:
            self.regs.cs = selector
            self.regs.long_mode_code = bool(descriptor & x86.DESC_L)
        elif index == x86.SS:
            self.regs.ss = selector

    def set_ldt(self, selector: int, base: int, limit: int) -> None:
        self.ldt = (selector, base, limit)

    def cpuid(self, leaf: int, _subleaf: int) -> tuple[int, int, int, int]:
        last = {0: 0xD, 0x8000_0000: 0x8000_0008}
        return last.get(leaf, leaf), 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF

    def hide_features(self, masks: dict[tuple[int, int], int]) -> bool:
        self.hidden = masks
        return True

    def read_tsc(self) -> int:
        return 1234


class Peers:
    """The other ends of event channels."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int]] = []
        self.bound: list[tuple[int, int, int]] = []
        self.gone: list[tuple[int, int, int]] = []
        self.refuse: int | None = None
        self.known: set[int] = set()

    def send(self, peer: int, peer_port: int, local_port: int) -> None:
        self.sent.append((peer, peer_port, local_port))

    def bind(self, peer: int, peer_port: int, local_port: int) -> None:
        if self.refuse is not None:
            raise XenError(self.refuse)
        self.bound.append((peer, peer_port, local_port))

    def closed(self, peer: int, peer_port: int, local_port: int) -> None:
        self.gone.append((peer, peer_port, local_port))

    def exists(self, domid: int) -> bool:
        return domid in self.known


class Rig:
    """The domain and short ways to set it up. Frames are named by index: 0 is the domain's first page."""

    domid, base = 7, BASE

    def __init__(self, pages: int = PAGES, max_pages: int | None = None, vcpus: int = 1) -> None:
        most = max_pages or pages
        self.mapping = self.new_mapping(layout.total_frames(most) * PAGE)
        self.engine = FakeEngine()
        self.peers = Peers()
        self.woken: list[tuple[int, int]] = []
        config = MachineConfig(
            "00000000-0000-0000-0000-000000000001",
            "rig",
            self.domid,
            self.base,
            pages,
            most,
            vcpus,
            vcpus,
            tsc_khz=2_000_000,
        )
        self.domain = Domain(
            config, self.mapping, self.engine, self.peers, lambda number, port: self.woken.append((number, port))
        )
        self.leaves = 0
        self.domain.leave = self._leave
        self.tables, self.frames, self.memory = self.domain.tables, self.domain.frames, self.domain.memory
        self.guest, self.regs = self.domain.guest, self.engine.regs
        self.state = self.domain.vcpus[0].state

    def new_mapping(self, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size)

    def _leave(self) -> None:
        self.leaves += 1

    # -- frames and entries

    def pte(self, index: int, flags: int = RW) -> int:
        return (self.base + index) << 12 | flags

    def word(self, index: int, slot: int) -> int:
        return int(self.memory.words[index * 512 + slot])

    def fill(self, index: int, entries: dict[int, int]) -> int:
        """Write a frame that is no page table yet; its index."""
        self.memory.clear_page(index)
        for slot, value in entries.items():
            self.memory.words[index * 512 + slot] = value
        return index

    def mfn(self, index: int) -> int:
        return self.base + index

    def mpa(self, index: int, offset: int = 0) -> int:
        return (self.base + index) << 12 | offset

    # -- the guest's own address space

    def boot(self) -> Rig:
        """An address space with all pages from address 0 on; its tables read-only. The root is pinned and loaded."""
        tables = (ROOT, ROOT_L3, ROOT_L2, ROOT_L1)
        pages = min(self.frames.ram, 512)
        self.fill(
            ROOT_L1, {p: self.pte(p, (RO if p in tables else RW) | NX) for p in range(pages) if self.frames.refs[p]}
        )
        self.fill(ROOT_L2, {0: self.pte(ROOT_L1)})
        self.fill(ROOT_L3, {0: self.pte(ROOT_L2)})
        self.fill(ROOT, {0: self.pte(ROOT_L3)})
        self.tables.pin(self.mfn(ROOT), L4)
        self.tables.get_type(ROOT, L4)
        self.state.kernel_cr3 = self.mpa(ROOT)
        self.state.kernel_mode = 1
        self.domain.vcpus[0].up = self.domain.vcpus[0].initialised = True
        self.engine.load_cr3(self.mpa(ROOT))
        return self

    def unmap(self, *indexes: int) -> None:
        for index in indexes:
            self.tables.update_l1(ROOT_L1 * 512 + index, 0)

    def make_readonly(self, *indexes: int) -> None:
        for index in indexes:
            self.tables.update_l1(ROOT_L1 * 512 + index, self.pte(index, RO | NX))

    def put(self, va: int, data: bytes) -> int:
        """Write guest memory from outside, by its linear address; the address."""
        self.memory.bytes[va : va + len(data)] = data
        return va

    def get(self, va: int, size: int) -> bytes:
        return bytes(self.memory.bytes[va : va + size])

    def u64(self, va: int) -> int:
        return int(struct.unpack("<Q", self.get(va, 8))[0])

    def u32(self, va: int) -> int:
        return int(struct.unpack("<I", self.get(va, 4))[0])

    def snapshot(self) -> tuple[bytes, ...]:
        """Types and counts of all frames, for "nothing changed"."""
        f = self.frames
        count = f.count_np
        kinds = bytes(k if c else 0 for k, c in zip(f.kind_np.tolist(), count.tolist(), strict=True))
        return kinds, count.tobytes(), f.refs_np.tobytes(), bytes(f.pinned), bytes(f.holding)

    def check(self) -> None:
        assert self.domain.recount() == []


def code_of(call: Any, *arguments: Any, **named: Any) -> int:
    """0, or the errno with which it fails."""
    try:
        call(*arguments, **named)
    except XenError as exc:
        return exc.errno
    return 0


def call(rig: Rig, number: int, *arguments: int) -> int:
    """A hypercall's handler with these arguments: its result, or minus the errno."""
    handler = REGISTRY.table[number]
    assert handler is not None
    try:
        padded = [*(a & x86.MASK64 for a in arguments), 0, 0, 0, 0, 0, 0][:6]
        return handler(rig.domain, *padded)
    except XenError as exc:
        return -exc.errno


def put(rig: Rig, layout: str, *values: int, at: int = FIRST_FREE * PAGE) -> int:
    """Write an argument structure to guest memory; its address."""
    return rig.put(at, struct.pack(layout, *values))


E = errno
