"""A machine whose guest carries out programs (tests/guests/fuzz.c), watched at each step.

Everything happens in the machine's own thread: the guest reports the end of a program with a console write, the
answer to which is the next program. Found faults are collected, never raised into the run loop.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import harness

from hypervisor.cpu.traps32 import HYPERCALL_VECTOR
from hypervisor.domain import Domain, MachineConfig
from hypervisor.domain32 import Domain32
from hypervisor.ending import Shutdown
from hypervisor.engines.tsc import measure_khz
from hypervisor.machine import Machine
from hypervisor.toolstack import builder
from hypervisor.types import Mfn

PAGES = 1024
CALLS = 64
CALL_SIZE = 88
IMAGE_SIZE = 512
"""Bytes of memory that a call may have for its arguments."""
DONE = b"\1fuzz: batch done"
MARK = struct.pack("<2Q", 0x7A7A75667A7A7566, 0x21646C726F77206F)
LONGEST_CALL_NS = 100_000_000
"""CPU time that a call may take between two looks at whether it should give way."""
STUCK_S = 2.0
"""A guest that reports nothing for so long has put itself to sleep, or runs in circles."""
MOST_BROKEN = 5
"""A guest that lost memory it cannot do without is not worth going on with."""
VIRT_BASE = {64: 0xFFFF_FFFF_8000_0000, 32: 0xC000_0000}
"""Where the guests' linear mappings begin, by word size."""
GUESTS = {64: "fuzz", 32: "fuzz32"}
BASE_MFN = 0x20000

_CALL = struct.Struct("<9QqQ")
_HEAD = struct.Struct("<6Q")
_FIELDS = (
    "arena",
    "arena_pages",
    "window",
    "window_l1",
    "edge",
    "info",
    "recover",
    "spin",
    "spin_stack",
    "events",
    "broken",
)
(HYPERCALL, WRITE8, WRITE4, WRITE1, EXCHANGE, COMPARE_EXCHANGE, OR8, AND8, FILL, IRET, USER, TOUCH) = range(12)
NOTHING = 12
"""No kind that the guests know: the line does nothing."""


@dataclasses.dataclass(slots=True)
class Call:
    """One line of a program: see `struct call` of the guest. `image` lies at the address `Program.image(n)`."""

    number: int
    arguments: tuple[int, ...]
    kind: int = HYPERCALL
    delay: int = 0
    image: bytes = b""


class _Watched:
    """A domain that notes for how long nobody looked at `preempt`."""

    looked_ns = 0
    longest_ns = 0
    wanted = False

    @property
    def preempt(self) -> bool:
        now = time.thread_time_ns()
        if now - self.looked_ns > self.longest_ns:
            self.longest_ns = now - self.looked_ns
        self.looked_ns = now
        return self.wanted

    @preempt.setter
    def preempt(self, value: bool) -> None:
        self.wanted = value


class Watched(_Watched, Domain):
    """See `_Watched`."""


class Watched32(_Watched, Domain32):
    """See `_Watched`."""


