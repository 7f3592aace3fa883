"""`UnicornEngine`: the engine protocol over one Unicorn instance.

Two paths share this class. On the *direct* path hooks call the handler right
inside the run (0.8 µs) and registers are memory. On the *public* path every
hook only notes what happened and stops the run; the handler is called between
two runs, on registers read through the API. Set-up is the same on both and
uses public calls alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from hypervisor.engines import x86
from hypervisor.engines.base import EngineError, NativeHooks, TrapHandler
from hypervisor.engines.tsc import read_tsc
from hypervisor.engines.unicorn.codebuffer import CodeBuffer, executable_areas
from hypervisor.engines.unicorn.direct import DirectRegisters
from hypervisor.engines.unicorn.features import find, hide
from hypervisor.engines.unicorn.flushing import Flushing
from hypervisor.engines.unicorn.intercepts import Intercepts
from hypervisor.engines.unicorn.library import uc_const, uc_x86, unicorn
from hypervisor.engines.unicorn.nativeview import native_view
from hypervisor.engines.unicorn.ports import HOOKS, PORT_IN_CB, PortFaults, port_in
from hypervisor.engines.unicorn.private import EXIT_CPUID, EXIT_PAUSE, LIBRARY_PATH, Layout, handle_of
from hypervisor.engines.unicorn.public import PublicRegisters
from hypervisor.engines.unicorn.ring3 import enter_ring3
from hypervisor.engines.unicorn.segments import Segments
from hypervisor.engines.unicorn.tablewalk import TableWalk
from hypervisor.engines.unicorn.translations import Translations

_PTR = ctypes.c_void_p
_INTR_CB = ctypes.CFUNCTYPE(None, _PTR, ctypes.c_uint32, _PTR)
_INVALID_CB = ctypes.CFUNCTYPE(ctypes.c_bool, _PTR, _PTR)
_INSN_CB = ctypes.CFUNCTYPE(None, _PTR, _PTR)
_BLOCK_CB = ctypes.CFUNCTYPE(None, _PTR, ctypes.c_uint64, ctypes.c_uint32, _PTR)
_CPUID_CB = ctypes.CFUNCTYPE(ctypes.c_int, _PTR, _PTR)
_KICK_CB = ctypes.CFUNCTYPE(None, _PTR)

_ICEBP = 0xF1

# Westmere: no XSAVE, AVX or FSGSBASE, which the engine cannot do, and a baseline that real hosts can offer too.
CPU_MODEL = uc_x86.UC_CPU_X86_WESTMERE


class UnicornEngine(Segments, Intercepts, Flushing):
    """See `hypervisor.engines.base.Engine`.

    :param layout: verified private layout, or None for the public path.
    """

    def __init__(self, layout: Layout | None) -> None:
        self.name = "unicorn" if layout else "unicorn-public"
        self.layout = layout
        self._lib = ctypes.CDLL(LIBRARY_PATH)  # releases the interpreter lock: for running the guest
        self._leaf = ctypes.PyDLL(LIBRARY_PATH)  # keeps it: for leaf calls of less than a microsecond
        areas = executable_areas()
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._uc.ctl_set_cpu_model(CPU_MODEL)
        self._uc.ctl_set_tlb_mode(uc_const.UC_TLB_CPU)
        self._uc.reg_read(uc_x86.UC_X86_REG_RIP)  # the library builds the machine at the first use
        self._code_buffer = CodeBuffer(areas)
        self._handle = handle_of(self._uc)
        self._handler: TrapHandler | None = None
        self._native: NativeHooks | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._epoch = 0
        self._code_stale = False
        self._pending: Callable[[], None] | None = None
        self._kicked = False
        self._rechecked = -1
        self._map_base = 0
        self._hooks: list[Any] = []
        self._start = self._lib.uc_emu_start
        self._start.argtypes = [_PTR, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t]
        self._stop = self._leaf.uc_emu_stop
        self._stop.argtypes = [_PTR]
        self._public: PublicRegisters | None = None
        self._direct: DirectRegisters | None = None
        if layout:
            self._init_direct(layout)
        else:
            self._public = PublicRegisters(self._uc)
        self.regs: Any = self._direct or self._public
        self.ahead: Translations | None = None
        if self._direct:
            self.ahead = Translations(self._code_buffer.area, self._leaf.uc_ctl, self._handle, self._direct)

    def _init_direct(self, layout: Layout) -> None:
        cpu = ctypes.c_uint64.from_address(self._handle + layout.uc_cpu).value
        env = ctypes.c_uint64.from_address(cpu + layout.cpu_env).value
        self._cpu, self._env = _PTR(cpu), _PTR(env)
        # A stop request ends the run at a block boundary, never inside an instruction; memory accesses get faster too.
        ctypes.c_uint8.from_address(self._handle + layout.uc_no_exit_request).value = 1
        self._direct = DirectRegisters(env, layout, self._leaf)
        leaf = self._leaf
        self._f_flush = leaf.tlb_flush_x86_64
        self._f_flush.argtypes = [_PTR]
        self._f_flush_page = leaf.tlb_flush_page_x86_64
        self._f_flush_page.argtypes = [_PTR, ctypes.c_uint64]
        self._f_cr3 = leaf.cpu_x86_update_cr3_x86_64
        self._f_cr3.argtypes = [_PTR, ctypes.c_uint64]
        self._f_invalidate = leaf.tb_invalidate_phys_range_x86_64
        self._f_invalidate.argtypes = [_PTR, ctypes.c_uint64, ctypes.c_uint64]
        self._f_cpuid = leaf.cpu_x86_cpuid_x86_64
        self._f_cpuid.argtypes = [_PTR, ctypes.c_uint32, ctypes.c_uint32, _PTR, _PTR, _PTR, _PTR]
        # Sought now: it reads /proc/self/mem, which a sandbox forbids later.
        self._features = find(self._env.value or 0, layout.env_size, self.cpuid)

    # -- set-up

    def map_memory(self, mpa: int, size: int, address: int) -> None:
        self._uc.mem_map_ptr(mpa, size, unicorn.UC_PROT_ALL, address)
        self._map_base = mpa
        self._tables = TableWalk(lambda: self.regs.cr3, mpa, size, address)

    def map_neighbour(self, mpa: int, size: int, address: int) -> None:
        self._uc.mem_map_ptr(mpa, size, unicorn.UC_PROT_ALL, address)

    def unmap_neighbour(self, mpa: int, size: int) -> None:
        self._uc.mem_unmap(mpa, size)

    def set_handler(self, handler: TrapHandler, native: NativeHooks | None = None) -> bool:
        self._handler = handler
        if self._direct and self.layout:
            interrupt, syscall = _INTR_CB(self._direct_intr), _INSN_CB(self._direct_syscall)
            data = None
            if native is not None:
                view = native_view(
                    self._leaf, self._cpu.value or 0, self._env.value or 0, self.layout, syscall, interrupt
                )
                native.attach(view)
                self._hooks.append((interrupt, syscall, native))
                interrupt, syscall, data = _INTR_CB(native.interrupt), _INSN_CB(native.syscall), native.data
                self._native = native
                self._forgotten()
                self._add_hook(uc_const.UC_HOOK_EDGE_GENERATED, _PTR(native.translated), data=native.tables_data)
            self._add_hook(unicorn.UC_HOOK_INTR, interrupt, data=data)
            self._add_hook(unicorn.UC_HOOK_INSN_INVALID, _INVALID_CB(self._direct_invalid))
            self._add_hook(unicorn.UC_HOOK_INSN, syscall, uc_x86.UC_X86_INS_SYSCALL, data=data)
        else:
            self._add_hook(unicorn.UC_HOOK_INTR, _INTR_CB(self._public_intr))
            self._add_hook(unicorn.UC_HOOK_INSN_INVALID, _INVALID_CB(self._public_invalid))
            self._add_hook(unicorn.UC_HOOK_INSN, _INSN_CB(self._public_syscall), uc_x86.UC_X86_INS_SYSCALL)
            self._add_hook(unicorn.UC_HOOK_BLOCK, _BLOCK_CB(self._public_block))
            # Behind the hook of `syscall`: the library walks one list for all and leaves it when a stop was requested
            # meanwhile, so a hook before it would lose system calls.
            self._add_hook(unicorn.UC_HOOK_INSN, _CPUID_CB(self._public_cpuid), uc_x86.UC_X86_INS_CPUID)
        if self._direct and native is not None:
            for instruction, hook in zip(HOOKS, (native.port_in, native.port_out), strict=True):
                self._add_hook(unicorn.UC_HOOK_INSN, _PTR(hook), instruction, data=native.data)
        elif self._direct:
            ports = PortFaults(self._leaf)
            self._hooks.append(ports)
            for instruction in HOOKS:
                self._add_hook(unicorn.UC_HOOK_INSN, ports.hook(instruction), instruction, data=self._env.value)
        else:
            self._add_hook(unicorn.UC_HOOK_INSN, PORT_IN_CB(port_in), uc_x86.UC_X86_INS_IN)
        return native is not None and self._direct is not None

    def _add_hook(self, kind: int, callback: Any, *extra: int, data: int | None = None) -> None:
        handle = ctypes.c_size_t()
        add = ctypes.CDLL(LIBRARY_PATH).uc_hook_add
        arguments: list[Any] = [_PTR, _PTR, ctypes.c_int, _PTR, _PTR, ctypes.c_uint64, ctypes.c_uint64]
        add.argtypes = arguments + [ctypes.c_int] * len(extra)
        code = add(self._handle, ctypes.byref(handle), kind, ctypes.cast(callback, _PTR), data, 1, 0, *extra)
        if code:
            raise EngineError(f"the engine refuses hook {kind}: {unicorn.UcError(code)}")
        self._hooks.append((callback, handle))

    def reset_pv64(self, cr3: int, gdt_base: int, gdt_limit: int) -> None:
        uc = self._uc
        enter_ring3(uc)
        uc.msr_write(0xC000_0080, x86.EFER_SCE | x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX)
        cr4 = x86.CR4_PAE | x86.CR4_PGE | x86.CR4_OSFXSR | x86.CR4_OSXMMEXCPT | x86.CR4_DE
        uc.reg_write(uc_x86.UC_X86_REG_CR4, cr4)
        uc.reg_write(uc_x86.UC_X86_REG_CR3, cr3)
        cr0 = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE | x86.CR0_WP | x86.CR0_AM | x86.CR0_PG
        uc.reg_write(uc_x86.UC_X86_REG_CR0, cr0)
        uc.reg_write(uc_x86.UC_X86_REG_IDTR, (0, 0, 0, 0))
        self.set_gdt(gdt_base, gdt_limit)
        # The empty set of exits: no address ends a run, not even 0, where a guest may well jump to.
        uc.ctl_exits_enabled(True)
        if self._public:
            self._public.remember_clean()
        if self._direct:
            self._direct.watch_instructions()
        self._forgotten()

    @property
    def runs_32_bit(self) -> bool:
        return self._direct is not None

    # -- running

    def run(self) -> None:
        self._stopping = False
        while True:
            code = self._start(self._handle, self.regs.rip, 0, 0, 0)
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if code:
                raise EngineError(f"{unicorn.UcError(code)} at rip {self.regs.rip:#x}")
            if self._pending is None:
                break
            pending, self._pending = self._pending, None
            pending()
            if self._code_stale:
                self._code_stale = False
                self._uc.ctl_flush_tb()
            if self._stopping or self._kicked:
                break
        self._kicked = False

    def stop(self) -> None:
        self._stopping = True
        self._stop(self._handle)

    def kick(self) -> None:
        if self._direct:
            self._stop(self._handle)
        else:
            self._kicked = True

    def kick_target(self) -> tuple[int, int, object]:
        if self._direct:
            return ctypes.cast(self._lib.uc_emu_stop, _PTR).value or 0, self._handle, self._uc
        if not hasattr(self, "_kick_callback"):
            self._kick_callback = _KICK_CB(lambda _argument: self.kick())
        return ctypes.cast(self._kick_callback, _PTR).value or 0, 0, self._kick_callback

    def _fail(self, error: BaseException) -> None:
        # An exception must not cross the library's C frames: keep it, stop, raise it in run().
        self._error = error
        self._stop(self._handle)

    # -- direct hooks

    def _direct_intr(self, _uc: int, number: int, _data: int) -> None:
        try:
            error_code, software = self._direct.take_exception()  # type: ignore[union-attr]
            rechecked, self._rechecked = self._rechecked, -1
            if number == x86.DB and rechecked == self._direct.rip:  # type: ignore[union-attr]
                return
            if number in (EXIT_PAUSE, EXIT_CPUID):
                self._intercepted(number)
                return
            self._handler.exception(number, error_code, software)  # type: ignore[union-attr]
        except BaseException as exc:
            self._fail(exc)

    def _direct_invalid(self, _uc: int, _data: int) -> bool:
        try:
            _, software = self._direct.take_exception()  # type: ignore[union-attr]
            self._invalid(software)
        except BaseException as exc:
            self._fail(exc)
        return True

    def _direct_syscall(self, _uc: int, _data: int) -> None:
        regs = self._direct
        try:
            regs.rip += 2  # type: ignore[union-attr]
            self._handler.syscall()  # type: ignore[union-attr]
        except BaseException as exc:
            self._fail(exc)
        # The library looks at TF once more behind `syscall`. If the handler went to a program that is single-stepped,
        # that would be the program's first step, taken before its first instruction: it must not count.
        self._rechecked = regs.rip if regs.single_step else -1  # type: ignore[union-attr]
        # The library adds the length of `syscall` to whatever RIP is now.
        regs.rip = (regs.rip - 2) & x86.MASK64  # type: ignore[union-attr]

    def _invalid(self, software: bool) -> None:
        """#UD; the library reports `int 6` and `icebp` in the same way, with RIP still at the instruction."""
        assert self._handler is not None
        if software:
            self.regs.rip += 2
            self._handler.exception(x86.UD, 0, True)
        elif self._tables.peek(self.regs.segment_base(x86.CS) + self.regs.rip & x86.MASK64) == _ICEBP:
            self.regs.rip += 1
            self._handler.exception(x86.DB, 0, False)
        else:
            self._handler.invalid_opcode()

    # -- public hooks: note and stop

    def _public_intr(self, _uc: int, number: int, _data: int) -> None:
        if number == x86.DB and self._pending is not None:
            return  # the library's second look at TF behind a `syscall` that is still to be handled
        self._pending = lambda: self._public_exception(number)
        self._stop(self._handle)

    def _public_exception(self, number: int) -> None:
        public, handler = self._public, self._handler
        assert public is not None and handler is not None
        error_code, software = public.classify(number, self._tables.walk, self._tables.peek)
        public.forget_exception()
        handler.exception(number, error_code, software)

    def _public_undefined(self, software: bool) -> None:
        assert self._public is not None
        self._public.forget_exception()
        self._invalid(software)

    def _public_invalid(self, _uc: int, _data: int) -> bool:
        rip = self.regs.rip
        software = (self._tables.peek(rip), self._tables.peek(rip + 1)) == (0xCD, 6)
        self._pending = lambda: self._public_undefined(software)
        self._stop(self._handle)
        return True

    def _public_syscall(self, _uc: int, _data: int) -> None:
        self._pending = self._handler.syscall  # type: ignore[union-attr]
        self._stop(self._handle)

    def _public_cpuid(self, _uc: int, _data: int) -> int:
        # It changes nothing but registers, which can be done inside the run.
        try:
            self._handler.cpuid()  # type: ignore[union-attr]
        except BaseException as exc:
            self._fail(exc)
        return 1

    def _public_block(self, _uc: int, _address: int, _size: int, _data: int) -> None:
        if self._kicked:
            self._stop(self._handle)

    def watch_pauses(self, on: bool) -> None:
        if self._direct:
            self._direct.intercept_pause(on)

    # -- address translation and code

    def memory_written(self, mpa: int, size: int) -> None:
        if self._direct:
            start = mpa - self._map_base
            self._f_invalidate(self._handle, start, start + size)
        else:
            self._code_stale = True

    def drop_translations(self) -> None:
        """Forget all translated code and give its memory back. Not during a run."""
        self._uc.ctl_flush_tb()
        self._code_buffer.release()

    # -- identification, whole state

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        if not self._direct:
            return self._public.cpuid(leaf, subleaf)  # type: ignore[union-attr]
        out = [ctypes.c_uint32() for _ in range(4)]
        self._f_cpuid(self._env, leaf, subleaf, *[ctypes.byref(v) for v in out])
        return out[0].value, out[1].value, out[2].value, out[3].value

    def hide_features(self, masks: Mapping[tuple[int, int], int]) -> bool:
        if not self._direct:
            return False
        return hide(self._features, masks)

    def read_tsc(self) -> int:
        return read_tsc()

    def save_cpu(self) -> bytes:
        return bytes(self.regs.save())

    def restore_cpu(self, state: bytes) -> None:
        self.regs.restore(state)
        if self._direct:
            assert self.layout is not None
            self._f_cr3(self._env, self._direct.cr3)
        self._forgotten()
