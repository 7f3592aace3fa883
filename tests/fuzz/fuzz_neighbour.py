"""A well-behaved domain beside the one that is fuzzed: its heart must not stutter, its memory must stay its own.

It runs in a thread of the same process, which is harsher than the domain processes of a host. How late a thread gets
the processor depends on the machine; so a bystander thread that only sleeps as long as the guest does is the measure:
the heart may be late by what the bystander was, and `SLACK_NS`.
"""

from __future__ import annotations

import struct
import threading
import time
from types import TracebackType

import harness

PERIOD_S = 0.01
SLACK_NS = 400_000_000
"""Several turns at the interpreter lock, which each may take 5 ms and more on a loaded machine, and one timer tick of
the engine; one call of the other guest may take 100 ms (`fuzz_machine.LONGEST_CALL_NS`), two follow each other."""
MARK = struct.pack("<2Q", 0x7472616548207461, 0x21747261656220)


class Neighbour:
    """A context manager around the beating guest.

    :ivar base_mfn: its first frame, for the other guest to try.
    """

    base_mfn = 0x40000

    def __enter__(self) -> Neighbour:
        self.run = harness.GuestRun("heartbeat", base_mfn=self.base_mfn, domid=8).start()
        self._at = self.run.memory.find(MARK)
        assert self._at >= 0, "the neighbour has no pulse"
        self._end = threading.Event()
        self.bystander_worst_ns = 0
        self._bystander = threading.Thread(target=self._sleep, daemon=True)
        self._bystander.start()
        deadline = time.monotonic() + harness.DEADLINE
        while self.pulse()[0] < 10:
            assert time.monotonic() < deadline, f"the neighbour has no pulse: {self.run.ended} {self.run.text}"
            self._end.wait(PERIOD_S)
        struct.pack_into("<Q", self.run.memory, self._at + 32, 0)
        self._first = self.pulse()[0]
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._bystander.join()
        self.run.close()

    def _sleep(self) -> None:
        while not self._end.is_set():
            started = time.monotonic_ns()
            time.sleep(PERIOD_S)
            late = time.monotonic_ns() - started - int(PERIOD_S * 1e9)
            self.bystander_worst_ns = max(self.bystander_worst_ns, late)

    def pulse(self) -> tuple[int, int, int, int]:
        """Beats, how late the last one was and the worst (ns), damaged words."""
        return struct.unpack_from("<4Q", self.run.memory, self._at + 16)

    def faults(self) -> list[str]:
        """What is wrong with the neighbour."""
        beats, _, worst, damaged = self.pulse()
        found = []
        if self.run.ended is not None:
            found.append(f"the neighbour ended: {self.run.ended}")
        if damaged:
            found.append(f"{damaged} words of the neighbour's memory changed")
        if worst > self.bystander_worst_ns + SLACK_NS:
            bystander = self.bystander_worst_ns / 1e6
            found.append(f"the neighbour's heart was {worst / 1e6:.0f} ms late, a sleeping thread {bystander:.0f} ms")
        waited = time.monotonic() - self._since
        if waited > 2 and beats - self._first < waited / (PERIOD_S * 10):
            found.append(f"the neighbour's heart beat {beats - self._first} times in {waited:.1f} s")
        return found