class FuzzMachine:
    """A fresh machine with the fuzz guest, paused until `run`.

    :param next_program: called with this after each program, at first before any; puts the next one in place with
        `load` or `load_raw`. False ends the run.
    :param bits: word size of the guest. `linear`: linear page tables are allowed.
    :ivar faults: what was wrong, as text.
    :ivar calls: hypercalls that were made; `beats` programs that were carried out.
    """

    def __init__(
        self,
        next_program: Callable[[FuzzMachine], bool],
        *,
        public: bool = False,
        vcpus: int = 2,
        bits: int = 64,
        linear: bool = False,
    ) -> None:
        self.memory = harness.make_memory(PAGES)
        self.bits, self.virt_base = bits, VIRT_BASE[bits]
        uuid = "3f2504e0-4f89-41d3-9a0c-0305e82c3302"
        config = MachineConfig(
            uuid, "fuzz", 9, BASE_MFN, PAGES, PAGES, vcpus, vcpus, tsc_khz=_khz(), bits=bits, linear_page_tables=linear
        )
        self.machine = Machine(config, self.memory, notify_host=lambda _port: None, use_private=not public)
        self.domain: Any = self.machine.domain
        self.domain.__dict__.pop("preempt")
        self.domain.__class__ = Watched if bits == 64 else Watched32
        kernel = harness._kernel(GUESTS[bits])
        target = builder.BuildMemory(memoryview(self.memory), Mfn(BASE_MFN), PAGES)
        self.boot = builder.build(target, kernel, None, "", shared_info_mfn=Mfn(self.machine.shared_info_mfn))
        self.machine.start(self.boot)
        self._box = self.memory.find(MARK)
        assert self._box >= 0, "the guest has no box"
        symbols = _symbols(bits)
        self._calls, self._images = symbols["calls"] - self.virt_base, symbols["images"] - self.virt_base
        self.big, self.trap_stack = symbols["big"], symbols["trap_stack_top"]
        self.iret_stack = symbols["iret_stack"] + 8192 - 64
        self._next = next_program
        self.domain.console = self._report
        self._watch_calls()
        self.faults: list[str] = []
        self.program: list[Call] = []
        self.where: dict[str, int] = {}
        self.beats = self.calls = 0
        self._streak = self._broken = 0
        self.slowest: tuple[int, str] = (0, "")
        self.ended: Shutdown | None = None
        self.check: Callable[[FuzzMachine], list[str]] = lambda fuzz: fuzz.domain.recount()

    # -- what is watched

    def _watch_calls(self) -> None:
        machine, domain = self.machine, self.domain
        dispatcher: Any = machine._dispatcher
        narrow = self.bits == 32
        inner, emulate = dispatcher.call if narrow else dispatcher.hypercall, machine.exception
        order = (3, 1, 2, 6, 7) if narrow else (7, 6, 2, 10, 8, 9)

        def hypercall() -> None:
            self.calls += 1
            gpr = domain.engine.regs.gpr
            what = f"hypercall {gpr[0]} ({', '.join(hex(gpr[n]) for n in order)})"
            self._timed(what, inner)

        def exception(vector: int, error_code: int, software: bool) -> None:
            if narrow and software and vector == HYPERCALL_VECTOR:
                emulate(vector, error_code, software)
            else:
                self._timed(f"vector {vector}", lambda: emulate(vector, error_code, software))

        if narrow:
            domain.traps.hypercall = hypercall
        else:
            dispatcher.hypercall = hypercall
        machine.exception = exception  # type: ignore[method-assign]

    def _timed(self, what: str, function: Callable[[], None]) -> None:
        domain = self.domain
        domain.looked_ns, domain.longest_ns = time.thread_time_ns(), 0
        self._reported_ns = 0
        try:
            function()
        finally:
            took = max(domain.longest_ns, time.thread_time_ns() - domain.looked_ns) - self._reported_ns
            if took > self.slowest[0]:
                self.slowest = (took, what)
            if took > LONGEST_CALL_NS:
                self.faults.append(f"{what} took {took / 1e6:.0f} ms of CPU time without giving way")

    def _report(self, data: bytes) -> None:
        if data != DONE:
            return
        self.beats += 1
        started = time.thread_time_ns()
        try:
            self._read_box()
            self.faults += self.check(self)
            broken = self._streak > MOST_BROKEN
            go_on = not self.faults and not broken and self._next(self)
        except Exception as exc:
            self.faults.append(f"the fuzzer itself: {type(exc).__name__}: {exc}")
            go_on = False
        if not go_on:
            self.machine.stop()
            self.load([])
        self._reported_ns = time.thread_time_ns() - started

    # -- the box

    def _read_box(self) -> None:
        """Addresses are read once: what the guest does later may go over its box, too."""
        at = self._box + 16 + 48 + 512
        values = dict(zip(_FIELDS, struct.unpack_from(f"<{len(_FIELDS)}Q", self.memory, at), strict=True))
        self._streak = self._streak + 1 if values["broken"] != self._broken else 0
        self._broken = values["broken"]
        self.where = self.where or values

    def image(self, number: int) -> int:
        """Guest address of the image of call `number`."""
        return self.virt_base + self._images + number * IMAGE_SIZE

    def load(self, program: list[Call]) -> None:
        self.program = program
        for number, call in enumerate(program[:CALLS]):
            at = self._calls + number * CALL_SIZE
            arguments = (*call.arguments, 0, 0, 0, 0, 0, 0)[:6]
            _CALL.pack_into(self.memory, at, call.number, *arguments, call.kind, call.delay, 0, 0)
            at = self._images + number * IMAGE_SIZE
            self.memory[at : at + IMAGE_SIZE] = call.image[:IMAGE_SIZE].ljust(IMAGE_SIZE, b"\0")
        struct.pack_into("<3Q", self.memory, self._box + 16, 0, len(program), 0)

    def load_raw(self, count: int, seed: int, values: list[int]) -> None:
        """Let the guest draw `count` calls itself, with arguments chosen from 64 `values`."""
        self.program = []
        struct.pack_into("<3Q", self.memory, self._box + 16, 1, count, seed or 1)
        struct.pack_into("<64Q", self.memory, self._box + 16 + 48, *values)

    def results(self) -> list[tuple[int, int]]:
        """(result, 1 + vector of the trap or 0) of each call of the program that was carried out last."""
        at = [self._calls + number * CALL_SIZE + 64 + 8 for number in range(len(self.program))]
        return [struct.unpack_from("<qQ", self.memory, where) for where in at]

    # -- running

    def run(self) -> Shutdown:
        """Until the guest ends, `next_program` says so, something is wrong or the guest got stuck."""
        # A guest that crashes is nothing to report here; and pytest keeps what is logged, with all that hangs on it.
        logging.getLogger("hypervisor.machine").setLevel(logging.ERROR)
        self.machine.unpause()
        finished = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(finished,), daemon=True)
        watcher.start()
        try:
            self.ended = self.machine.run()
        finally:
            finished.set()
            watcher.join()
        if "bug" in self.ended.detail or "engine" in self.ended.detail:
            self.faults.append(f"{self.ended.detail}; the program was {self.program}")
        return self.ended

    def _watch(self, finished: threading.Event) -> None:
        """Wake vCPUs that wait for ever; end a guest that goes round in circles."""
        beats, since = -1, 0.0
        while not finished.wait(0.02):
            if self.beats != beats:
                beats, since = self.beats, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                self.machine.stop()
                return
            if any(vcpu.blocked for vcpu in self.domain.vcpus):
                self.machine.post(self._wake)

    def _wake(self) -> None:
        for vcpu in self.domain.vcpus:
            if vcpu.blocked:
                vcpu.blocked, vcpu.poll = False, None


