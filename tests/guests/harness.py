"""Run a micro-guest in this process: the domain builder, a `Machine` in a thread, a console and a xenstore.

Everything of the host side happens in the machine's own thread, so a test has nothing to lock; it waits on
conditions with a deadline and never sleeps.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import mmap
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import ModuleType
from typing import Any

import numpy as np

from hypervisor.devices.console import ConsoleRing
from hypervisor.domain import MachineConfig
from hypervisor.ending import Shutdown
from hypervisor.engines.tsc import measure_khz
from hypervisor.machine import Machine
from hypervisor.memory import layout
from hypervisor.moving import MovingState
from hypervisor.suspended.capture import capture
from hypervisor.suspended.rebuild import rebuild
from hypervisor.suspended.transfer import Incoming, write
from hypervisor.toolstack import builder
from hypervisor.toolstack.api import ShutdownReason
from hypervisor.toolstack.stream.source import Source
from hypervisor.types import Mfn
from hypervisor.xenstore import domain_nodes
from hypervisor.xenstore.domain_nodes import DomainNodes
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.ring import XenstoreRing
from hypervisor.xenstore.server import Server

UUID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
BASE_MFN = 0x20000
DEADLINE = 30.0
"""Seconds that a guest may take for anything; a loaded machine must not fail a test."""
STORE_PORT, CONSOLE_PORT = 1, 2


def _load_builder() -> ModuleType:
    """``build.py`` beside this file: the tests folder is no package."""
    name = "reeve_guest_build"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name("build.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


build = _load_builder()


@functools.cache
def _kernel(name: str) -> builder.Kernel:
    return builder.load_kernel(str(build.build_guest(name)))


@functools.cache
def _tsc_khz() -> int:
    return measure_khz()


class MemoryLog:
    """The console's log, kept in memory."""

    def __init__(self, changed: threading.Condition) -> None:
        self.data = bytearray()
        self._changed = changed

    def write(self, data: bytes) -> None:
        with self._changed:
            self.data += data
            self._changed.notify_all()

    def tail(self, size: int) -> bytes:
        return bytes(self.data[-size:])

    def close(self) -> None:
        return


