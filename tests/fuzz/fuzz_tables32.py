"""Random steps on a 32-bit domain: the same as of 64-bit ones, with the structures and calls of such a guest."""

from __future__ import annotations

import random
import struct

import fuzz_checks
from fuzz_greedy import ARGUMENTS, CODE, FIRST, PAGES, TableRig32
from fuzz_tables import Steps
from pv_rig import BASE, NX, PAGE
from pv_rig32 import KRO, KRW, ROOT3, ROOT_L1

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.errors import XenError

# Writes to memory at (%edi) with %eax: mov, xchg, lock cmpxchg %ecx, lock or, lock and, mov of 1 and 2 bytes, stosl,
# lock cmpxchg8b, lock btr $1, lock bts $1, lock xadd.
STORES = (
    b"\x89\x07", b"\x87\x07", b"\xf0\x0f\xb1\x0f", b"\xf0\x09\x07", b"\xf0\x21\x07", b"\x88\x07", b"\x66\x89\x07",
    b"\xab", b"\xf0\x0f\xc7\x0f", b"\xf0\x0f\xba\x37\x01", b"\xf0\x0f\xba\x2f\x01", b"\xf0\x0f\xc1\x07",
)  # fmt: skip
_CALL_RIP = 0x5002
FIRST_XEN_SLOT = 428


