"""The engine seam: what executes guest instructions.

An engine knows x86, never Xen. It runs one vCPU at a time until an event that
it cannot handle, calls the `TrapHandler`, and goes on with whatever state the
handler left. No call of the handler is ever made inside an instruction: the
state it sees is architectural.

Threads: `Engine.kick` may be called from any thread, all else only from the
thread that calls `Engine.run` (or from a handler, which runs there).
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Mapping, MutableSequence
from typing import Protocol


class EngineError(Exception):
    """The engine cannot go on: a fault of the engine or of how it was set up, not of the guest."""


class TrapHandler(Protocol):
    """What the machine does with an exit. Each call may rewrite all registers."""

    def syscall(self) -> None:
        """A `syscall` instruction; RIP is the address after it, RCX and R11 are untouched."""

    def exception(self, vector: int, error_code: int, software: bool) -> None:
        """A fault or trap.

        :param vector: 0..255. For #PF the address is in ``regs.cr2``.
        :param error_code: as the processor would push it; 0 for vectors without one.
        :param software: made by ``int n``, ``int3`` or ``into``; RIP is then behind the instruction.
        """

    def invalid_opcode(self) -> None:
        """#UD; RIP is at the instruction."""

    def cpuid(self) -> None:
        """A `cpuid` instruction: put the answer into RAX, RBX, RCX and RDX, and change nothing else.

        An engine may give its own answer instead while a stop is under way; see `Engine.hide_features`.
        """

    def spinning(self) -> None:
        """A `pause` instruction while `Engine.watch_pauses` is on; RIP is behind it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Translations:
    """The engine's cached translations of addresses, one set of two. Addresses in this process, and C functions.

    :ivar at, size: the set in use. :ivar cpu: what the functions take first.
    :ivar init: ``void (*)(cpu)``: makes a fresh set there.
    :ivar flush, flush_page: ``void (*)(cpu)``, ``void (*)(cpu, u64 va)``.
    :ivar to_host: ``void *(*)(env, u64 va, int access, int index)``: where the memory is that is at an address.
    :ivar mark: ``void (*)(cpu, u64 host, u64 length)``: have writes there looked at, for code that they may change.
    """

    at: int
    size: int
    cpu: int
    init: int
    flush: int
    flush_page: int
    to_host: int
    mark: int


@dataclasses.dataclass(frozen=True, slots=True)
class NativeView:
    """Where an engine's registers are, and what takes over from native hooks. Addresses in this process.

    :ivar env: the registers; `offsets` within, by the names of the engine's layout.
    :ivar read_eflags, stop: C functions: ``u64 (*)(env)``, ``void (*)(engine)``.
    :ivar raise_exception: ``void (*)(env, int vector, int error)``: from the hook of a port, which it never returns to.
    :ivar syscall, interrupt: what is called for what native hooks leave: ``void (*)(engine, data)``,
        ``void (*)(engine, u32 number, data)``.
    """

    env: int
    offsets: Mapping[str, int]
    read_eflags: int
    stop: int
    raise_exception: int
    syscall: int
    interrupt: int
    translations: Translations


class NativeHooks(Protocol):
    """C functions that are called instead of the handler, and call it for what they do not do themselves.

    It keeps translations of the kernel's and the program's tables apart, by `switch`, `flush_page` (in both) and
    `forget_other`.

    :ivar syscall, interrupt: their addresses; `data` is passed to all.
    :ivar translated: called with `tables_data` for each new block of code.
    :ivar port_in, port_out: what `in` and `out` do: ``u32 (*)(engine, u32 port, int size, data)``,
        ``void (*)(engine, u32 port, int size, u32 value, data)``.
    """

    syscall: int
    interrupt: int
    port_in: int
    port_out: int
    data: int
    translated: int
    tables_data: int

    def attach(self, view: NativeView) -> None: ...

    def switch(self, cr3: int, kernel: bool) -> None: ...

    def flush_page(self, va: int) -> None: ...

    def forget_other(self, epoch: int) -> None: ...


class Registers(Protocol):
    """The running vCPU's registers, as of now.

    Selectors set here change no hidden segment state; use the engine's
    `Engine.load_flat64` and `Engine.load_segment` for that.
    """

    gpr: MutableSequence[int]
    """General registers by encoding number (`hypervisor.engines.x86`), unsigned 64-bit."""

    rip: int
    rflags: int
    """Reads as RFLAGS; writing keeps bit 1 set."""
    single_step: bool
    """RFLAGS.TF (read only)."""
    cr2: int
    cr3: int
    cs: int
    ss: int
    ds: int
    es: int
    fs: int
    gs: int
    fs_base: int
    gs_base: int
    task_switched: bool
    """CR0.TS: the next FPU instruction raises #NM."""
    long_mode_code: bool
    """The code segment is a 64-bit one (read only)."""

    def checked(self, state: bytes) -> bytes:
        """What `Engine.save_cpu` gave on another host, safe for `Engine.restore_cpu`; after `Engine.reset_pv64`.

        :raises ValueError: it is not of this build, or of a mode that no PV guest runs in.
        """

    def segment_base(self, index: int) -> int:
        """Base address of the segment that register `index` (`hypervisor.engines.x86`) names."""


