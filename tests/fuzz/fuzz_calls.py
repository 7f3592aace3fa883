"""Hypercalls that make sense nearly always, with values where it hurts.

`Generator` knows the sub-operations and the layouts of their arguments (public headers of Xen). It draws from a
`random.Random`, a plain one for speed or hypothesis' own, which shrinks what it finds.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from fuzz_machine import (
    AND8,
    COMPARE_EXCHANGE,
    EXCHANGE,
    FILL,
    HYPERCALL,
    IRET,
    OR8,
    TOUCH,
    USER,
    VIRT_BASE,
    WRITE1,
    WRITE4,
    WRITE8,
    Call,
    FuzzMachine,
)

from hypervisor import abi
from hypervisor.engines import x86

ALL = (1 << 64) - 1
RW = x86.PTE_P | x86.PTE_RW | x86.PTE_US | x86.PTE_A
RO = x86.PTE_P | x86.PTE_US | x86.PTE_A
DOMIDS = (abi.DOMID_SELF, abi.DOMID_SELF, abi.DOMID_SELF, 9, 0, 7, 8, 10, *range(0x7FF0, 0x8000), 0xFFFF)
BAD_POINTERS = (
    *(0, 8, 0x1000, ALL, ALL - 7, ALL - 15, 0x8000_0000_0000, 0x7FFF_FFFF_FFF8, 0x7FFF_FFFF_F000),
    *(
        0xFFFF_8000_0000_0000,
        0xFFFF_8200_0000_0000,
        0xFFFF_87FF_FFFF_FFF8,
        0xFFFF_8800_0000_0000,
        0x8000_0000_0000_0000,
    ),
)
DESCRIPTORS = (
    *(0, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x0000_EC00_E033_0000, ALL),
    *(0x0000_8900_0000_0067, 0x0000_E500_0000_0000, 0x00CF_7300_0000_FFFF, 0x0000_8E00_0000_0000),
)

DEADLY = frozenset((abi.HYPERVISOR_set_trap_table, abi.HYPERVISOR_set_callbacks, abi.HYPERVISOR_stack_switch))
"""With arguments that were not meant for them these end most guests, and that is all they do."""


class Generator:
    """Calls for one machine.

    :param calm: leave out what mostly ends the guest.
    """

    def __init__(self, fuzz: FuzzMachine, rng: random.Random, *, calm: bool = False) -> None:
        self.fuzz = fuzz
        self.rng = rng
        self.calm = calm
        domain = fuzz.domain
        where = fuzz.where
        self.base = domain.config.base_mfn
        self.ram, self.size = domain.frames.ram, domain.frames.size
        first = (where["arena"] - VIRT_BASE) >> 12
        self.arena = range(first, first + where["arena_pages"])
        self.l1 = (where["window_l1"] - VIRT_BASE) >> 12
        self.tables = (self.l1, self.l1 + 1, self.l1 + 2, fuzz.boot.l4_mfn - self.base)
        self.makers: tuple[Callable[[int], Call], ...] = (
            *[self.mmu_update, self.update_va, self.mmuext] * 4,
            *[self.memory_op, self.grant, self.event, self.access] * 3,
            *[self.multicall, self.descriptor_tables, self.vcpu, self.information, self.sched, self.processor],
            self.raw,
        )

    # -- values

    def one_of(self, *choices: int) -> int:
        return self.rng.choice(choices)

    def frame(self) -> int:
        """A machine frame number."""
        rng = self.rng
        what = rng.randrange(16)
        if what < 10:
            return self.base + rng.choice(self.arena)
        if what < 12:
            # The root least of all: the guest's own code hangs on it.
            return self.base + rng.choice(self.tables if not rng.randrange(6) else self.tables[:3])
        if what == 12:
            # Its own code and stacks only now and then: a guest that writes those is soon gone.
            return self.base + rng.randrange(self.arena.stop if rng.randrange(50) else 0, self.ram)
        if what == 13 and rng.randrange(2):
            return self.base + rng.choice(self._shared())
        if what == 13:
            return self.base + self.ram + rng.randrange(self.size - self.ram)
        return rng.choice(
            (0, 1, self.base - 1, self.base + self.size, 0x40000, 0x40010, 1 << 27, (1 << 40) - 1, ALL, 1 << 52)
        )

    def _shared(self) -> list[int]:
        """Frames of Xen's that the domain may map."""
        grants = self.fuzz.domain.grants.table
        return [self.fuzz.domain.area.shared_info, *grants.frames[:2], *grants.status_frames[:2]]

    def entry(self) -> int:
        rng = self.rng
        if rng.randrange(8) == 0:
            return 0
        flags = rng.choice(
            (RW, RW, RO, RO, RO | x86.PTE_NX, RW | x86.PTE_NX, x86.PTE_P, x86.PTE_P | x86.PTE_RW, RW | 0x80)
        )
        if rng.randrange(8) == 0:
            flags = rng.getrandbits(12) | rng.getrandbits(12) << 52
        return (self.frame() << 12 | flags) & ALL

    def arena_va(self) -> int:
        """An address in the guest's linear mapping of the arena, or in its window."""
        rng = self.rng
        if rng.randrange(2):
            return VIRT_BASE + (rng.choice(self.arena) << 12)
        return self.fuzz.where["window"] + (rng.randrange(24) << 12)

    def pointer(self, good: int) -> int:
        """Mostly `good`."""
        what = self.rng.randrange(32)
        if what == 0:
            return self.rng.choice(BAD_POINTERS)
        if what == 1:
            return self.fuzz.where["edge"] - self.rng.choice((1, 4, 8, 16, 24, 64))
        if what == 2:
            return good + self.rng.choice((1, 4, -8))
        return good

    def number(self) -> int:
        rng = self.rng
        return rng.choice(
            (0, 1, 2, 3, 5, 16, 63, 64, rng.randrange(32), rng.getrandbits(rng.randrange(65)), ALL, 1 << 31)
        )

    def domid(self) -> int:
        return self.rng.choice(DOMIDS)

    def port(self) -> int:
        return self.one_of(0, 1, 2, 3, 4, 5, 6, 7, 63, 64, 1023, 1024, 4095, 4096, 131071, 1 << 31, 0xFFFF_FFFF)

    def count(self, good: int) -> int:
        return (
            good
            if self.rng.randrange(8)
            else self.one_of(0, 1, 2, good + 1, 257, 1 << 31, 0x8000_0001, 0xFFFF_FFFF, ALL)
        )

    def _own(self, number: int, op: int, command: int, image: bytes, *rest: int) -> Call:
        """A call `op(command, pointer to image, …)`."""
        return Call(op, (command, self.pointer(self.fuzz.image(number)), *rest), image=image)

    # -- families

    def call(self, number: int) -> Call:
        """A call for line `number` of a program."""
        call = self.rng.choice(self.makers)(number)
        deadly = call.kind == HYPERCALL and (call.number in DEADLY or call.number == abi.HYPERVISOR_multicall)
        if deadly and self.rng.randrange(100):
            return call
        if self.rng.randrange(40) == 0:
            arguments = list(call.arguments) + [0] * (6 - len(call.arguments))
            arguments[self.rng.randrange(6)] = self.number()
            call.arguments = tuple(arguments)
        if self.rng.randrange(64) == 0:
            call.delay = self.rng.randrange(2000)
        return call

    def mmu_update(self, number: int) -> Call:
        rng = self.rng
        requests = b""
        many = rng.randrange(1, 5)
        for _ in range(many):
            command = rng.choice((0, 0, 0, 0, 2, 2, 1, 3, rng.randrange(8)))
            slot = rng.choice((0, 1, 2, 3, 4, 8, 255, 256, 260, 271, 272, 511))
            requests += struct.pack("<2Q", (self.frame() << 12 | slot << 3 | command) & ALL, self.entry())
        image = self.fuzz.image(number)
        done = self.pointer(image + 256) if rng.randrange(3) == 0 else 0
        who = abi.DOMID_SELF if rng.randrange(8) else self.domid() | rng.choice((0, self.domid() << 16))
        return Call(abi.HYPERVISOR_mmu_update, (self.pointer(image), self.count(many), done, who), image=requests)

    def update_va(self, _number: int) -> Call:
        rng = self.rng
        va = self.arena_va() if rng.randrange(12) else rng.choice((*BAD_POINTERS, self.fuzz.where["edge"]))
        flags = rng.choice((0, 0, 1, 2, 2, 3, self.fuzz.image(0) | 2))
        if rng.randrange(8) == 0:
            number = abi.HYPERVISOR_update_va_mapping_otherdomain
            return Call(number, (va, self.entry(), flags, self.domid()))
        return Call(abi.HYPERVISOR_update_va_mapping, (va, self.entry(), flags))

    def mmuext(self, number: int) -> Call:
        rng = self.rng
        operations = b""
        many = rng.randrange(1, 4)
        for _ in range(many):
            command = rng.choice(
                (0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 16, 17, *range(25))
            )
            if command == abi.MMUEXT_NEW_BASEPTR and self.calm:
                command = abi.MMUEXT_NEW_USER_BASEPTR
            if command in (5, 6, 7, 8, 9, 10, 11) and command != 5:
                first, second = self.arena_va(), self.number()
            elif command == abi.MMUEXT_SET_LDT:
                first, second = self.arena_va(), self.one_of(0, 1, 512, 513, 1024, 8192, 8193, ALL)
            else:
                first, second = self.frame(), self.frame()
            operations += struct.pack("<I4xQQ", command, first, second)
        image = self.fuzz.image(number)
        done = self.pointer(image + 256) if rng.randrange(3) == 0 else 0
        who = abi.DOMID_SELF if rng.randrange(12) else self.domid()
        return Call(abi.HYPERVISOR_mmuext_op, (self.pointer(image), self.count(many), done, who), image=operations)

    def memory_op(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((0, 0, 1, 1, 6, 6, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, *range(32)))
        many = rng.randrange(1, 4)
        image = self.fuzz.image(number)
        extents = image + 128
        frames = b"".join(struct.pack("<Q", self.frame() & ALL) for _ in range(many))
        who = abi.DOMID_SELF if rng.randrange(12) else self.domid()
        if command == abi.XENMEM_exchange:
            one = struct.pack("<QQIIHxxxxxx", self.pointer(extents), self.count(many), 0, 0, who)
            two = struct.pack("<QQIIHxxxxxx", self.pointer(extents + 64), many, rng.choice((0, 0, 1)), 0, who)
            data = one + two + struct.pack("<Q", 0)
        elif command in (0, 1, 6):
            order = rng.choice((0, 0, 0, 0, 0, 1, 9, 255))
            data = struct.pack(
                "<QQIIHxxxxxx", self.pointer(extents), self.count(many), order, self.number() & 0xFFFF_FFFF, who
            )
        elif command in (7, 26):
            data = struct.pack(
                "<HHI3Q", who, self.number() & 0xFFFF, rng.randrange(6), self.frame() & ALL, self.frame() & ALL, 0
            )
        else:
            data = struct.pack("<2Q", self.count(many) & 0xFFFF_FFFF, self.pointer(extents))
        if rng.randrange(12) == 0:
            command |= self.number() << 6 & ALL
        return self._own(number, abi.HYPERVISOR_memory_op, command, data.ljust(128, b"\0") + frames)

    def grant(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12, rng.randrange(16)))
        many = rng.randrange(1, 3)
        self._grant_something()
        host = self.arena_va() if rng.randrange(3) else (self.base + self.l1) << 12 | rng.randrange(24) << 3
        ref = self.one_of(0, 1, 2, 3, 8, 9, 10, 511, 512, 0xFFFF_FFFF)
        dom = rng.choice((9, 9, 9, self.domid()))
        flags = rng.choice((2, 6, 2 | 16, 6 | 16, 1, 3, 7, rng.getrandbits(32)))
        items = b""
        for _ in range(many):
            if command == 0:
                items += struct.pack("<QIIHhIQ", host, flags, ref, dom, 0, 0, 0)
            elif command in (1, 7):
                second = self.arena_va() if command == 7 else self.one_of(0, self.frame() << 12 & ALL)
                items += struct.pack("<QQIhxx", host, second, rng.choice((0, 1, 2, 3, self.number() & 0xFFFF_FFFF)), 0)
            elif command == 2:
                items += struct.pack(
                    "<HxxIhxxxxxxQ",
                    self.domid(),
                    self.count(3) & 0xFFFF_FFFF,
                    0,
                    self.pointer(self.fuzz.image(number) + 128),
                )
            elif command == 5:
                sides = [self.frame() & ALL if rng.randrange(2) else ref for _ in range(2)]
                offsets = [rng.choice((0, 8, 4095, 4096, 65535)) for _ in range(2)]
                size = rng.choice((0, 8, 64, 4096, 65535))
                items += struct.pack(
                    "<QHHxxxxQHHxxxxHHhxx",
                    sides[0],
                    self.domid(),
                    offsets[0],
                    sides[1],
                    self.domid(),
                    offsets[1],
                    size,
                    rng.randrange(8),
                    0,
                )
            else:
                items += struct.pack(
                    "<4I", self.one_of(self.domid(), 1, 2, ref), self.one_of(ref, 2), self.number() & 0xFFFF_FFFF, 0
                )
                items += struct.pack("<2Q", self.pointer(self.fuzz.image(number) + 128), 0)
        return self._own(number, abi.HYPERVISOR_grant_table_op, command, items, self.count(many))

    def _grant_something(self) -> None:
        """Write an entry of the grant table, as the guest could itself."""
        rng, table = self.rng, self.fuzz.domain.grants.table
        at = table.frames[0] * 4096
        flags = rng.choice((1, 1, 1, 5, 5, 0, 2, 3, 1 | 8, rng.getrandbits(16)))
        who = rng.choice((9, 9, 9, self.domid()))
        ref = rng.choice((0, 1, 2, 3, 8, 9, 10))
        if table.version == 1:
            entry = struct.pack("<HHI", flags, who, self.frame() & 0xFFFF_FFFF)
        else:
            flags |= rng.choice((0, 0, 0, 256))
            entry = struct.pack("<4HQ", flags, who, rng.randrange(4100), rng.randrange(4100), self.frame() & ALL)
        at += ref * len(entry)
        self.fuzz.memory[at : at + len(entry)] = entry

    def event(self, number: int) -> Call:
        rng = self.rng
        command = rng.randrange(16) if rng.randrange(16) else self.number()
        if command in (10, 14) and rng.randrange(4):
            command = 4
        first, second = (
            self.one_of(self.port(), self.domid() | self.domid() << 16, rng.randrange(24)),
            self.one_of(self.port(), 0, 1),
        )
        data = struct.pack("<4I", first, second, self.port(), 0)
        if command in (11, 12):
            offset = rng.choice((0, 8, 64, 4096 - 72, 4096 - 8, 3))
            data = struct.pack("<Q2IQ", self.frame() & ALL, offset, rng.randrange(3), 0)
        if rng.randrange(16) == 0:
            return Call(
                abi.HYPERVISOR_event_channel_op_compat,
                (self.fuzz.image(number),),
                image=struct.pack("<I", command & 15) + data,
            )
        return self._own(number, abi.HYPERVISOR_event_channel_op, command, data)

    def multicall(self, number: int) -> Call:
        rng = self.rng
        entries = b""
        many = rng.randrange(1, 6)
        image = self.fuzz.image(number)
        for at in range(many):
            inner = rng.choice(self.makers)(number)
            no_use = inner.number in DEADLY or inner.number in (abi.HYPERVISOR_multicall, abi.HYPERVISOR_callback_op)
            if inner.kind != HYPERCALL or (no_use and rng.randrange(50)):
                inner = self.update_va(number)
            if inner.image:  # there is room for one: most read what another call left in place
                inner.arguments = tuple(image + 320 if a == image else a for a in inner.arguments)
                entries = entries.ljust(at * 64, b"\0")
            six = (*inner.arguments, 0, 0, 0, 0, 0, 0)[:6]
            entries += struct.pack("<8Q", inner.number, 0, *(a & ALL for a in six))
        tail = self.mmu_update(number).image
        # What lies behind the last entry reads as set_trap_table(NULL).
        count = many if rng.randrange(60) else rng.choice((0, 1, many + 1))
        return Call(
            abi.HYPERVISOR_multicall,
            (self.pointer(image) if not rng.randrange(20) else image, count),
            image=entries.ljust(320, b"\0") + tail,
        )

    def descriptor_tables(self, number: int) -> Call:
        rng = self.rng
        if rng.randrange(2):
            many = rng.randrange(3)
            frames = b"".join(struct.pack("<Q", self.frame() & ALL) for _ in range(many))
            entries = self.count(512 * many)
            return Call(abi.HYPERVISOR_set_gdt, (self.pointer(self.fuzz.image(number)), entries), image=frames)
        address = (self.frame() << 12 | rng.randrange(512) << 3) & ALL
        return Call(abi.HYPERVISOR_update_descriptor, (address, rng.choice((*DESCRIPTORS, rng.getrandbits(64)))))

    def vcpu(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((1, 3, 4, 5, 6, 7, 8, 9, 10, 13, 13, rng.randrange(16)))
        who = rng.choice((0, 0, 0, 1, 1, 2, 31, 32, ALL))
        if command in (abi.VCPUOP_up, abi.VCPUOP_down, abi.VCPUOP_initialise) and (self.calm or rng.randrange(4)):
            who = 1
        data = struct.pack("<2Q", self.number(), rng.randrange(4))
        if command == abi.VCPUOP_register_vcpu_info:
            info = self.base + ((self.fuzz.where["info"] - VIRT_BASE) >> 12)
            frame, offset = (
                (info, who * 64 & 64)
                if rng.randrange(3)
                else (self.frame() & ALL, rng.choice((0, 64, 4032, 4040, self.number() & 0xFFFF_FFFF)))
            )
            data = struct.pack("<QI4x", frame, offset)
        elif command in (abi.VCPUOP_register_runstate_memory_area, abi.VCPUOP_register_vcpu_time_memory_area):
            area = rng.choice(
                (
                    self.arena_va() + rng.choice((0, 8, 4000, 4090)),
                    rng.choice(BAD_POINTERS),
                    self.fuzz.where["edge"] - 8,
                )
            )
            data = struct.pack("<2Q", area & ALL, 0)
        elif command == abi.VCPUOP_set_periodic_timer:
            data = struct.pack("<2Q", self.one_of(0, 1, 999_999, 1_000_000, 5_000_000, (1 << 62) - 1, 1 << 62, ALL), 0)
        if command == abi.VCPUOP_initialise and rng.randrange(2):
            return Call(abi.HYPERVISOR_vcpu_op, (command, who, self._context()))
        return Call(abi.HYPERVISOR_vcpu_op, (command, who, self.pointer(self.fuzz.image(number))), image=data)

    def _context(self) -> int:
        """Write a `struct vcpu_guest_context` for a second vCPU, with a fault in it now and then; its address."""
        rng, where = self.rng, self.fuzz.where
        data = bytearray(abi.SIZEOF_VCPU_GUEST_CONTEXT)

        def put(offset: int, value: int) -> None:
            struct.pack_into("<Q", data, offset, value & ALL)

        put(abi.VCPU_GUEST_CONTEXT_FLAGS, 4 | 1)
        regs = abi.VCPU_GUEST_CONTEXT_USER_REGS
        put(regs + abi.CPU_USER_REGS_RIP, where["spin"])
        put(regs + abi.CPU_USER_REGS_RSP, where["spin_stack"])
        put(regs + abi.CPU_USER_REGS_RFLAGS, 0x202)
        struct.pack_into("<H", data, regs + abi.CPU_USER_REGS_CS, 0xE033)
        struct.pack_into("<H", data, regs + abi.CPU_USER_REGS_SS, 0xE02B)
        put(abi.VCPU_GUEST_CONTEXT_CTRLREG + 24, self.fuzz.boot.l4_mfn << 12)
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            at = rng.randrange(0, len(data) - 8, 8)
            put(at, self.one_of(self.frame(), self.number(), self.frame() << 12))
        big = self.fuzz.big
        self.fuzz.memory[big - VIRT_BASE : big - VIRT_BASE + len(data)] = bytes(data)
        return big

    def information(self, number: int) -> Call:
        rng = self.rng
        what = rng.randrange(8)
        if what < 3:
            return self._own(
                number, abi.HYPERVISOR_xen_version, rng.randrange(14), struct.pack("<2I", rng.randrange(3), 0)
            )
        if what == 3:
            return Call(
                abi.HYPERVISOR_console_io,
                (rng.randrange(3), self.count(16), self.pointer(self.fuzz.image(number))),
                image=b"text" * 8,
            )
        if what == 4:
            return self._own(
                number,
                abi.HYPERVISOR_physdev_op,
                rng.choice((4, 5, 6, 7, 8, rng.randrange(32))),
                struct.pack("<2Q", self.number(), 8),
            )
        if what == 5:
            return Call(abi.HYPERVISOR_vm_assist, (rng.randrange(3), rng.choice((0, 1, 2, 3, 4, 5, 32, 63, ALL))))
        if what == 6:
            return Call(
                rng.choice((7, 27, 31, 34, 35, 36, 37, 38, 39, 40, 41, 48, 63, 64, ALL)),
                (self.number(), self.fuzz.image(number)),
            )
        return self._own(number, abi.HYPERVISOR_nmi_op, rng.randrange(3), b"")

    def sched(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((0, 0, 3, 3, 3, 4, 6, rng.randrange(9) if not self.calm else 0))
        if command in (1, 2) and rng.randrange(16):
            command = 3
        image = self.fuzz.image(number)
        timeout = rng.choice((1, 1, 1, ALL, 1 << 63, rng.getrandbits(50)))
        data = struct.pack("<QI4xQ", self.pointer(image + 64), self.count(2) & 0xFFFF_FFFF, timeout).ljust(64, b"\0")
        data += struct.pack("<2I", self.port(), self.port())
        if command == 4:
            data = struct.pack("<2I", self.domid(), 0)
        if rng.randrange(4) == 0:
            return Call(abi.HYPERVISOR_set_timer_op, (self.number(),))
        return self._own(number, abi.HYPERVISOR_sched_op, command, data)

    def processor(self, number: int) -> Call:
        rng = self.rng
        what = rng.randrange(8)
        image = self.fuzz.image(number)
        address = self.one_of(self.fuzz.where["recover"], rng.choice(BAD_POINTERS), self.arena_va())
        if what == 0:
            return Call(abi.HYPERVISOR_set_segment_base, (rng.randrange(5), self.one_of(address, self.number())))
        if what == 1:
            return Call(abi.HYPERVISOR_set_debugreg, (rng.randrange(9), self.one_of(address, self.number(), 0x400)))
        if what == 2:
            return Call(abi.HYPERVISOR_get_debugreg, (self.number(),))
        if what == 3:
            return Call(abi.HYPERVISOR_fpu_taskswitch, (self.number(),))
        if what == 4:
            traps = b"".join(
                struct.pack("<BBH4xQ", rng.randrange(32, 256), rng.randrange(8), 0xE033, self.fuzz.where["recover"])
                for _ in range(3)
            )
            return Call(abi.HYPERVISOR_set_trap_table, (image,), image=traps)
        if what == 5 and not self.calm:
            return self._own(
                number,
                abi.HYPERVISOR_callback_op,
                rng.randrange(3),
                struct.pack("<HHxxxxQ", rng.choice((1, 2, 3, 4, 5, 7, 9)), rng.randrange(3), address),
            )
        if what == 6:
            flags = 0x202 | rng.choice((0, 0, 0x100, 0x400, 0x3000, 0x20000, 0x4000, 0x40000, rng.getrandbits(22)))
            cs = rng.choice((0xE033, 0xE030, 0xE030, 0xE030, 0xE023, 0xE02B, 0, 7, 0xB, rng.getrandbits(16)))
            if cs & 3 == 3 and not self.fuzz.domain.running.state.user_cr3 and rng.randrange(16):
                cs = 0xE030
            ss = rng.choice((0xE02B, 0xE02B, 0, 0xE033, rng.getrandbits(16)))
            frame = struct.pack(
                "<9Q",
                0,
                0,
                0,
                rng.choice((0, 0, 256)),
                self.fuzz.where["recover"] if rng.randrange(4) else address,
                cs,
                flags,
                self.fuzz.iret_stack,
                ss,
            )
            return Call(0, (image,), kind=IRET, image=frame)
        if self.calm or (not self.fuzz.domain.running.state.user_cr3 and rng.randrange(30)):
            return Call(abi.HYPERVISOR_stack_switch, (0xE02B, self.fuzz.trap_stack))
        return Call(0, (address, self.fuzz.iret_stack), kind=USER)

    def access(self, _number: int) -> Call:
        rng = self.rng
        what = rng.choice((WRITE8, WRITE8, WRITE4, WRITE1, EXCHANGE, COMPARE_EXCHANGE, OR8, AND8, FILL, TOUCH))
        l1 = VIRT_BASE + (self.l1 << 12) + rng.randrange(24) * 8
        at = self.one_of(l1, l1, l1, self.arena_va() + rng.randrange(8) * 8, l1 + rng.randrange(8), l1 + 4096)
        if what == TOUCH:
            first = self.arena_va()
            return Call(
                0, (first, first + (rng.randrange(1, 9) << 12), rng.randrange(512) * 8, self.number()), kind=TOUCH
            )
        third = rng.randrange(8) if what == FILL else self.entry()
        return Call(0, (at, self.entry(), third), kind=what)

    def raw(self, number: int) -> Call:
        rng = self.rng
        op = rng.choice(
            [n for n in range(64) if n != abi.HYPERVISOR_iret and (n not in DEADLY or not rng.randrange(30))]
        )
        image = self.fuzz.image(number)
        arguments = tuple(
            rng.choice((self.number(), image, self.frame() & ALL, self.pointer(image), self.entry())) & ALL
            for _ in range(6)
        )
        if op == abi.HYPERVISOR_multicall:
            arguments = (image, rng.randrange(3), *arguments[2:])
        return Call(op, arguments, image=rng.getrandbits(512).to_bytes(64, "little"))

    def values(self) -> list[int]:
        """64 values for raw mode."""
        makers = (
            lambda: self.frame() & ALL,
            lambda: self.frame() << 12 & ALL,
            self.entry,
            self.arena_va,
            lambda: self.pointer(self.fuzz.big),
            lambda: self.fuzz.big,
            self.domid,
        )
        return [self.rng.choice(makers)() & ALL for _ in range(64)]
