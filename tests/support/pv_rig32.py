"""A 32-bit domain on an engine that executes nothing; see `pv_rig`."""

from __future__ import annotations

import mmap
import struct
from typing import Any

from pv_rig import BASE, PAGE, PAGES, FakeEngine, Peers, Rig

from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS
from hypervisor.domain import MachineConfig
from hypervisor.domain32 import Domain32
from hypervisor.engines import x86
from hypervisor.hypercalls.compat import Dispatcher32
from hypervisor.memory import layout
from hypervisor.memory.frames import L3
from hypervisor.memory.xenarea32 import XenArea32

KRW, KRO = x86.PTE_P | x86.PTE_RW | x86.PTE_A, x86.PTE_P | x86.PTE_A  # of the kernel in ring 1: no user bit
ROOT3, ROOT_L2X, ROOT_L2, ROOT_L1 = 1, 2, 3, 4


class FakeEngine32(FakeEngine):
    """`FakeEngine` with the hidden bases of segments."""

    runs_32_bit = True

    def __init__(self) -> None:
        super().__init__()
        self.bases = [0] * 6
        regs: Any = self.regs
        regs.segment_base = lambda index: self.bases[index]
        regs.long_mode_code = False
        regs.cs, regs.ss = KERNEL_CS, KERNEL_SS

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        super().load_segment(index, selector, descriptor)
        self.bases[index] = x86.desc_base(descriptor) if descriptor else 0


class Rig32(Rig):
    """Boots with all pages mapped from address 0 on, for the kernel alone."""

    def __init__(self, pages: int = PAGES, vcpus: int = 1) -> None:
        self.mapping = mmap.mmap(-1, layout.total_frames(pages) * PAGE)
        engine = FakeEngine32()
        self.engine: Any = engine
        self.peers = Peers()
        self.woken: list[tuple[int, int]] = []
        config = MachineConfig(
            "00000000-0000-0000-0000-000000000001", "rig", 7, BASE, pages, pages, vcpus, vcpus,
            tsc_khz=2_000_000, bits=32,
        )  # fmt: skip
        self.domain = Domain32(
            config, self.mapping, engine, self.peers, lambda number, port: self.woken.append((number, port))
        )
        self.leaves = 0
        self.domain.leave = self._leave
        self.tables, self.frames, self.memory = self.domain.tables, self.domain.frames, self.domain.memory
        self.guest, self.regs = self.domain.guest, engine.regs
        self.state = self.domain.vcpus[0].state
        self.dispatcher = Dispatcher32(self.domain)
        area = self.domain.area
        assert isinstance(area, XenArea32)
        self.area: XenArea32 = area

    def boot(self) -> Rig32:
        tables = (ROOT3, ROOT_L2X, ROOT_L2, ROOT_L1)
        self.fill(ROOT_L1, {p: self.pte(p, KRO if p in tables else KRW) for p in range(min(self.frames.ram, 512))})
        self.fill(ROOT_L2, {0: self.pte(ROOT_L1, KRW)})
        self.fill(ROOT_L2X, {})
        self.fill(ROOT3, {0: self.pte(ROOT_L2, 1), 3: self.pte(ROOT_L2X, 1)})
        self.tables.pin(self.mfn(ROOT3), L3)
        self.tables.get_type(ROOT3, L3)
        self.area.set_guest_root(0, self.mfn(ROOT3))
        self.state.kernel_mode = 1
        self.domain.vcpus[0].up = self.domain.vcpus[0].initialised = True
        self.engine.load_cr3(self.area.root(0))
        return self

    def call(self, number: int, *arguments: int) -> int:
        """A hypercall through the registers; the signed result."""
        gpr = self.regs.gpr
        gpr[x86.RAX] = number
        for register, value in zip((x86.RBX, x86.RCX, x86.RDX, x86.RSI, x86.RDI), (*arguments, *[0] * 5), strict=False):
            gpr[register] = value
        self.dispatcher.call()
        return int(struct.unpack("<i", struct.pack("<I", gpr[x86.RAX]))[0])

    def pack(self, va: int, form: str, *values: int) -> int:
        return self.put(va, struct.pack(form, *values))

    def unpack(self, va: int, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.get(va, struct.calcsize(form)))
