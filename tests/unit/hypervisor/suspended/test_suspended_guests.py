"""Micro-guests that suspend: they go on where they were, or in another machine on other frames, from a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from harness import GuestRun, build, guest_runs, running

from hypervisor.host.frozen import FrozenMemory, open_pagemap
from hypervisor.suspended.capture import capture
from hypervisor.suspended.saver import MachineSaver
from hypervisor.suspended.transfer import write

pytestmark = pytest.mark.skipif(bool(build.available()), reason=str(build.available()))
ELSEWHERE = {"base_mfn": 0x31000, "domid": 9}


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from guest_runs()


def awake(run: GuestRun, number: int, how: str) -> str:
    """The line that the guest prints when it is awake again: nothing in it is bad."""
    run.wait_text(f"suspend: awake {number}, {how}, ")
    line = next(line for line in run.text.splitlines() if line.startswith(f"suspend: awake {number}, "))
    assert "BAD" not in line and f"domid {run.domid}" in line, line
    return line


@pytest.mark.parametrize("cmdline", ["", "tree", "balloon=100"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_goes_on_elsewhere(runs: list[GuestRun], cmdline: str, vcpus: int) -> None:
    here = running(runs, "suspend", cmdline=cmdline, vcpus=vcpus, parks=True)
    here.wait_text("suspend: ready")
    here.suspend()
    image = here.stream()
    pages = here.call(here.machine.domain.frames.pages)
    there = running(runs, "suspend", stream=image, vcpus=vcpus, parks=True, **ELSEWHERE)
    line = awake(there, 1, "elsewhere")
    assert ("second good" in line) == (vcpus == 2)
    assert there.call(there.machine.domain.recount) == []
    assert there.call(there.machine.domain.frames.pages) == pages
    there.type("still there\r")
    there.wait_text("echo: still there")
    there.suspend()
    back = running(runs, "suspend", stream=there.stream(), vcpus=vcpus)
    awake(back, 2, "elsewhere")
    back.request_shutdown("poweroff")
    back.wait_end()


def test_goes_on_where_it_was(runs: list[GuestRun]) -> None:
    run = running(runs, "suspend", vcpus=2, parks=True)
    run.wait_text("suspend: ready")
    for number in (1, 2):
        run.suspend()
        run.stream()
        run.wake()
        awake(run, number, "cancelled")
    assert run.call(run.machine.domain.recount) == []
    run.request_shutdown("poweroff")
    run.wait_end()


@pytest.mark.parametrize("name", ["suspend", "suspend32"])
def test_it_is_written_as_it_was_while_it_runs_on(runs: list[GuestRun], name: str) -> None:
    run = running(runs, name, vcpus=2, parks=True)
    if name == "suspend":
        run.wait_text("suspend: ready")
        run.suspend()
    run.wait_suspended()
    standing, saver, memory = run.stream(), MachineSaver(run.machine), run.machine.domain.memory
    pagemap = open_pagemap()
    try:
        rings = [memory.index(mfn) for mfn in (run.boot.store_mfn, run.boot.console_mfn)]
        assert saver.freeze(lambda: FrozenMemory(memory, run.memory_fd, rings, pagemap))
        run.wake()
        run.wait_text(": awake")
        frozen = bytearray()
        assert saver.write(frozen.extend, run.memory_fd) > 0
        assert len(frozen) == len(standing)
        other = np.flatnonzero(np.frombuffer(frozen, np.uint8) != np.frombuffer(standing, np.uint8))
        assert other[-1] - other[0] < 8, "all but the time that had passed"
        saver.thaw()
        assert memory.private is None
    finally:
        os.close(pagemap)
    assert run.call(run.machine.domain.recount) == []
    run.wait_suspended(2) if name == "suspend32" else run.suspend()
    direct, through_memfd = bytearray(), bytearray()
    captured = run.call(lambda: capture(run.machine.domain))
    write(captured, direct.extend)
    write(captured, through_memfd.extend, run.memory_fd)
    assert direct == through_memfd


@pytest.mark.parametrize("cmdline", ["", "t"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_32_bit_guest(runs: list[GuestRun], cmdline: str, vcpus: int) -> None:
    here = running(runs, "suspend32", cmdline=cmdline, vcpus=vcpus, parks=True)
    here.wait_suspended()
    image = here.stream()
    here.wake()
    here.wait_text("suspend32: awake, cancelled, ")
    here.wait_suspended(2)
    there = running(runs, "suspend32", stream=image, vcpus=vcpus, parks=True, **ELSEWHERE)
    there.wait_suspended()
    assert there.call(there.machine.domain.recount) == []
    last = running(runs, "suspend32", stream=there.stream(), vcpus=vcpus)
    last.wait_text("suspend32: done")
    for run, how in ((here, "cancelled"), (there, "elsewhere"), (last, "elsewhere")):
        line = next(line for line in run.text.splitlines() if "awake" in line)
        assert how in line and "BAD" not in line and ("second good" in line) == (vcpus == 2), line
    last.wait_end()


def test_memory_that_was_never_written_costs_nothing(runs: list[GuestRun]) -> None:
    """Neither saving nor restoring allocates it."""
    here = running(runs, "suspend", pages=16384, parks=True)
    here.wait_text("suspend: ready")
    here.suspend()
    captured = here.call(lambda: capture(here.machine.domain))
    image, before = bytearray(), here.resident_pages()
    write(captured, image.extend, here.memory_fd)
    assert here.resident_pages() == before < 1024
    other = bytearray()
    write(captured, other.extend)
    assert image == other
    there = running(runs, "suspend", stream=bytes(image), pages=16384, **ELSEWHERE)
    awake(there, 1, "elsewhere")
    assert there.resident_pages() < 1024
