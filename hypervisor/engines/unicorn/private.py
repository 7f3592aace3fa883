"""Unicorn's private memory layout, believed only after it was verified.

Reading a register through the library's API costs 3.7 µs, through memory
0.1 µs. The addresses below belong to one build (2.1.4, x86-64 Linux), so
`verify` checks each one against the library actually loaded, on a scratch
engine that runs a few instructions whose effect is known. If anything differs
the engine uses the public API alone (`public.PublicRegisters`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import struct
from typing import Any

from hypervisor.engines.unicorn.library import GPR_NAMES, uc_x86, unicorn
from hypervisor.engines.unicorn.ports import HOOKS, PortFaults
from hypervisor.engines.unicorn.tlbcheck import why_not

LIBRARY_PATH = os.path.join(os.path.dirname(unicorn.__file__), "lib", "libunicorn.so.2")

# The library knows AMD's SVM intercepts; they work without SVM, too, as long as nothing looks at a VMCB.
HF_GUEST = 1 << 21  # of hflags: intercepts are looked at
INTERCEPT_CPUID, INTERCEPT_PAUSE = (
    1 << 18,
    1 << 23,
)  # SVM_EXIT_CPUID (0x72) and _PAUSE (0x77), counted from _INTR (0x60)
EXIT_CPUID, EXIT_PAUSE = 0x172, 0x177  # EXCP_VMEXIT + SVM_EXIT_…: what the hook of exceptions is called with

REQUIRED_SYMBOLS = (
    "tlb_flush_x86_64",
    "tlb_flush_page_x86_64",
    "cpu_x86_update_cr3_x86_64",
    "helper_read_eflags_x86_64",
    "tb_invalidate_phys_range_x86_64",
    "cpu_x86_cpuid_x86_64",
    "raise_exception_err_x86_64",
    "tlb_init_x86_64",
    "tlb_vaddr_to_host_x86_64",
    "tlb_reset_dirty_x86_64",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets. ``uc_*`` in uc_struct, ``cpu_*`` in CPUState, ``env_*`` in CPUX86State."""

    uc_cpu: int = 440
    uc_no_exit_request: int = 2034
    cpu_env: int = 296
    env_regs: int = 0
    env_eip: int = 128
    env_eflags: int = 136
    env_cc_src: int = 152
    env_cc_op: int = 168
    env_df: int = 172
    env_hflags: int = 176
    env_segs: int = 184  # selector, base, limit, flags: 24 bytes each, six of them, then LDT, TR, GDT, IDT
    env_cr: int = 424
    env_fpstt: int = 604
    env_error_code: int = 5384
    env_is_int: int = 5388
    env_breakpoints: int = 5464  # four pointers of the library's own
    env_old_exception: int = 5496
    env_intercept: int = 5520
    env_size: int = 5568  # what a context switch must copy
    tlb_before_env: int = 2192  # cached translations lie before the registers
    tlb_size: int = 2176


@dataclasses.dataclass(frozen=True, slots=True)
class SelfCheck:
    """What `verify` found: a usable layout, or why there is none."""

    layout: Layout | None
    reason: str
    version: str


class _Mismatch(Exception):
    pass


def readable(address: int, size: int) -> bytes:
    """Memory of this process, at most `size` bytes: fewer where it ends before, none where there is none."""
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(fd, size, address)
    except (OSError, OverflowError):
        return b""
    finally:
        os.close(fd)


def safe_read(address: int, size: int) -> bytes:
    """Memory of this process, or `_Mismatch` where a plain read would crash."""
    data = readable(address, size)
    if len(data) != size:
        raise _Mismatch(f"no {size} bytes of memory at {address:#x}")
    return data


def _u64(address: int) -> int:
    return int(struct.unpack("<Q", safe_read(address, 8))[0])


def _u32(address: int) -> int:
    return int(struct.unpack("<I", safe_read(address, 4))[0])


def handle_of(uc: Any) -> int:
    """Address of the library's uc_struct behind a Python ``Uc``."""
    handle = uc._uch
    return int(handle.value if hasattr(handle, "value") else handle)


def _expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise _Mismatch(f"{what} is {found:#x}, expected {wanted:#x}")


_CODE = 0x1000
_DATA = 0x3000
_SIZE = 0x4000