class Steps32(Steps):
    """See `Steps`."""

    FLAGS = (KRW, KRW, KRO, KRO, KRO | NX, KRW | NX, x86.PTE_P, x86.PTE_P, KRW | x86.PTE_US, KRW | 1 << 9, KRW | 0x80)
    SLOTS = (0, 0, 1, 1, 2, 3, 3, 4, 8, 12, 255, FIRST_XEN_SLOT - 1, FIRST_XEN_SLOT, 511)
    STORES = STORES

    def __init__(self, rig: TableRig32, rng: random.Random) -> None:
        super().__init__(rig, rng)  # type: ignore[arg-type]
        self.rig32 = rig

    def root_in_force(self) -> int:
        return self.rig32.area.guest_root(0)

    def call(self, number: int, *arguments: int, image: bytes = b"") -> int:
        rig = self.rig32
        rig.put(ARGUMENTS * PAGE, image.ljust(512, b"\0"))
        gpr = rig.regs.gpr
        gpr[x86.RAX] = number
        for register, value in zip((x86.RBX, x86.RCX, x86.RDX, x86.RSI, x86.RDI), (*arguments, *[0] * 5), strict=False):
            gpr[register] = value & x86.MASK32
        for _ in range(64):
            rig.regs.rip = _CALL_RIP
            rig.dispatcher.call()
            if rig.regs.rip == _CALL_RIP:
                break
        result = gpr[x86.RAX] - (gpr[x86.RAX] >> 31 << 32)
        self.done.append(f"hypercall {number} {[hex(a) for a in arguments]} {image.hex()} = {result}")
        return result

    def update_va(self) -> None:
        entry = self.entry()
        self.call(abi.HYPERVISOR_update_va_mapping, self.va(), entry, entry >> 32, self.rng.choice((0, 0, 1, 2)))

    def _operation(self, command: int, first: int, second: int) -> None:
        image = struct.pack("<III", command, first & x86.MASK32, second & x86.MASK32)
        self.call(abi.HYPERVISOR_mmuext_op, ARGUMENTS * PAGE, 1, 0, abi.DOMID_SELF, image=image)

    def mmuext(self) -> None:
        rng = self.rng
        command = rng.choice((0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 15, 16, 17, 6, 7))
        first = self.frame()
        if command == abi.MMUEXT_NEW_BASEPTR and rng.randrange(2):
            first = BASE + ROOT3
        self._operation(command, first, self.frame())
        self._back_to_first_root()

    def table(self) -> None:
        """A root with its last L2, an L2 with an L1, or an L1; see `Steps.table`."""
        rng = self.rng
        level = rng.choice((1, 2, 3, 3))
        parent, child, last = (rng.randrange(FIRST, PAGES) for _ in range(3))
        entries = {}
        if level == 3:
            entries = {rng.randrange(4): (BASE + child) << 12 | 1, 3: (BASE + last) << 12 | 1}
        elif rng.randrange(4):
            entries = {self.slot(): (BASE + child) << 12 | rng.choice(self.FLAGS)}
        if rng.randrange(8) == 0:
            entries[self.slot()] = self.entry()
        self.prepare(child, {})
        self.prepare(last, {})
        self.prepare(parent, entries)
        self._operation(level - 1, BASE + parent, 0)
        if rng.randrange(2):
            self._operation(abi.MMUEXT_NEW_BASEPTR, BASE + parent, 0)
        for _ in range(rng.randrange(3)):
            target = rng.choice((parent, child, last, rng.randrange(FIRST, PAGES)))
            flags = rng.choice((1, KRO, KRW))
            self.update((BASE + rng.choice((parent, last))) << 12 | self.slot() << 3, (BASE + target) << 12 | flags)
        self._back_to_first_root()

    def set_va(self, va: int, entry: int) -> None:
        self.call(abi.HYPERVISOR_update_va_mapping, va, entry, entry >> 32, abi.UVMF_INVLPG)

    def _back_to_first_root(self) -> None:
        """Another root is in force, with no arguments to be read: for this one step."""
        if self.root_in_force() != BASE + ROOT3:
            self.rig.engine.walk_all()
            try:
                self.rig.domain.new_baseptr(BASE + ROOT3)
            except XenError:
                self.done.append("the first root is no root any more")

    def memory_op(self) -> None:
        rng = self.rng
        command = rng.choice(
            (abi.XENMEM_decrease_reservation, abi.XENMEM_populate_physmap, abi.XENMEM_increase_reservation)
        )
        many = rng.randrange(1, 3)
        if rng.randrange(4) == 0:
            self.exchange(many)
            return
        frames = [
            self.frame() if command == abi.XENMEM_decrease_reservation else FIRST + rng.randrange(8)
            for _ in range(many)
        ]
        extents = ARGUMENTS * PAGE + 64 if rng.randrange(8) else 0
        image = struct.pack("<IIIIHxx", extents, many, rng.choice((0, 0, 0, 1, 2)), 0, abi.DOMID_SELF).ljust(64, b"\0")
        image += struct.pack(f"<{many}I", *(frame & x86.MASK32 for frame in frames))
        self.call(abi.HYPERVISOR_memory_op, command, ARGUMENTS * PAGE, image=image)

    def exchange(self, many: int) -> None:
        given, taken = self.rng.choice(((0, 0), (0, 1), (1, 0)))
        at = ARGUMENTS * PAGE + 128
        counts = many << taken, many << given
        image = struct.pack("<IIIIHxx", at, counts[0], given, 0, abi.DOMID_SELF)
        image += struct.pack("<IIIIHxxI", at + 64, counts[1], taken, 0, abi.DOMID_SELF, 0)
        frames = [self.frame() & x86.MASK32 for _ in range(counts[0])]
        image = image.ljust(128, b"\0") + struct.pack(f"<{counts[0]}I", *frames)
        image = image.ljust(192, b"\0") + struct.pack(f"<{counts[1]}I", *range(FIRST, FIRST + counts[1]))
        self.call(abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, ARGUMENTS * PAGE, image=image)

    def direct(self) -> None:
        """As in a 64-bit domain; numbers are cut to 32 bits, and entries are written in halves."""
        rng, rig = self.rng, self.rig
        code = rng.choice(self.STORES)
        regs = rig.regs
        at = rng.choice((ROOT_L1, rng.randrange(FIRST, PAGES))) * PAGE + self.slot() * 8
        va = at + rng.choice((0, 0, 4, 4, rng.randrange(8)))
        rig.memory.bytes[CODE * PAGE : CODE * PAGE + len(code)] = code
        regs.rip, regs.cr2 = CODE * PAGE, va
        gpr, entry, old = regs.gpr, self.entry(), rig.memory.words[at >> 3]
        half = entry >> (32 if va & 4 else 0)
        gpr[x86.RDI], gpr[x86.RAX], gpr[x86.RCX] = va, half & x86.MASK32, half & x86.MASK32
        if code.endswith(b"\xc7\x0f"):
            gpr[x86.RBX], gpr[x86.RCX] = entry & x86.MASK32, entry >> 32
        if rng.randrange(2):
            gpr[x86.RAX] = old >> (32 if va & 4 else 0) & x86.MASK32
        gpr[x86.RDX] = old >> 32
        taken = rig.domain.table_writes.emulate(va)
        self.done.append(f"direct write {code.hex()} at {va:#x} of {entry:#x} over {old:#x}: {taken}")

    def gdt(self) -> None:
        many = self.rng.randrange(3)
        frames = struct.pack(f"<{many}I", *(self.frame() & x86.MASK32 for _ in range(many)))
        self.call(abi.HYPERVISOR_set_gdt, ARGUMENTS * PAGE, 512 * many, image=frames)

    def ldt(self) -> None:
        self._operation(abi.MMUEXT_SET_LDT, self.va(), self.rng.choice((0, 1, 512, 1024, 1025)))

    def descriptor(self) -> None:
        good = self.rng.choice((0, 0x00CF_FB00_0000_FFFF, 0x0000_EC00_E019_0000, fuzz_checks.POISON, self.entry()))
        where = self.frame() << 12 | self.slot() << 3
        self.call(abi.HYPERVISOR_update_descriptor, where, where >> 32, good, good >> 32)

    def multicall(self) -> None:
        entries = b""
        for _ in range(2):
            entry = self.entry()
            arguments = (self.va(), entry & x86.MASK32, entry >> 32, 0, 0, 0)
            entries += struct.pack("<8I", abi.HYPERVISOR_update_va_mapping, 0, *arguments)
        self.call(abi.HYPERVISOR_multicall, ARGUMENTS * PAGE, 2, image=entries)
