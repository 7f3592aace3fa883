"""One body per behaviour, run on the direct and on the public path of the Unicorn engine."""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from collections.abc import Iterator

import pytest

from hypervisor.engines import x86
from hypervisor.engines.unicorn import create, selfcheck
from hypervisor.engines.unicorn.engine import UnicornEngine
from hypervisor.engines.unicorn.private import Layout, verify

BASE = 0x1000_0000
SIZE = 0x40_0000
CODE = 0x40_0000  # virtual
RO_DATA = 0x40_1000
STACK_TOP = 0x40_4000


class Recorder:
    """A trap handler that notes what happened and stops, or does what the test says."""

    def __init__(self, engine: UnicornEngine) -> None:
        self.engine = engine
        self.seen: list[tuple[object, ...]] = []
        self.skip = 0
        self.stop_at = 1
        self.answered = 0

    def _note(self, *what: object) -> None:
        self.seen.append(what)
        regs = self.engine.regs
        regs.rip += self.skip
        if len(self.seen) >= self.stop_at:
            self.engine.stop()

    def syscall(self) -> None:
        self._note("syscall", self.engine.regs.rip, self.engine.regs.gpr[x86.RAX])

    def exception(self, vector: int, error_code: int, software: bool) -> None:
        self._note("exception", vector, error_code, software, self.engine.regs.rip)

    def invalid_opcode(self) -> None:
        self._note("invalid", self.engine.regs.rip)

    def cpuid(self) -> None:
        self.answered += 1
        gpr = self.engine.regs.gpr
        self.asked = gpr[x86.RAX], gpr[x86.RCX]
        gpr[x86.RAX], gpr[x86.RBX], gpr[x86.RCX], gpr[x86.RDX] = 1, 2, 3, 4

    def spinning(self) -> None:
        self._note("spinning", self.engine.regs.rip)


class Bench:
    """An engine in ring 3 with identity-free paging: CODE rx, RO_DATA ro nx, two pages rw below STACK_TOP."""

    def __init__(self, use_private: bool, recorder: type[Recorder] = Recorder) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.engine = create(use_private=use_private)
        self.engine.map_memory(BASE, SIZE, ctypes.addressof(self.anchor))
        self.handler = recorder(self.engine)
        self.engine.set_handler(self.handler)
        self._table(1, 0, BASE + 0x2007)
        self._table(2, 0, BASE + 0x3007)
        self._table(3, 2, BASE + 0x4007)
        self._table(4, 0, BASE + 0x8005)
        self._table(4, 1, BASE + 0x9005 | x86.PTE_NX)
        self._table(4, 2, BASE + 0xA007 | x86.PTE_NX)
        self._table(4, 3, BASE + 0xB007 | x86.PTE_NX)
        self.engine.reset_pv64(BASE + 0x1000, 0, 0)
        self.engine.load_flat64(0xE033, 0xE02B)
        self.engine.regs.gpr[x86.RSP] = STACK_TOP - 64

    def _table(self, page: int, index: int, entry: int) -> None:
        struct.pack_into("<Q", self.memory, page * 0x1000 + index * 8, entry)

    def run(self, code: bytes) -> list[tuple[object, ...]]:
        self.memory[0x8000 : 0x8000 + len(code)] = code
        self.engine.memory_written(BASE + 0x8000, 0x1000)
        self.engine.regs.rip = CODE
        self.engine.run()
        return self.handler.seen