class _Scratch:
    """A small engine in flat 64-bit mode without paging; code at 0x1000, data at 0x3000 of its memory."""

    def __init__(self, base: int = 0) -> None:
        self.memory = mmap.mmap(-1, _SIZE)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.base = base
        self.next_code = _CODE
        self.uc.mem_map_ptr(base, _SIZE, unicorn.UC_PROT_ALL, ctypes.addressof(self.anchor))
        self.uc.reg_write(uc_x86.UC_X86_REG_RSP, base + _SIZE - 64)

    def code(self, data: bytes) -> int:
        """Place code at a fresh address: the library would not see that old code changed."""
        at = self.next_code
        self.memory[at : at + len(data)] = data
        self.next_code += (len(data) + 63) & ~63
        return self.base + at

    def close(self) -> None:
        # The library refers to the memory: it must go first.
        del self.uc
        del self.anchor
        self.memory.close()


def _check_registers(scratch: _Scratch, layout: Layout) -> tuple[int, int, int]:
    uc = scratch.uc
    marks = [0x5EED_0000_0000_0000 + i * 0x0101_0101 for i in range(16)]
    saved = uc.reg_read(uc_x86.UC_X86_REG_RSP)
    for name, mark in zip(GPR_NAMES, marks, strict=True):
        uc.reg_write(getattr(uc_x86, f"UC_X86_REG_{name}"), mark)
    handle = handle_of(uc)
    cpu = _u64(handle + layout.uc_cpu)
    env = _u64(cpu + layout.cpu_env)
    for i, mark in enumerate(marks):
        _expect(GPR_NAMES[i], _u64(env + layout.env_regs + 8 * i), mark)
    uc.reg_write(uc_x86.UC_X86_REG_RSP, saved)
    uc.reg_write(uc_x86.UC_X86_REG_RIP, 0x1234_5678_9ABC)
    _expect("RIP", _u64(env + layout.env_eip), 0x1234_5678_9ABC)
    for name, index in (("FS_BASE", 4), ("GS_BASE", 5)):
        uc.reg_write(getattr(uc_x86, f"UC_X86_REG_{name}"), 0x7777_0000_1000 + index)
        _expect(name, _u64(env + layout.env_segs + 24 * index + 8), 0x7777_0000_1000 + index)
    uc.reg_write(uc_x86.UC_X86_REG_GDTR, (0, 0x6666_0000_1000, 0xABC, 0))
    _expect("GDT base", _u64(env + layout.env_segs + 24 * 8 + 8), 0x6666_0000_1000)
    _expect("GDT limit", _u32(env + layout.env_segs + 24 * 8 + 16), 0xABC)
    uc.reg_write(uc_x86.UC_X86_REG_CR2, 0x4444_0000_2000)
    _expect("CR2", _u64(env + layout.env_cr + 16), 0x4444_0000_2000)
    uc.reg_write(uc_x86.UC_X86_REG_CR3, 0x2000)
    _expect("CR3", _u64(env + layout.env_cr + 24), 0x2000)
    uc.reg_write(uc_x86.UC_X86_REG_CR3, 0)
    hflags = _u32(env + layout.env_hflags)
    _expect("hflags LMA|CS64", hflags & 0xC000, 0xC000)
    _expect("hflags CPL", hflags & 3, 0)
    return handle, cpu, env


def _check_flags(scratch: _Scratch, layout: Layout, env: int, lib: Any) -> None:
    """stc; std; (exit) — CF through cc_src, DF through df."""
    start = scratch.code(b"\xf9\xfd\x90")
    scratch.uc.emu_start(start, start + 2)
    read = lib.helper_read_eflags_x86_64
    read.restype, read.argtypes = ctypes.c_uint64, [ctypes.c_void_p]
    _expect("EFLAGS after stc; std", read(env) & 0x401, 0x401)
    _expect("df", _u32(env + layout.env_df), 0xFFFF_FFFF)
    # Written the way DirectRegisters writes them: ZF and no DF.
    ctypes.c_uint64.from_address(env + layout.env_cc_src).value = 0x40
    ctypes.c_uint32.from_address(env + layout.env_cc_op).value = 1
    ctypes.c_uint32.from_address(env + layout.env_df).value = 1
    ctypes.c_uint64.from_address(env + layout.env_eflags).value = 0x202
    _expect("EFLAGS after a direct write", scratch.uc.reg_read(uc_x86.UC_X86_REG_EFLAGS) & 0xFFF, 0x242)


