"""Writable page tables: a guest's write to its L1 table, by emulating the instruction.

A guest sees its page tables read-only but may write them as if they were not:
the fault brings the instruction here, its result passes validation, and the
guest goes on behind it (xen/arch/x86/pv/ro-page-fault.c). Whatever is not a
plain write to a live L1 table stays a page fault of the guest's.
"""

from __future__ import annotations

from typing import Any

from hypervisor.cpu import alu
from hypervisor.cpu.decode import RIP, DecodeError, Instruction, decode
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.memory.frames import L1
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.pagetables import PageTables

_BYTE_FORMS = frozenset((0x88, 0xA2, 0xC6, 0x86, 0x0FB0, 0x0FC0, 0x80, 0xF6, 0xFE, 0xAA, *range(0x00, 0x40, 8)))
_ALU_NAMES = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")


class PageTableWrites:
    """Emulator for one domain.

    :param regs: the engine's registers.
    """

    __slots__ = ("_guest", "_regs", "_tables")

    def __init__(self, regs: Any, guest: GuestAccess, tables: PageTables) -> None:
        self._regs = regs
        self._guest = guest
        self._tables = tables

    def emulate(self, va: int) -> bool:
        """Handle a write fault at `va` from the guest kernel; False: it is not ours, inject it."""
        target = self._guest.translate(va)
        if target < 0:
            return False
        index = target >> 12
        frames = self._tables.frames
        if frames.kind[index] != L1 or not frames.count[index]:
            return False
        try:
            instruction = decode(self._fetch, self._regs.long_mode_code)
            if not va & 0xFFF and self._address(instruction) != va:
                return False  # begins on the page before: the fault names where this one starts
            return self._execute(instruction, target)
        except (DecodeError, XenError):
            return False

    def _address(self, ins: Instruction) -> int:
        """Where the memory operand begins, -1: not computed."""
        regs = self._regs
        gpr, operand = regs.gpr, ins.operand
        if ins.opcode in (0xAA, 0xAB):
            return int(gpr[x86.RDI])
        if operand is None or not ins.plain:
            return -1
        address = operand.displacement
        if operand.base == RIP:
            address += regs.rip + ins.length
        elif operand.base >= 0:
            address += gpr[operand.base]
        if operand.index >= 0:
            address += gpr[operand.index] << operand.scale
        return int(address) & x86.MASK64

    def _fetch(self, at: int) -> int:
        offset = self._guest.translate((self._regs.rip + at) & x86.MASK64)
        return self._tables.memory.bytes[offset] if offset >= 0 else -1

    def _execute(self, ins: Instruction, target: int) -> bool:
        if ins.mod == 3:
            return False
        size = 1 if ins.opcode in _BYTE_FORMS else ins.size
        if ins.opcode == 0x0FC7:
            return self._compare_exchange_wide(ins, target)
        if (target & 7) + size > 8:
            return False
        word = target >> 3
        shift = (target & 7) * 8
        mask = ((1 << size * 8) - 1) << shift
        old_word = self._tables.words[word]
        old = (old_word & mask) >> shift
        done = self._compute(ins, old, size)
        if done is None:
            return False
        new, finish = done
        if new is not None:
            self._store_part(word, (old_word & ~mask) | (new << shift) & mask, target, size)
        finish()
        regs = self._regs
        if not (ins.repeat and ins.opcode in (0xAA, 0xAB)) or self._string_done(size):
            regs.rip = (regs.rip + ins.length) & x86.MASK64
        return True

    def _store(self, word: int, value: int) -> None:
        self._tables.update_l1(word, value)

    def _store_part(self, word: int, value: int, _target: int, _size: int) -> None:
        """Store an entry of which the guest wrote `_size` bytes at byte `_target`."""
        self._tables.update_l1(word, value)

    def _string_done(self, size: int) -> bool:
        """Advance a `rep stos` by one element; True when it was the last."""
        gpr = self._regs.gpr
        gpr[x86.RDI] = (gpr[x86.RDI] + (-size if self._regs.rflags & x86.FLAG_DF else size)) & x86.MASK64
        gpr[x86.RCX] = (gpr[x86.RCX] - 1) & x86.MASK64
        return bool(gpr[x86.RCX] == 0)

    def _register(self, number: int, size: int, rex: int) -> int:
        gpr = self._regs.gpr
        if size == 1 and not rex and 4 <= number < 8:
            return int(gpr[number - 4] >> 8) & 0xFF
        return int(gpr[number]) & ((1 << size * 8) - 1)

    def _set_register(self, number: int, size: int, rex: int, value: int) -> None:
        gpr = self._regs.gpr
        if size == 8:
            gpr[number] = value
        elif size == 4:
            gpr[number] = value & x86.MASK32
        elif size == 2:
            gpr[number] = (gpr[number] & ~0xFFFF) | value & 0xFFFF
        elif not rex and 4 <= number < 8:
            gpr[number - 4] = (gpr[number - 4] & ~0xFF00) | (value & 0xFF) << 8
        else:
            gpr[number] = (gpr[number] & ~0xFF) | value & 0xFF

    def _compute(self, ins: Instruction, old: int, size: int) -> tuple[int | None, Any] | None:
        """(value to store or None, what to do after a successful store)."""
        op = ins.opcode
        mask = (1 << size * 8) - 1

        def nothing() -> None: ...

        if op in (0x88, 0x89):
            return self._register(ins.reg, size, ins.rex), nothing
        if op in (0xA2, 0xA3):
            return self._register(x86.RAX, size, 1), nothing
        if op in (0xC6, 0xC7):
            return (ins.immediate & mask, nothing) if ins.reg & 7 == 0 else None
        if op in (0xAA, 0xAB):
            return self._register(x86.RAX, size, 1), nothing if ins.repeat else lambda: self._string_done_once(size)
        if op in (0x86, 0x87):
            new = self._register(ins.reg, size, ins.rex)
            return new, lambda: self._set_register(ins.reg, size, ins.rex, old)
        if op in (0x0FB0, 0x0FB1):
            return self._compare_exchange(ins, old, size)
        if op in (0x0FC0, 0x0FC1):
            new, flags = alu.compute("add", old, self._register(ins.reg, size, ins.rex), size, 0)

            def exchange_add() -> None:
                self._set_register(ins.reg, size, ins.rex, old)
                self._set_flags(flags)

            return new, exchange_add
        if op in (0x0FBA, 0x0FAB, 0x0FB3, 0x0FBB):
            return self._bit(ins, old, size)
        return self._arithmetic(ins, old, size)

    def _string_done_once(self, size: int) -> None:
        gpr = self._regs.gpr
        gpr[x86.RDI] = (gpr[x86.RDI] + (-size if self._regs.rflags & x86.FLAG_DF else size)) & x86.MASK64

    def _set_flags(self, flags: int) -> None:
        regs = self._regs
        regs.rflags = (regs.rflags & ~alu.FLAGS) | flags

    def _arithmetic(self, ins: Instruction, old: int, size: int) -> tuple[int | None, Any] | None:
        op = ins.opcode
        mask = (1 << size * 8) - 1
        carry = self._regs.rflags & x86.FLAG_CF
        if op < 0x40 and op & 7 < 2:
            name, source = _ALU_NAMES[op >> 3], self._register(ins.reg, size, ins.rex)
        elif op in (0x80, 0x81, 0x83):
            name, source = _ALU_NAMES[ins.reg & 7], ins.immediate & mask
        elif op in (0xFE, 0xFF) and ins.reg & 7 < 2:
            new, flags = alu.compute("add" if ins.reg & 7 == 0 else "sub", old, 1, size, 0)
            flags = (flags & ~x86.FLAG_CF) | carry
            return new, lambda: self._set_flags(flags)
        elif op in (0xF6, 0xF7) and ins.reg & 7 == 2:
            return ~old & mask, lambda: None
        elif op in (0xF6, 0xF7) and ins.reg & 7 == 3:
            new, flags = alu.compute("sub", 0, old, size, 0)
            return new, lambda: self._set_flags(flags)
        else:
            return None
        new, flags = alu.compute(name, old, source, size, carry)
        return (None if name == "cmp" else new), lambda: self._set_flags(flags)

    def _bit(self, ins: Instruction, old: int, size: int) -> tuple[int | None, Any] | None:
        if ins.opcode == 0x0FBA:
            action, number = ins.reg & 7, ins.immediate
        else:
            action = {0x0FAB: 5, 0x0FB3: 6, 0x0FBB: 7}[ins.opcode]
            number = self._register(ins.reg, size, ins.rex)
        if action < 4:
            return None
        bit = 1 << (number & (size * 8 - 1))
        carry = x86.FLAG_CF if old & bit else 0
        new = (None, old | bit, old & ~bit, old ^ bit)[action - 4]

        def set_carry() -> None:
            regs = self._regs
            regs.rflags = (regs.rflags & ~x86.FLAG_CF) | carry

        return new, set_carry

    def _compare_exchange(self, ins: Instruction, old: int, size: int) -> tuple[int | None, Any]:
        expected = self._register(x86.RAX, size, 1)
        _, flags = alu.compute("sub", expected, old, size, 0)
        if expected == old:
            return self._register(ins.reg, size, ins.rex), lambda: self._set_flags(flags)

        def refuse() -> None:
            self._set_register(x86.RAX, size, 1, old)
            self._set_flags(flags)

        return None, refuse

    def _compare_exchange_wide(self, ins: Instruction, target: int) -> bool:
        """cmpxchg8b on one entry; cmpxchg16b on two is taken only when one of them changes."""
        if ins.reg & 7 != 1 or target & (15 if ins.rex & 8 else 7):
            return False
        regs = self._regs
        gpr = regs.gpr
        words, word = self._tables.words, target >> 3
        if ins.rex & 8:
            old = (words[word], words[word + 1])
            matches = old == (gpr[x86.RAX], gpr[x86.RDX])
            if matches:
                self._store(word, gpr[x86.RBX])
                try:
                    self._store(word + 1, gpr[x86.RCX])
                except XenError:
                    self._store(word, old[0])
                    raise
            else:
                gpr[x86.RAX], gpr[x86.RDX] = old
        else:
            whole = words[word]
            matches = whole == gpr[x86.RAX] & x86.MASK32 | (gpr[x86.RDX] & x86.MASK32) << 32
            if matches:
                self._store(word, gpr[x86.RBX] & x86.MASK32 | (gpr[x86.RCX] & x86.MASK32) << 32)
            else:
                gpr[x86.RAX], gpr[x86.RDX] = whole & x86.MASK32, whole >> 32
        regs.rflags = regs.rflags | x86.FLAG_ZF if matches else regs.rflags & ~x86.FLAG_ZF
        regs.rip = (regs.rip + ins.length) & x86.MASK64
        return True
