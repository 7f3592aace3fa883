"""Calls that change page tables, reservations and grants."""

from __future__ import annotations

import struct

from fuzz_machine import Call
from fuzz_values import ALL, RO, Values

from hypervisor import abi


class MemoryCalls(Values):
    """See the module."""

    def mmu_update(self, number: int) -> Call:
        rng = self.rng
        requests = b""
        many = rng.randrange(1, 5)
        for _ in range(many):
            command = rng.choice((0, 0, 0, 0, 2, 2, 1, 3, rng.randrange(8)))
            slot = rng.choice((0, 1, 2, 3, 4, 8, 255, 256, 260, 271, 272, 511))
            where, entry = self.frame(), self.entry()
            if rng.randrange(8) == 0:  # a linear entry: a table shows itself or another of its level, read-only
                where = self.base + rng.choice(self.tables)
                entry = (where if rng.randrange(2) else self.frame()) << 12 | RO
            requests += struct.pack("<2Q", (where << 12 | slot << 3 | command) & ALL, entry & ALL)
        image = self.fuzz.image(number)
        done = self.pointer(image + 256) if rng.randrange(3) == 0 else 0
        who = abi.DOMID_SELF if rng.randrange(8) else self.domid() | rng.choice((0, self.domid() << 16))
        return Call(abi.HYPERVISOR_mmu_update, (self.pointer(image), self.count(many), done, who), image=requests)

    def update_va(self, _number: int) -> Call:
        rng = self.rng
        va = self.arena_va() if rng.randrange(12) else rng.choice((*self.BAD_POINTERS, self.fuzz.where["edge"]))
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