def _check_exceptions(scratch: _Scratch, layout: Layout, env: int) -> None:
    """mov ax, 0x1230; mov ds, ax: #GP(0x1230) beyond the GDT limit. Then int 0x42."""
    seen: list[tuple[int, int, int, int]] = []

    def hook(uc: Any, number: int, _data: object) -> None:
        seen.append(
            (
                number,
                _u32(env + layout.env_error_code),
                _u32(env + layout.env_is_int),
                _u32(env + layout.env_old_exception),
            )
        )
        uc.emu_stop()

    handle = scratch.uc.hook_add(unicorn.UC_HOOK_INTR, hook)
    start = scratch.code(b"\x66\xb8\x30\x12\x8e\xd8\x90")
    scratch.uc.emu_start(start, start + 7)
    start = scratch.code(b"\xcd\x42\x90\x90")
    scratch.uc.emu_start(start, start + 4)
    scratch.uc.hook_del(handle)
    _expect("number of exceptions", len(seen), 2)
    _expect("vector of the fault", seen[0][0], 13)
    _expect("error_code", seen[0][1], 0x1230)
    _expect("exception_is_int of a fault", seen[0][2], 0)
    _expect("old_exception", seen[0][3], 13)
    _expect("vector of the interrupt", seen[1][0], 0x42)
    _expect("exception_is_int of int n", seen[1][2], 1)
    ctypes.c_uint32.from_address(env + layout.env_is_int).value = 0
    ctypes.c_uint32.from_address(env + layout.env_old_exception).value = 0xFFFF_FFFF


def _check_ports(scratch: _Scratch, layout: Layout, env: int, lib: Any) -> None:
    """stc; in al, 0x60. Then out dx, al. Then rep outsb: #GP(0) at the instruction, with its flags."""
    faults = PortFaults(lib)
    add = ctypes.CDLL(LIBRARY_PATH).uc_hook_add
    pointers, words = [ctypes.c_void_p] * 2, [ctypes.c_uint64] * 2
    add.argtypes = [*pointers, ctypes.c_int, *pointers, *words, ctypes.c_int]
    handles = [ctypes.c_size_t() for _ in HOOKS]
    for handle, instruction in zip(handles, HOOKS, strict=True):
        kind, hook = unicorn.UC_HOOK_INSN, faults.hook(instruction)
        _expect("hook", add(handle_of(scratch.uc), ctypes.byref(handle), kind, hook, env, 1, 0, instruction), 0)
    seen: list[tuple[int, int, int]] = []

    def note(uc: Any, number: int, _data: object) -> None:
        seen.append((number, _u64(env + layout.env_eip), _u32(env + layout.env_error_code)))
        uc.emu_stop()

    handle = scratch.uc.hook_add(unicorn.UC_HOOK_INTR, note)
    for code, at in ((b"\xf9\xe4\x60\x90", 1), (b"\x90\xee\x90", 1), (b"\x90\x90\xf3\x6e\x90", 2)):
        scratch.uc.reg_write(uc_x86.UC_X86_REG_RCX, 2)
        scratch.uc.reg_write(uc_x86.UC_X86_REG_RSI, scratch.base + _DATA)
        start = scratch.code(code)
        scratch.uc.emu_start(start, start + len(code))
        _expect("exits of a port instruction", len(seen), 1)
        number, rip, error = seen.pop()
        _expect("vector of a port instruction", number, 13)
        _expect("RIP at a port instruction", rip, start + at)
        _expect("error code of a port instruction", error, 0)
        ctypes.c_uint32.from_address(env + layout.env_old_exception).value = 0xFFFF_FFFF
    scratch.uc.hook_del(handle)
    delete = ctypes.CDLL(LIBRARY_PATH).uc_hook_del
    delete.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for each in handles:
        delete(handle_of(scratch.uc), each.value)


def _check_intercepts(scratch: _Scratch, layout: Layout, env: int) -> None:
    """nop; pause (or cpuid); nop — with the intercept on it is an exit at the instruction, without it none."""
    seen: list[tuple[int, int]] = []

    def hook(uc: Any, number: int, _data: object) -> None:
        seen.append((number, _u64(env + layout.env_eip)))
        uc.emu_stop()

    handle = scratch.uc.hook_add(unicorn.UC_HOOK_INTR, hook)
    hflags = ctypes.c_uint32.from_address(env + layout.env_hflags)
    intercept = ctypes.c_uint64.from_address(env + layout.env_intercept)
    _expect("intercept at rest", intercept.value, 0)
    hflags.value |= HF_GUEST
    wanted = []
    for number, bit, code in ((EXIT_PAUSE, INTERCEPT_PAUSE, b"\xf3\x90"), (EXIT_CPUID, INTERCEPT_CPUID, b"\x0f\xa2")):
        start = scratch.code(b"\x90" + code + b"\x90")
        intercept.value = bit
        scratch.uc.emu_start(start, start + 4)
        intercept.value = 0
        scratch.uc.emu_start(start, start + 4)
        wanted.append((number, start + 1))
    hflags.value &= ~HF_GUEST
    scratch.uc.hook_del(handle)
    _expect("number of intercepts", len(seen), len(wanted))
    for (number, rip), (wanted_number, wanted_rip) in zip(seen, wanted, strict=True):
        _expect("exit of the intercept", number, wanted_number)
        _expect("RIP at the intercept", rip, wanted_rip)
    ctypes.c_uint32.from_address(env + layout.env_old_exception).value = 0xFFFF_FFFF