_cache: dict[str, Any] = {}


def _khz() -> int:
    if "khz" not in _cache:
        _cache["khz"] = measure_khz()
    return int(_cache["khz"])


# By word size (System V ABI): e_shoff, e_shentsize and e_shnum, a section header, and where in it type, offset, size
# and link are; a symbol, and where in it name and value are.
_ELF = {
    64: ("<Q", 0x28, 0x3A, "<IIQQQQIIQQ", "<IBBHQQ", 4),
    32: ("<I", 0x20, 0x2E, "<10I", "<IIIBBH", 1),
}


def _symbols(bits: int) -> dict[str, int]:
    """Addresses of the guest's own objects, from its ELF symbol table."""
    name = f"symbols{bits}"
    if name not in _cache:
        data = harness.build.build_guest(GUESTS[bits]).read_bytes()
        word, offset, counts, header, symbol, value_at = _ELF[bits]
        (sections,) = struct.unpack_from(word, data, offset)
        size, count = struct.unpack_from("<HH", data, counts)
        headers = [struct.unpack_from(header, data, sections + n * size) for n in range(count)]
        table = next(h for h in headers if h[1] == 2)
        names = headers[table[6]][4]
        found: dict[str, int] = {}
        for at in range(table[4], table[4] + table[5], struct.calcsize(symbol)):
            fields = struct.unpack_from(symbol, data, at)
            start = names + fields[0]
            found[data[start : data.index(b"\0", start)].decode()] = fields[value_at]
        _cache[name] = found
    return dict(_cache[name])


def seeded(seed: int) -> random.Random:
    return random.Random(seed)
