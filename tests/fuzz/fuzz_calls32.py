"""The calls of `fuzz_calls` as a 32-bit guest makes them: 4-byte pointers and frame numbers, other layouts."""

from __future__ import annotations

import random
import struct

from fuzz_calls import Generator
from fuzz_machine import IRET, USER, Call, FuzzMachine
from fuzz_values import DESCRIPTORS

from hypervisor import abi
from hypervisor.engines.x86 import MASK32
from hypervisor.vcpu_context32 import MAX_GDT_FRAMES

KERNEL_CS, KERNEL_DS, USER_CS, USER_DS = 0xE019, 0xE021, 0xE02B, 0xE033


class Generator32(Generator):
    """See `Generator`."""

    BAD_POINTERS = (
        *(0, 8, 0x1000, MASK32, MASK32 - 7, MASK32 - 15, 0x8000_0000, 0xBFFF_FFF8, 0xBFFF_F000),
        *(0xF580_0000, 0xF57F_FFF8, 0xFFE0_0000, 0xFFDF_FFFC, 0xC000_0000 - 4, 0x8000_0001),
    )

    def __init__(self, fuzz: FuzzMachine, rng: random.Random, *, calm: bool = False) -> None:
        super().__init__(fuzz, rng, calm=calm)
        # The kernel's entries have no user bit; its L3 has no other flag than present.
        self.tables = (self.l1, self.l1 + 1, self.l1 + 2, self.l1 + 3, fuzz.boot.l4_mfn - self.base)

    def call(self, number: int) -> Call:
        call = super().call(number)
        call.arguments = tuple(argument & MASK32 if argument >> 64 else argument for argument in call.arguments)
        return call

    def entry(self) -> int:
        entry = super().entry()
        what = self.rng.randrange(8)
        return entry & ~4 if what < 5 else entry & ~0xFFE if what == 5 else entry

    def _words(self, *values: int) -> bytes:
        return struct.pack(f"<{len(values)}I", *(value & MASK32 for value in values))

    # -- memory

    def update_va(self, number: int) -> Call:
        call = super().update_va(number)
        va, entry, *rest = call.arguments
        call.arguments = (va, entry & MASK32, entry >> 32, *rest)
        return call

    def mmuext(self, number: int) -> Call:
        rng = self.rng
        operations = b""
        many = rng.randrange(1, 4)
        for _ in range(many):
            command = rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 4, 4, 4, 4, 5, 6, 7, 13, 16, 17, *range(25)))
            if command == abi.MMUEXT_NEW_BASEPTR and self.calm:
                command = abi.MMUEXT_PIN_L3_TABLE
            if command in (6, 7, 8, 9, 10, 11):
                first, second = self.arena_va(), self.number()
            elif command == abi.MMUEXT_SET_LDT:
                first, second = self.arena_va(), self.one_of(0, 1, 512, 513, 1024, 8192, 8193, MASK32)
            else:
                first, second = self.frame(), self.frame()
            if command == abi.MMUEXT_PIN_L3_TABLE:
                self._make_root(first)
            operations += self._words(command, first, second)
        image = self.fuzz.image(number)
        done = self.pointer(image + 256) if rng.randrange(3) == 0 else 0
        who = abi.DOMID_SELF if rng.randrange(12) else self.domid()
        return Call(abi.HYPERVISOR_mmuext_op, (self.pointer(image), self.count(many), done, who), image=operations)

    def _make_root(self, mfn: int) -> None:
        """Four entries in a page of the arena that the guest could write itself, so that it may pass for a root."""
        index = mfn - self.base
        frames = self.fuzz.domain.frames
        if index in self.arena and frames.refs[index] and not frames.count[index] and self.rng.randrange(4):
            self.fuzz.memory[index * 4096 : index * 4096 + 4096] = bytes(4096)
            entries = [self.frame() << 12 | 1 if self.rng.randrange(2) else 0 for _ in range(3)]
            last = (self.base + self.rng.choice(self.arena)) << 12 | 1
            struct.pack_into("<4Q", self.fuzz.memory, index * 4096, *(e & (1 << 64) - 1 for e in (*entries, last)))

    def memory_op(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((0, 0, 1, 1, 6, 6, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, *range(32)))
        many = rng.randrange(1, 4)
        image = self.fuzz.image(number)
        extents = image + 128
        who = abi.DOMID_SELF if rng.randrange(12) else self.domid()
        if command == abi.XENMEM_exchange:
            one = self._words(self.pointer(extents), self.count(many), 0, 0, who)
            two = self._words(self.pointer(extents + 64), many, rng.choice((0, 0, 1)), 0, who)
            data = one + two + self._words(0)
        elif command in (0, 1, 6):
            order = rng.choice((0, 0, 0, 0, 0, 1, 9, 255))
            where = self.pointer(extents) if rng.randrange(6) else 0
            data = self._words(where, self.count(many), order, self.number(), who)
        elif command in (7, 26):
            data = struct.pack("<HH", who, self.number() & 0xFFFF) + self._words(
                rng.randrange(6), self.frame(), self.frame()
            )
        else:
            data = self._words(self.count(many), self.pointer(extents), 0, 0)
        if rng.randrange(12) == 0:
            command |= self.number() << 6
        frames = self._words(*(self.frame() for _ in range(many)))
        return self._own(number, abi.HYPERVISOR_memory_op, command & MASK32, data.ljust(128, b"\0") + frames)

    def grant(self, number: int) -> Call:
        call = super().grant(number)
        command = call.arguments[0]
        rng, image = self.rng, self.fuzz.image(number)
        where = self.pointer(image + 128)
        if command == abi.GNTTABOP_setup_table:
            call.image = struct.pack("<HxxIhxxI", self.domid(), self.count(3) & MASK32, 0, where & MASK32)
        elif command == abi.GNTTABOP_transfer:
            call.image = struct.pack("<IHxxIhxx", self.frame() & MASK32, self.domid(), rng.randrange(16), 0) * 2
        elif command == abi.GNTTABOP_copy:
            items = b""
            for _ in range(2):
                for _side in range(2):
                    ref = rng.choice((self.frame() & MASK32, 0, 1, 2, 8, 9))
                    items += struct.pack("<IHH", ref, self.domid(), rng.choice((0, 8, 4095, 4096, 65535)))
                items += struct.pack("<HHhxx", rng.choice((0, 8, 64, 4096, 65535)), rng.randrange(8), 0)
            call.image = items
        return call

    # -- descriptors, multicall

    def descriptor_tables(self, number: int) -> Call:
        rng = self.rng
        if rng.randrange(2):
            many = rng.randrange(3)
            frames = self._words(*(self.frame() for _ in range(many)))
            return Call(
                abi.HYPERVISOR_set_gdt, (self.pointer(self.fuzz.image(number)), self.count(512 * many)), image=frames
            )
        where = (self.frame() << 12 | rng.randrange(512) << 3) & (1 << 64) - 1
        what = rng.choice((*DESCRIPTORS, 0x0000_EC00_E019_0000, 0x00CF_BB00_0000_FFFF, rng.getrandbits(64)))
        return Call(abi.HYPERVISOR_update_descriptor, (where & MASK32, where >> 32, what & MASK32, what >> 32))

    def _entry_of(self, inner: Call) -> bytes:
        return self._words(inner.number, 0, *(*inner.arguments, 0, 0, 0, 0, 0, 0)[:6])

    ENTRY_SIZE = 32

    # -- vCPUs, time, processor

    def _context(self) -> int:
        rng, where = self.rng, self.fuzz.where
        data = bytearray(abi.COMPAT_VCPU_GUEST_CONTEXT_VM_ASSIST + 4)

        def put(offset: int, value: int) -> None:
            struct.pack_into("<I", data, offset, value & MASK32)

        regs = abi.COMPAT_VCPU_GUEST_CONTEXT_USER_REGS
        for field, value in (
            (abi.COMPAT_CPU_USER_REGS_EIP, where["spin"]),
            (abi.COMPAT_CPU_USER_REGS_ESP, where["spin_stack"]),
            (abi.COMPAT_CPU_USER_REGS_CS, KERNEL_CS),
            (abi.COMPAT_CPU_USER_REGS_EFLAGS, 0x202),
            *((at, KERNEL_DS) for at in (abi.COMPAT_CPU_USER_REGS_SS, abi.COMPAT_CPU_USER_REGS_DS)),
        ):
            put(regs + field, value)
        root = self.fuzz.boot.l4_mfn
        put(abi.COMPAT_VCPU_GUEST_CONTEXT_CTRLREG + 12, root << 12 | root >> 20)
        put(abi.COMPAT_VCPU_GUEST_CONTEXT_KERNEL_SS, KERNEL_DS)
        put(abi.COMPAT_VCPU_GUEST_CONTEXT_KERNEL_SP, where["spin_stack"])
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            put(rng.randrange(0, len(data) - 4, 4), self.one_of(self.frame(), self.number(), self.frame() << 12))
        if rng.randrange(8) == 0:
            put(abi.COMPAT_VCPU_GUEST_CONTEXT_GDT_ENTS, self.one_of(512, MAX_GDT_FRAMES * 512, 7169))
            put(abi.COMPAT_VCPU_GUEST_CONTEXT_GDT_FRAMES, self.frame())
        at = self.fuzz.big - self.virt_base
        self.fuzz.memory[at : at + len(data)] = bytes(data)
        return self.fuzz.big

    def sched(self, number: int) -> Call:
        call = super().sched(number)
        if call.number == abi.HYPERVISOR_set_timer_op:
            return Call(call.number, (self.number() & MASK32, self.one_of(0, 0, 1, MASK32)))
        if call.arguments[0] == abi.SCHEDOP_poll:
            timeout = self.rng.choice((1, 1, 1, 1 << 63, self.rng.getrandbits(50)))
            where = self.pointer(self.fuzz.image(number) + 64)
            call.image = struct.pack("<IIQ", where & MASK32, self.count(2) & MASK32, timeout).ljust(64, b"\0")
            call.image += struct.pack("<2I", self.port(), self.port())
        return call

    def _processor(self, number: int, what: int) -> Call:
        rng, fuzz = self.rng, self.fuzz
        image = fuzz.image(number)
        recover = fuzz.where["recover"]
        address = self.one_of(recover, rng.choice(self.BAD_POINTERS), self.arena_va())
        if what in (0, 1, 2, 3):
            return super()._processor(number, what)
        if what == 4:
            traps = b"".join(
                struct.pack("<BBHI", rng.randrange(32, 256), rng.randrange(8), KERNEL_CS, recover) for _ in range(3)
            )
            return Call(abi.HYPERVISOR_set_trap_table, (image,), image=traps)
        if what == 5 and not self.calm:
            kind = rng.choice((1, 2, 3, 4, 5, 7, 9))
            data = struct.pack("<HHII", kind, rng.randrange(3), self.selector(), address & MASK32)
            return self._own(number, abi.HYPERVISOR_callback_op, rng.randrange(3), data)
        if what == 6:
            flags = 0x202 | rng.choice((0, 0, 0x100, 0x400, 0x3000, 0x20000, 0x4000, 0x40000, rng.getrandbits(22)))
            eip = recover if rng.randrange(4) else address
            cs = self.selector()
            ss = self.selector() if not rng.randrange(8) else USER_DS if cs & 2 else KERNEL_DS
            frame = self._words(0, eip, cs, flags, fuzz.iret_stack, ss)
            return Call(0, (image,), kind=IRET, image=frame)
        if self.calm or rng.randrange(8):
            return Call(0, (address, fuzz.iret_stack, rng.randrange(2)), kind=USER)
        return Call(abi.HYPERVISOR_stack_switch, (self.selector(), fuzz.trap_stack))

    def selector(self) -> int:
        """A code selector, mostly: the kernel's, a program's, one of the guest's own tables, or none."""
        rng = self.rng
        if rng.randrange(12) == 0:
            # An iret to ring 0 ends the guest.
            return rng.getrandbits(16) | (rng.randrange(1, 4) if rng.randrange(16) else 0)
        return rng.choice((KERNEL_CS, KERNEL_CS, KERNEL_CS, USER_CS, USER_CS, USER_CS, KERNEL_DS, 7, 9, 0xB))