def _check_fpu(scratch: _Scratch, layout: Layout, env: int) -> None:
    """fninit; fld1; fld1 — the top of the stack is register 6. And no breakpoint is set."""
    start = scratch.code(b"\xdb\xe3\xd9\xe8\xd9\xe8\x90")
    scratch.uc.emu_start(start, start + 6)
    _expect("FPU stack top", _u32(env + layout.env_fpstt), 6)
    _expect("breakpoints", int.from_bytes(safe_read(env + layout.env_breakpoints, 32), "little"), 0)


def _check_stop(layout: Layout) -> None:
    """A stop request during a store ends the run behind the block, not behind the store.

    mov [0x3000], rax; inc rbx; mov [0x3000], rax; inc rbx; jmp $+2
    """
    scratch = _Scratch()
    try:
        uc = scratch.uc
        uc.reg_read(uc_x86.UC_X86_REG_RIP)
        flag = ctypes.c_uint8.from_address(handle_of(uc) + layout.uc_no_exit_request)
        _expect("no_exit_request at rest", flag.value, 0)
        flag.value = 1
        uc.hook_add(unicorn.UC_HOOK_MEM_WRITE, lambda engine, *_rest: engine.emu_stop())
        start = scratch.code(b"\x48\x89\x04\x25\x00\x30\x00\x00\x48\xff\xc3" * 2 + b"\xeb\x00" + b"\x90" * 8)
        uc.reg_write(uc_x86.UC_X86_REG_RBX, 0)
        uc.emu_start(start, start + 28)
        _expect("instructions run after the stop request", uc.reg_read(uc_x86.UC_X86_REG_RBX), 2)
    finally:
        scratch.close()


def _check_invalidate(lib: Any) -> None:
    """Code changed by the host runs changed after tb_invalidate_phys_range, by offset in the mapped block."""
    scratch = _Scratch(base=0x10_0000)
    try:
        uc = scratch.uc
        start = scratch.code(b"\xb8\x01\x00\x00\x00\x90")  # mov eax, 1
        uc.emu_start(start, start + 5)
        scratch.memory[_CODE + 1] = 2
        fn = lib.tb_invalidate_phys_range_x86_64
        fn.argtypes, fn.restype = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64], None
        fn(handle_of(uc), _CODE, _CODE + 4096)
        uc.emu_start(start, start + 5)
        _expect("EAX after code changed", uc.reg_read(uc_x86.UC_X86_REG_EAX), 2)
    finally:
        scratch.close()


def _check_translations(scratch: _Scratch, layout: Layout, env: int) -> None:
    """mov [0x3000], rax"""
    start = scratch.code(b"\x48\x89\x04\x25\x00\x30\x00\x00\x90")
    scratch.uc.emu_start(start, start + 8)
    host = ctypes.addressof(scratch.anchor) + _DATA
    why = why_not(safe_read, env - layout.tlb_before_env, layout.tlb_size, scratch.base + _DATA, host)
    if why:
        raise _Mismatch(why)


def verify(layout: Layout | None = None) -> SelfCheck:
    """Check `layout` (default: the known build's) against the loaded library; never raises."""
    layout = layout or Layout()
    version = str(getattr(unicorn, "__version__", "unknown"))
    try:
        lib = ctypes.PyDLL(LIBRARY_PATH)
        for symbol in REQUIRED_SYMBOLS:
            if not hasattr(lib, symbol):
                raise _Mismatch(f"the library does not export {symbol}")
        scratch = _Scratch()
        try:
            _, _, env = _check_registers(scratch, layout)
            _check_flags(scratch, layout, env, lib)
            _check_exceptions(scratch, layout, env)
            _check_ports(scratch, layout, env, lib)
            _check_intercepts(scratch, layout, env)
            _check_fpu(scratch, layout, env)
            _check_translations(scratch, layout, env)
        finally:
            scratch.close()
        _check_stop(layout)
        _check_invalidate(lib)
    except (_Mismatch, OSError, unicorn.UcError) as exc:
        return SelfCheck(None, f"unicorn {version}: {exc}; using the slower public API", version)
    return SelfCheck(layout, f"unicorn {version}: private layout verified", version)
