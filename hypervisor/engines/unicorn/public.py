"""Registers through the library's documented API alone: slow, but valid for any build.

What the API does not offer is worked out:

* the error code of an exception, from the page tables and the instruction;
* ``old_exception`` cannot be reset, so after each exception the state saved
  before the first one is restored and the registers written back over it;
* hidden segment state cannot be set, so only flat 64-bit code segments are
  possible; selectors are kept here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypervisor.engines import x86
from hypervisor.engines.base import EngineError
from hypervisor.engines.unicorn.library import GPR_NAMES, uc_x86, unicorn

_GPR_IDS = [getattr(uc_x86, f"UC_X86_REG_{name}") for name in GPR_NAMES]
_WORDS = 16 + 6 + 1 + 6 + 4
_XMM_IDS = [getattr(uc_x86, f"UC_X86_REG_XMM{i}") for i in range(16)]
_FP_IDS = [getattr(uc_x86, f"UC_X86_REG_FP{i}") for i in range(8)]
_FP_CONTROL_IDS = [uc_x86.UC_X86_REG_FPCW, uc_x86.UC_X86_REG_FPSW, uc_x86.UC_X86_REG_FPTAG, uc_x86.UC_X86_REG_MXCSR]


class _Gpr:
    """The general registers as a sequence."""

    __slots__ = ("_uc",)

    def __init__(self, uc: Any) -> None:
        self._uc = uc

    def __getitem__(self, index: int) -> int:
        return int(self._uc.reg_read(_GPR_IDS[index]))

    def __setitem__(self, index: int, value: int) -> None:
        self._uc.reg_write(_GPR_IDS[index], value)

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(16))


def _register(identifier: int) -> property:
    def get(self: PublicRegisters) -> int:
        return int(self._uc.reg_read(identifier))

    def put(self: PublicRegisters, value: int) -> None:
        self._uc.reg_write(identifier, value)

    return property(get, put)


def _selector(index: int) -> property:
    def get(self: PublicRegisters) -> int:
        return self._selectors[index]

    def put(self: PublicRegisters, value: int) -> None:
        self._selectors[index] = value & 0xFFFF

    return property(get, put)


class PublicRegisters:
    """`hypervisor.engines.base.Registers` over `reg_read` and `reg_write`."""

    def __init__(self, uc: Any) -> None:
        self._uc = uc
        self.gpr: Any = _Gpr(uc)
        self._selectors = [0, 0xE033, 0xE02B, 0, 0, 0]
        self._clean: Any = None

    rip = _register(uc_x86.UC_X86_REG_RIP)
    cr2 = _register(uc_x86.UC_X86_REG_CR2)
    cr3 = _register(uc_x86.UC_X86_REG_CR3)
    fs_base = _register(uc_x86.UC_X86_REG_FS_BASE)
    gs_base = _register(uc_x86.UC_X86_REG_GS_BASE)
    es = _selector(x86.ES)
    cs = _selector(x86.CS)
    ss = _selector(x86.SS)
    ds = _selector(x86.DS)
    fs = _selector(x86.FS)
    gs = _selector(x86.GS)
    long_mode_code = True

    @property
    def rflags(self) -> int:
        return int(self._uc.reg_read(uc_x86.UC_X86_REG_EFLAGS)) & 0xFFFF_FFFF

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._uc.reg_write(uc_x86.UC_X86_REG_EFLAGS, value | 2)

    def clear_flags(self, mask: int) -> None:
        self.rflags &= ~mask

    @property
    def single_step(self) -> bool:
        return bool(self.rflags & x86.FLAG_TF)

    @property
    def task_switched(self) -> bool:
        return bool(self._uc.reg_read(uc_x86.UC_X86_REG_CR0) & x86.CR0_TS)

    @task_switched.setter
    def task_switched(self, on: bool) -> None:
        cr0 = self._uc.reg_read(uc_x86.UC_X86_REG_CR0)
        self._uc.reg_write(uc_x86.UC_X86_REG_CR0, cr0 | x86.CR0_TS if on else cr0 & ~x86.CR0_TS)

    def load_flat64(self, cs: int, ss: int) -> None:
        self._selectors[x86.CS], self._selectors[x86.SS] = cs, ss

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        if index == x86.CS and not descriptor & x86.DESC_L:
            raise EngineError("32-bit code needs the private path, whose self-check failed (see `reeve doctor`)")
        self._selectors[index] = selector
        if index in (x86.FS, x86.GS) and descriptor:
            base = x86.desc_base(descriptor)
            if index == x86.FS:
                self.fs_base = base
            else:
                self.gs_base = base

    def segment_base(self, index: int) -> int:
        """Base of the segment that register `index` names; with 64-bit code only FS and GS have one."""
        return int({x86.FS: self.fs_base, x86.GS: self.gs_base}.get(index, 0))

    # -- exceptions

    def remember_clean(self) -> None:
        """Take the state that `forget_exception` returns to: no exception was ever raised in it."""
        self._clean = self._uc.context_save()

    def forget_exception(self) -> None:
        state = self.save()
        self._uc.context_restore(self._clean)
        self.restore(state)

    def classify(
        self, vector: int, walk: Callable[[int], tuple[int, int]], peek: Callable[[int], int]
    ) -> tuple[int, bool]:
        """(error code, software) of exception `vector`, worked out.

        A #PF on an absent page is reported as a read: a guest that only handles the read faults again on the now
        present page, and that fault is unambiguous.
        """
        rip = self.rip
        before = (peek(rip - 2), peek(rip - 1))
        if vector not in (x86.PF, x86.GP, x86.DE, x86.UD, x86.NM) and (
            before == (0xCD, vector) or (vector == 3 and before[1] == 0xCC)
        ):
            return 0, True
        if vector == x86.PF:
            cr2 = self.cr2
            entry, _ = walk(cr2)
            fetch = cr2 == rip or (rip <= cr2 < rip + 15 and cr2 & 0xFFF == 0)
            if not entry:
                return x86.PF_USER | (x86.PF_FETCH if fetch else 0), False
            if fetch and entry & x86.PTE_NX:
                return x86.PF_USER | x86.PF_PRESENT | x86.PF_FETCH, False
            return x86.PF_USER | x86.PF_PRESENT | (0 if entry & x86.PTE_RW else x86.PF_WRITE), False
        if before[0] == 0xCD and before[1] == vector:
            return 0, True
        return 0, False

    # -- identification, whole state

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """Run CPUID on a second engine of the same model."""
        scratch = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        scratch.ctl_set_cpu_model(self._uc.ctl_get_cpu_model())
        scratch.mem_map(0x1000, 0x1000)
        scratch.mem_write(0x1000, b"\x0f\xa2\x90")
        scratch.reg_write(uc_x86.UC_X86_REG_RAX, leaf)
        scratch.reg_write(uc_x86.UC_X86_REG_RCX, subleaf)
        scratch.emu_start(0x1000, 0x1002)
        a, b, c, d = (
            int(scratch.reg_read(r)) & 0xFFFF_FFFF
            for r in (uc_x86.UC_X86_REG_RAX, uc_x86.UC_X86_REG_RBX, uc_x86.UC_X86_REG_RCX, uc_x86.UC_X86_REG_RDX)
        )
        return a, b, c, d

    def save(self) -> bytes:
        read = self._uc.reg_read
        words = [*self.gpr, self.rip, self.rflags, self.cr2, self.cr3, self.fs_base, self.gs_base]
        words += [int(self.task_switched), *self._selectors]
        words += [int(read(i)) for i in _FP_CONTROL_IDS]
        data = struct.pack(f"<{len(words)}Q", *words)
        for identifier in _XMM_IDS:
            data += int(read(identifier)).to_bytes(16, "little")
        for identifier in _FP_IDS:
            mantissa, exponent = read(identifier)
            data += struct.pack("<QH", mantissa, exponent)
        return data

    def checked(self, state: bytes) -> bytes:
        """What `save` gave on another host, if it is of the right length: the library takes any value of a register."""
        if len(state) != 8 * _WORDS + 16 * len(_XMM_IDS) + 10 * len(_FP_IDS):
            raise ValueError(f"registers of {len(state)} bytes: another build's")
        return state

    def restore(self, state: bytes) -> None:
        write = self._uc.reg_write
        count = _WORDS
        words = struct.unpack_from(f"<{count}Q", state)
        at = 8 * count
        write(uc_x86.UC_X86_REG_CR3, words[19])
        for i in range(16):
            self.gpr[i] = words[i]
        self.rip, self.rflags, self.cr2 = words[16], words[17], words[18]
        self.fs_base, self.gs_base = words[20], words[21]
        self.task_switched = bool(words[22])
        self._selectors = list(words[23:29])
        for identifier, value in zip(_FP_CONTROL_IDS, words[29:33], strict=True):
            write(identifier, value)
        for identifier in _XMM_IDS:
            write(identifier, int.from_bytes(state[at : at + 16], "little"))
            at += 16
        for identifier in _FP_IDS:
            write(identifier, struct.unpack_from("<QH", state, at))
            at += 10
