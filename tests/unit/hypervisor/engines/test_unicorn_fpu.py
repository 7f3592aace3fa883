"""The floating-point state in the processor's own form, against what the engine's own FXSAVE stores."""

from __future__ import annotations

import struct

import pytest
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import UC_CPU_X86_WESTMERE, UC_X86_REG_CR4

from hypervisor.engines.unicorn.fpu import SIZE, FloatingPoint

BASE, AREA = 0x1000, 0x2000


class Scratch(FloatingPoint):
    """An engine in flat 64-bit mode that runs a few instructions at a time."""

    def __init__(self) -> None:
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.ctl_set_cpu_model(UC_CPU_X86_WESTMERE)
        self._uc.mem_map(BASE, 0x3000)
        self._uc.reg_write(UC_X86_REG_CR4, self._uc.reg_read(UC_X86_REG_CR4) | 0x600)  # OSFXSR, OSXMMEXCPT
        self._next = BASE

    def run(self, code: str) -> None:
        data = bytes.fromhex(code)
        self._uc.mem_write(self._next, data)
        self._uc.emu_start(self._next, self._next + len(data))
        self._next += len(data) + 16

    def fxsave(self) -> bytes:
        self.run("480fae042500200000")  # fxsave64 [0x2000]
        return bytes(self._uc.mem_read(AREA, SIZE))


def used() -> Scratch:
    """fninit; fld1; fldpi; fldcw of 0x27f; mxcsr 0x3f80; xmm15 = 5"""
    scratch = Scratch()
    scratch._uc.mem_write(AREA, struct.pack("<II", 0x27F, 0x3F80))
    scratch.run("dbe3 d9e8 d9eb d92c2500200000 0fae142504200000 b805000000 66440f6ef8")
    return scratch


def essence(image: bytes) -> tuple[bytes, ...]:
    """Control, status and tag words, MXCSR, and the registers; not where the last instruction was."""
    return image[:5], image[24:28], *(image[at : at + 10] for at in range(32, 160, 16)), image[160:416]


def test_it_is_what_fxsave_stores() -> None:
    scratch = used()
    assert essence(scratch.save_fpu()) == essence(scratch.fxsave())


def test_there_and_back() -> None:
    image = used().save_fpu()
    other = Scratch()
    other.load_fpu(image)
    assert other.save_fpu() == image
    assert essence(other.fxsave()) == essence(image)
    other.run("dec1")  # faddp: pi + 1
    assert other.save_fpu()[32:42] != image[32:42] and other.save_fpu()[4].bit_count() == 1


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not 512"):
        Scratch().load_fpu(bytes(511))