@pytest.fixture(params=["direct", "public"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param == "direct" and selfcheck().layout is None:
        pytest.skip(selfcheck().reason)
    yield Bench(request.param == "direct")


def test_the_selfcheck_passes_with_the_pinned_library() -> None:
    assert selfcheck().layout == Layout(), selfcheck().reason


@pytest.mark.parametrize("field", [f for f in Layout.__slots__ if f != "env_size"])
def test_every_wrong_offset_is_noticed(field: str) -> None:
    wrong = Layout(**{field: getattr(Layout(), field) + 8})
    result = verify(wrong)
    assert result.layout is None
    assert "public API" in result.reason


def test_syscall_stops_behind_the_instruction(bench: Bench) -> None:
    assert bench.run(bytes.fromhex("b82a000000 0f05 90")) == [("syscall", CODE + 7, 42)]  # mov eax, 42; syscall


def test_the_handler_may_resume_elsewhere(bench: Bench) -> None:
    """syscall; jmp $ ; (skipped to) inc rbx; syscall"""
    bench.handler.stop_at, bench.handler.skip = 2, 2
    seen = bench.run(bytes.fromhex("0f05 ebfe 48ffc3 0f05"))
    assert [s[0] for s in seen] == ["syscall", "syscall"]
    assert seen[1][1] == CODE + 9
    assert bench.engine.regs.gpr[x86.RBX] == 1


def test_ring3_refuses_privileged_instructions(bench: Bench) -> None:
    assert bench.run(b"\xf4")[0][:3] == ("exception", x86.GP, 0)  # hlt


# in al, 0x60; in eax, dx; out dx, ax; insb; rep outsb
@pytest.mark.parametrize("code", ["e460", "ed", "66ef", "6c", "f36e"])
def test_ports_fault_at_the_instruction(code: str) -> None:
    """And the next one is not carried out: stc; inc rbx; <port>; inc rbx."""
    if selfcheck().layout is None:
        pytest.skip(selfcheck().reason)
    bench = Bench(use_private=True)
    regs = bench.engine.regs
    regs.gpr[x86.RCX] = 4
    regs.gpr[x86.RSI] = regs.gpr[x86.RDI] = STACK_TOP - 256
    assert bench.run(bytes.fromhex("f9 48ffc3" + code + "48ffc3")) == [("exception", x86.GP, 0, False, CODE + 4)]
    assert regs.gpr[x86.RBX] == 1 and regs.rflags & 1


def test_software_interrupt(bench: Bench) -> None:
    assert bench.run(b"\xcd\x82") == [("exception", 0x82, 0, True, CODE + 2)]


def test_int_6_is_no_undefined_opcode(bench: Bench) -> None:
    assert bench.run(b"\xcd\x06") == [("exception", x86.UD, 0, True, CODE + 2)]


def test_breakpoint(bench: Bench) -> None:
    assert bench.run(b"\xcc") == [("exception", x86.BP, 0, True, CODE + 1)]


def test_undefined_opcode(bench: Bench) -> None:
    assert bench.run(b"\x0f\x0b") == [("invalid", CODE)]


def test_icebp_is_a_debug_trap(bench: Bench) -> None:
    assert bench.run(b"\x90\xf1\x90") == [("exception", x86.DB, 0, False, CODE + 2)]


def test_write_to_a_read_only_page(bench: Bench) -> None:
    """mov [0x401008], rax"""
    seen = bench.run(bytes.fromhex("4889042508104000"))
    want = x86.PF_PRESENT | x86.PF_WRITE | x86.PF_USER
    assert seen == [("exception", x86.PF, want, False, CODE)]
    assert bench.engine.regs.cr2 == RO_DATA + 8


def test_fetch_from_a_no_execute_page(bench: Bench) -> None:
    """mov eax, 0x402000; jmp rax"""
    seen = bench.run(bytes.fromhex("b800204000 ffe0"))
    assert seen[0][:3] == ("exception", x86.PF, x86.PF_PRESENT | x86.PF_USER | x86.PF_FETCH)


def test_two_page_faults_in_a_row_are_not_a_double_fault(bench: Bench) -> None:
    """mov rax, [0x500000] twice; each 8 bytes, skipped by the handler"""
    bench.handler.stop_at, bench.handler.skip = 2, 8
    seen = bench.run(bytes.fromhex("488b042500005000") * 2)
    assert [s[1] for s in seen] == [x86.PF, x86.PF]


def test_address_zero_is_an_address_like_any_other(bench: Bench) -> None:
    """xor eax, eax; jmp rax: a fault at 0, not the end of the run"""
    seen = bench.run(bytes.fromhex("31c0 ffe0"))
    assert seen[0][1] == x86.PF
    assert bench.engine.regs.cr2 == 0


def test_kick_ends_an_endless_loop_at_an_instruction_boundary(bench: Bench) -> None:
    """1: push rax; pop rax; inc rbx; jmp 1b — RSP is whole whenever it stops"""
    timer = threading.Timer(0.05, bench.engine.kick)
    timer.start()
    bench.run(bytes.fromhex("50 58 48ffc3 ebf9"))
    timer.join()
    assert bench.engine.regs.gpr[x86.RBX] > 0
    assert bench.engine.regs.gpr[x86.RSP] == STACK_TOP - 64
    assert bench.handler.seen == []


def test_code_written_by_the_host_runs_changed(bench: Bench) -> None:
    bench.run(bytes.fromhex("b801000000 0f05"))
    bench.run(bytes.fromhex("b802000000 0f05"))
    assert [s[2] for s in bench.handler.seen] == [1, 2]


def test_flush_page_shows_a_changed_entry(bench: Bench) -> None:
    """mov rax, [0x402000]; syscall, before and after the entry points at another frame"""
    bench.memory[0xA000], bench.memory[0xC000] = 1, 2
    code = bytes.fromhex("488b042500204000 0f05")
    bench.run(code)
    bench._table(4, 2, BASE + 0xC007 | x86.PTE_NX)
    bench.engine.flush_page(0x402000)
    bench.run(code)
    assert [s[2] for s in bench.handler.seen] == [1, 2]


def test_load_cr3_counts_as_a_complete_flush(bench: Bench) -> None:
    before = bench.engine.flush_epoch
    bench.engine.load_cr3(BASE + 0x1000)
    assert bench.engine.flush_epoch > before
    assert bench.engine.regs.cr3 == BASE + 0x1000


def test_task_switched_traps_the_fpu(bench: Bench) -> None:
    bench.engine.regs.task_switched = True
    assert bench.run(bytes.fromhex("d9e8"))[0][1] == x86.NM  # fld1
    bench.engine.regs.task_switched = False
    bench.handler.seen.clear()
    assert bench.run(bytes.fromhex("d9e8 0f05"))[0][0] == "syscall"


def test_flags_round_trip(bench: Bench) -> None:
    regs = bench.engine.regs
    for flags in (0x202, 0x202 | x86.FLAG_CF | x86.FLAG_ZF, 0x202 | x86.FLAG_DF | x86.FLAG_OF | x86.FLAG_SF):
        regs.rflags = flags
        assert regs.rflags & 0xFFF == flags


def test_saved_state_restores(bench: Bench) -> None:
    """movq xmm3, rax — the FPU and vector registers belong to the state"""
    bench.engine.regs.gpr[x86.RAX] = 0x1122_3344_5566_7788
    bench.run(bytes.fromhex("66480f6ed8 0f05"))
    state = bench.engine.save_cpu()
    bench.engine.regs.gpr[x86.RAX] = 0
    bench.run(bytes.fromhex("66480f6ed8 0f05"))
    bench.engine.restore_cpu(state)
    bench.run(bytes.fromhex("66480f7ed9 0f05"))  # movq rcx, xmm3
    assert bench.engine.regs.gpr[x86.RCX] == 0x1122_3344_5566_7788


def test_ports_read_as_an_empty_bus_on_the_public_path() -> None:
    """in al, 0x64; syscall"""
    bench = Bench(use_private=False)
    assert bench.run(bytes.fromhex("31c0 e464 0f05"))[0][2] == 0xFF


@pytest.mark.parametrize("code", ["0fa2", "660fa2", "f3480fa2"])
def test_a_watched_cpuid_is_one_step(code: str) -> None:
    """syscall (that sets TF); cpuid, with prefixes; inc rsi"""
    bench = Bench(True, Stepper)
    assert bench.run(bytes.fromhex("0f05" + code + "48ffc6"))[0][:2] == ("exception", x86.DB)
    assert bench.engine.regs.rip == CODE + 2 + len(code) // 2
    assert bench.engine.regs.gpr[x86.RBX] == 2


def test_cpuid_is_the_handlers_to_answer(bench: Bench) -> None:
    """mov eax, 0x40000000; mov ecx, 7; cpuid; syscall"""
    seen = bench.run(bytes.fromhex("b800000040 b907000000 0fa2 0f05"))
    assert bench.handler.asked == (0x4000_0000, 7)
    assert seen == [("syscall", CODE + 14, 1)]
    assert [bench.engine.regs.gpr[r] for r in (x86.RBX, x86.RCX, x86.RDX)] == [2, 3, 4]


def test_system_calls_come_through_beside_cpuid(bench: Bench) -> None:
    """cpuid; syscall; jmp back, while another thread stops the engine again and again."""
    direct = bench.engine.runs_32_bit
    bench.handler.stop_at = 3000 if direct else 300
    bench.handler.skip = 0
    over = threading.Event()

    def kick() -> None:
        while not over.is_set():
            bench.engine.kick()

    thread = threading.Thread(target=kick)
    code = bytes.fromhex("48ffc6 0fa2 0f05 ebf7")  # inc rsi; cpuid; syscall; jmp to the start
    bench.memory[0x8000 : 0x8000 + len(code)] = code
    bench.engine.memory_written(BASE + 0x8000, 0x1000)
    bench.engine.regs.rip = CODE
    bench.engine.regs.gpr[x86.RSI] = 0
    thread.start()
    while len(bench.handler.seen) < bench.handler.stop_at:
        bench.engine.run()
    over.set()
    thread.join()
    assert {what for what, *_ in bench.handler.seen} == {"syscall"}
    assert bench.engine.regs.gpr[x86.RSI] == len(bench.handler.seen), "each round made its call"
    if direct:
        assert bench.handler.answered == len(bench.handler.seen), "and asked the handler, not the engine"


def test_hidden_features_are_gone_from_the_processor() -> None:
    """popcnt rax, rax"""
    bench = Bench(True)
    assert bench.engine.hide_features({(1, 2): 1 << 23, (7, 1): 1 << 3}) is (selfcheck().layout is not None)
    if selfcheck().layout is None:
        pytest.skip(selfcheck().reason)
    assert not bench.engine.cpuid(1, 0)[2] >> 23 & 1 and bench.engine.cpuid(1, 0)[2] >> 20 & 1
    assert bench.run(bytes.fromhex("f3480fb8c0")) == [("invalid", CODE)]


def test_cpuid_is_the_chosen_model(bench: Bench) -> None:
    eax, _, ecx, _ = bench.engine.cpuid(1, 0)
    assert eax & 0x0FFF_0FF0 == 0x0002_06C0  # Westmere: family 6, model 0x2c
    assert not ecx & (1 << 26), "XSAVE cannot be emulated, so it must not be offered"


def test_dropped_translations_are_made_again(bench: Bench) -> None:
    code = bytes.fromhex("b807000000 0f05")
    bench.run(code)
    bench.engine.drop_translations()
    bench.run(code)
    assert [s[2] for s in bench.handler.seen] == [7, 7]


class Stepper(Recorder):
    """Answers the first `syscall` by setting TF and going on behind it, as an iret to a traced program does."""

    def syscall(self) -> None:
        self.engine.regs.rflags = 0x202 | x86.FLAG_TF

    def exception(self, vector: int, error_code: int, software: bool) -> None:
        self.engine.regs.rflags = 0x202
        super().exception(vector, error_code, software)


@pytest.mark.parametrize("use_private", [True, False])
def test_a_step_set_by_the_handler_is_taken_behind_one_instruction(use_private: bool) -> None:
    """syscall; inc rbx; inc rbx; inc rbx"""
    bench = Bench(use_private, Stepper)
    bench.engine.regs.gpr[x86.RBX] = 0
    seen = bench.run(bytes.fromhex("0f05 48ffc3 48ffc3 48ffc3"))
    assert seen[0][:2] == ("exception", x86.DB)
    assert (bench.engine.regs.gpr[x86.RBX], bench.engine.regs.rip) == (1, CODE + 5)


@pytest.mark.parametrize("code", ["f390", "f3f390", "f348 90", "66f3 90"])
def test_a_pause_is_told_while_it_is_watched(code: str) -> None:
    """pause, with more prefixes than it needs; syscall"""
    bench, pause = Bench(True), bytes.fromhex(code)
    bench.engine.watch_pauses(True)
    assert bench.run(pause + b"\x0f\x05") == [("spinning", CODE + len(pause))]
    bench.engine.watch_pauses(False)
    assert bench.run(pause + b"\x0f\x05")[1][0] == "syscall"


def test_a_nop_and_an_exchange_are_no_pause() -> None:
    """nop; rep xchg r8d, eax; syscall"""
    bench = Bench(True)
    bench.engine.watch_pauses(True)
    bench.engine.regs.gpr[x86.R8], bench.engine.regs.gpr[x86.RAX] = 5, 6
    assert bench.run(bytes.fromhex("90 f34190 0f05"))[0][0] == "syscall"
    assert (bench.engine.regs.gpr[x86.R8], bench.engine.regs.gpr[x86.RAX]) == (6, 5)


def test_a_watched_pause_is_one_step() -> None:
    """syscall; pause; inc rbx"""
    bench = Bench(True, Stepper)
    bench.engine.watch_pauses(True)
    assert bench.run(bytes.fromhex("0f05 f390 48ffc3"))[0][:2] == ("exception", x86.DB)
    assert bench.engine.regs.rip == CODE + 4


def test_the_public_path_runs_on_at_a_pause() -> None:
    bench = Bench(False)
    bench.engine.watch_pauses(True)
    assert bench.run(bytes.fromhex("f390 0f05"))[0][0] == "syscall"