def make_memory(max_pages: int) -> mmap.mmap:
    """An anonymous file of a domain's whole extent, mapped."""
    size = layout.total_frames(max_pages) * mmap.PAGESIZE
    fd = memory_file(size)
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def memory_file(size: int) -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class GuestRun:
    """One micro-guest, built and paused; `start` lets it go.

    :param pages: RAM at boot and at most.
    :param resumed: a saved state, the memory and the boot state that belong to it: that guest goes on.
    :param stream: a libxc stream: the guest in it goes on, in a new machine.
    :param arriving: a guest that will come here by `moving`: the machine is made for it and waits.
    :param parks: a suspended guest waits for `GuestRun.wake`, instead of ending.
    :ivar moving: as the host's domain process has it.
    :ivar ended: why the run loop returned, None while it runs.
    :ivar suspensions: how often it has suspended itself.
    """

    def __init__(
        self,
        name: str,
        *,
        cmdline: str = "",
        pages: int = 2048,
        public: bool = False,
        base_mfn: int = BASE_MFN,
        domid: int = 7,
        vcpus: int = 1,
        cpu_policy: str | dict[str, Any] = "engine",
        fast_path: str = "auto",
        resumed: tuple[dict[str, Any], bytes, Any] | None = None,
        stream: bytes | None = None,
        arriving: GuestRun | None = None,
        parks: bool = False,
    ) -> None:
        size = layout.total_frames(pages) * mmap.PAGESIZE
        self.memory_fd = memory_file(size)
        self.memory = mmap.mmap(self.memory_fd, size)
        if stream is not None:
            incoming = Incoming(Source.of_file(io.BytesIO(stream)))
            incoming.begin()
            bits, ram = incoming.bits, 0
            if incoming.policy is not None:
                cpu_policy = incoming.policy.save()
            state, frames = incoming.finish(np.frombuffer(self.memory, np.uint64, pages * 512), pages)
        else:
            bits, ram = _kernel(name).bits, pages
        config = MachineConfig(
            UUID, name, domid, base_mfn, ram, pages, vcpus, vcpus,
            tsc_khz=_tsc_khz(), bits=bits, cpu_policy=cpu_policy,
        )  # fmt: skip
        self.machine = Machine(
            config, self.memory, notify_host=self._from_guest, use_private=not public, fast_path=fast_path
        )
        view = memoryview(self.memory)
        self.suspensions = 0
        if parks:
            self.machine.on_suspend = self._on_suspend
        if stream is not None:
            self.boot = rebuild(self.machine.domain, state, frames, (STORE_PORT, CONSOLE_PORT))
        elif arriving is not None:
            self.boot = arriving.boot
        elif resumed is None:
            target, info = builder.BuildMemory(view, Mfn(base_mfn), pages), Mfn(self.machine.shared_info_mfn)
            self.boot = builder.build(target, _kernel(name), None, cmdline, shared_info_mfn=info)
            self.machine.start(self.boot)
        else:
            state, memory, self.boot = resumed
            self.memory[:] = memory
            self.machine.domain.restore(state)
        facts = {"store_mfn": int(self.boot.store_mfn), "console_mfn": int(self.boot.console_mfn)}
        self.moving = MovingState(self.machine, facts, incoming=arriving is not None)
        self.changed = threading.Condition()
        self.ended: Shutdown | None = None
        self._timers: list[threading.Timer] = []
        self._connected = False
        if arriving is None:
            self._connect(view, name, domid, pages)
        else:  # rings that are not there yet cannot be attached to
            self._late = lambda: self._connect(view, name, domid, pages)
        self._thread = threading.Thread(target=self._run, name=f"guest-{name}", daemon=True)
        self._thread.start()

    def _connect(self, view: memoryview, name: str, domid: int, pages: int) -> None:
        self._connected = True
        base, machine = self.machine.config.base_mfn, self.machine
        self.server = Server()
        self.store = Handle(self.server)
        domain_nodes.prepare_host(self.store)
        nodes = DomainNodes(
            domid=domid, uuid=UUID, name=name, memory_kib=pages * 4, max_memory_kib=pages * 4,
            vcpus=machine.config.vcpus, max_vcpus=machine.config.max_vcpus,
            store_port=STORE_PORT, store_mfn=self.boot.store_mfn, console_port=CONSOLE_PORT,
            console_mfn=self.boot.console_mfn, owner="test", kernel=name, ramdisk="", cmdline="",
            console_tty="", start_time=0.0,
        )  # fmt: skip
        domain_nodes.lay_out(self.store, nodes)
        page = (self.boot.store_mfn - base) * 4096
        self._store_ring = XenstoreRing(
            self.server, domid, view[page : page + 4096], lambda: machine.notify(STORE_PORT), self._call_later
        )
        page = (self.boot.console_mfn - base) * 4096
        self.log = MemoryLog(self.changed)
        sink: Any = self.log
        self.console = ConsoleRing(
            view[page : page + 4096], lambda: machine.notify(CONSOLE_PORT), sink, self._call_later
        )
        self.domid = domid

    def _on_suspend(self) -> None:
        with self.changed:
            self.suspensions += 1
            self.changed.notify_all()

    def _from_guest(self, port: int) -> None:
        if port == STORE_PORT:
            self._store_ring.on_notify()
        elif port == CONSOLE_PORT:
            self.console.on_notify()

    def _call_later(self, seconds: float, function: Callable[[], None]) -> None:
        if not seconds:
            self.machine.post(function)
            return
        timer = threading.Timer(seconds, lambda: self.machine.post(function))
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        if self.moving.incoming:
            self.moving.stand_still()
        ended = self.machine.run()
        self.moving.ended()
        if self._connected:
            self.console.close()
        with self.changed:
            self.ended = ended
            self.changed.notify_all()

    # -- what tests do

    def start(self) -> GuestRun:
        if not self._connected:
            self._late()
        self.machine.unpause()
        return self

    @property
    def text(self) -> str:
        """All that the guest printed; here, if it came from elsewhere."""
        return self.log.data.decode("latin-1")

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
        """Until `ready`, asked after each piece of output and at the end of the guest."""
        with self.changed:
            done = self.changed.wait_for(lambda: ready() or self.ended is not None, seconds)
        assert done and ready(), f"no {what}; ended: {self.ended}; the guest said:\n{self.text}"

    def wait_text(self, text: str) -> None:
        self.wait(lambda: text in self.text, repr(text))

    def wait_end(self, seconds: float = DEADLINE) -> Shutdown:
        self.wait(lambda: self.ended is not None, "end", seconds)
        self._thread.join(DEADLINE)
        assert self.ended is not None
        return self.ended

    def call(self, function: Callable[[], Any], seconds: float = DEADLINE) -> Any:
        """`function` in the machine's thread, between two guest instructions; its result, or what it raises."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as exc:
                done.set_exception(exc)

        self.machine.post(run)
        try:
            return done.result(seconds)
        except FutureTimeout:
            raise AssertionError(f"the machine took no post; ended: {self.ended}") from None

    def wait_stats(self, ready: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Ask for the machine's numbers, through its own thread, until `ready` likes them."""
        end = time.monotonic() + DEADLINE
        while not ready(stats := self.call(self.machine.stats)):
            assert time.monotonic() < end, f"no {what}: {stats}"
        return dict(stats)

    def type(self, text: str) -> None:
        self.call(lambda: self.console.send_input(text.encode()))

    def request_shutdown(self, reason: str) -> None:
        self.call(lambda: domain_nodes.request_shutdown(self.store, self.domid, reason))

    def suspend(self) -> None:
        """Ask for it, and wait until it is done."""
        before = self.suspensions
        self.request_shutdown("suspend")
        self.wait_suspended(before + 1)

    def wait_suspended(self, times: int = 1) -> None:
        self.wait(lambda: self.suspensions >= times, "suspension")

    def wake(self) -> None:
        """It goes on where it is."""
        self.machine.resume()

    def stream(self) -> bytes:
        """The suspended guest as a libxc stream."""
        out = bytearray()
        write(self.call(lambda: capture(self.machine.domain)), out.extend)
        return bytes(out)

    def resident_pages(self) -> int:
        """Of its memory, what the host has really given."""
        return os.fstat(self.memory_fd).st_blocks * 512 // mmap.PAGESIZE

    def failures(self) -> list[str]:
        """The guest's own verdicts that were not PASS."""
        return [line for line in self.text.splitlines() if line.startswith("FAIL")]

    def close(self) -> None:
        """End it, however it is."""
        self.moving.incoming = False
        self.moving.thaw()
        if self.ended is None:
            self.machine.stop()
            self.wait_end()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1


def running(runs: list[GuestRun], *args: Any, **kwargs: Any) -> GuestRun:
    """A started guest that is remembered in `runs` for the end of the test."""
    run = GuestRun(*args, **kwargs)
    runs.append(run)
    return run.start()


def guest_runs() -> Iterator[list[GuestRun]]:
    """Body of a fixture: the runs of one test, all ended behind it."""
    runs: list[GuestRun] = []
    yield runs
    for run in runs:
        run.close()


EXPECTED_POWEROFF = Shutdown(ShutdownReason.POWEROFF)