class Ahead(Protocol):
    """Code translated before it is needed, in an engine that translates."""

    def known(self) -> tuple[array.array[int], int]:
        """Guest addresses of code that is translated, oldest first, and the mode that `begin` wants. Any thread; hints,
        which may be wrong."""

    def begin(self, mode: int) -> None:
        """Before `translate`, after `Engine.reset_pv64`."""

    def translate(self, address: int) -> bool:
        """Under the page tables in force. Between runs only.

        :param address: in an executable page, and the next page is executable too: a fault now has nowhere to go.
        :returns: whether it was done.
        """


class Engine(Protocol):
    name: str
    ahead: Ahead | None
    """None: it cannot do that."""
    regs: Registers
    runs_32_bit: bool
    """Whether `load_segment` can make 32-bit code and rings other than 3 (read only)."""

    def map_memory(self, mpa: int, size: int, address: int) -> None:
        """Back machine physical [mpa, mpa+size) by host memory at `address`. Called once, before `run`."""

    def map_neighbour(self, mpa: int, size: int, address: int) -> None:
        """Back more machine memory: another domain's, of which single frames may be mapped. From a handler, too."""

    def unmap_neighbour(self, mpa: int, size: int) -> None:
        """Take it back; no page-table entry leads there any more."""

    def set_handler(self, handler: TrapHandler, native: NativeHooks | None = None) -> bool:
        """:param native: takes the exits first. :returns: whether it does; an engine may be unable to let it."""

    def reset_pv64(self, cr3: int, gdt_base: int, gdt_limit: int) -> None:
        """Long mode, paging on, CPL 3, flat 64-bit segments, interrupts on."""

    def run(self) -> None:
        """Execute from ``regs.rip`` until a kick or `stop`. :raises EngineError: the engine broke."""

    def stop(self) -> None:
        """From a handler: leave `run` when the handler returns."""

    def kick(self) -> None:
        """From any thread: leave `run` soon, between two instructions. Lost if `run` is not running."""

    def kick_target(self) -> tuple[int, int, object]:
        """(C function, argument) that does what `kick` does, for timers that must not wait for Python.

        The third has to be kept for as long as the function may be called.
        """

    def load_cr3(self, mpa: int) -> None:
        """Switch the page-table root and drop all cached translations of addresses."""

    def switch_tables(self, mpa: int, kernel: bool) -> None:
        """From the program's tables to the kernel's or back. What is cached of either may stay so."""

    def flush_all(self) -> None: ...

    def flush_page(self, va: int) -> None: ...

    def watch_pauses(self, on: bool) -> None:
        """Whether `pause` calls the handler. Lost by `restore_cpu`; an engine that cannot tell never calls it."""

    @property
    def flush_epoch(self) -> int:
        """Grows with each complete flush; lets a caller know whether one happened since."""

    def memory_written(self, mpa: int, size: int) -> None:
        """The host changed memory that may hold translated code."""

    def drop_translations(self) -> None:
        """Forget cached translations of code and give back the memory they take. Not while `run` runs."""

    def load_flat64(self, cs: int, ss: int) -> None:
        """CS and SS become flat 64-bit segments at CPL 3 with these selectors."""

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        """Load a segment register's hidden state from a descriptor (0: a null segment).

        The privilege level becomes that of the stack segment's descriptor.
        """

    def set_gdt(self, base: int, limit: int) -> None: ...

    def set_ldt(self, selector: int, base: int, limit: int) -> None: ...

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of the engine's own CPU model."""

    def hide_features(self, masks: Mapping[tuple[int, int], int]) -> bool:
        """Take processor features away, before the first `run`: (leaf, register 0..3) → bits of CPUID.

        False when the engine cannot; then only the handler's answers hide them.
        """

    def read_tsc(self) -> int:
        """What the guest's RDTSC would return now."""

    def save_cpu(self) -> bytes:
        """The whole register state, FPU included, for `restore_cpu` of the same engine build."""

    def restore_cpu(self, state: bytes) -> None: ...

    def save_fpu(self) -> bytes:
        """The floating-point registers alone, as FXSAVE64 stores them (512 bytes)."""

    def load_fpu(self, image: bytes) -> None:
        """:raises ValueError: no 512 bytes."""
