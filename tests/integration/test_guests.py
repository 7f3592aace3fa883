"""The micro-guests that judge for themselves, on a real host process: sandboxed domain processes and real rings.

`tests/unit/hypervisor/test_machine_guests.py` runs them on the machine alone; here nothing is simulated but the CPU.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import build as guests
from host_rig import HostRig, until

from hypervisor.errors import Unsupported
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, KernelBoot, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

PAGE = pytest.mark.parametrize("page", [False, True], ids=["syscall", "hypercall-page"])
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
DEADLINE = 60.0

JUDGES = ("traps", "mmu", "tables", "hypercalls", "channels", "ticks", "memtouch", "grants", "cpuid")


class Host:
    def __init__(self, rig: HostRig, toolstack: EmbeddedToolstack) -> None:
        self.rig = rig
        self.toolstack = toolstack

    def start(self, name: str, cmdline: str = "", *, page: bool = False) -> str:
        """The UUID of a guest that runs, and is kept when it ends."""
        kernel = str(guests.build_guest(name, USE_HYPERCALL_PAGE=page))
        ident = str(uuid.uuid4())
        boot = KernelBoot(kernel=kernel, cmdline=cmdline)
        spec = DomainSpec(ident, f"{name}-{ident[:8]}", boot, 16, on_poweroff=OnEvent.PRESERVE, owner="tests")
        self.toolstack.create(spec)
        self.toolstack.unpause(ident)
        return ident

    def end(self, ident: str) -> tuple[DomainInfo, str]:
        """How it ended, and all it said."""
        info = self.toolstack.wait(ident, ENDED, DEADLINE)
        assert info is not None
        return info, self.toolstack.console_log(ident).decode("latin-1")

    def wait_text(self, ident: str, text: str) -> None:
        until(lambda: text.encode() in self.toolstack.console_log(ident), repr(text))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("guests"), REAL_RUNTIME, sandbox="required")
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def host(rig: HostRig) -> Iterator[Host]:
    toolstack = rig.connect()
    yield Host(rig, toolstack)
    for info in toolstack.list_domains():
        toolstack.destroy(info.uuid)
    assert rig.left_behind() == []
    toolstack.close()


@PAGE
@pytest.mark.parametrize("name", JUDGES)
def test_a_guest_finds_what_it_would_on_xen(host: Host, name: str, page: bool) -> None:
    cmdline = ""
    if name == "mmu":
        neighbour = host.start("idle")
        cmdline = f"foreign={host.rig.record(neighbour)['claim']['base_mfn'] + 5:#x}"
    info, said = host.end(host.start(name, cmdline, page=page))
    assert (info.state, info.shutdown_reason) == (DomainState.SHUTDOWN, ShutdownReason.POWEROFF), info.detail
    assert [line for line in said.splitlines() if line.startswith("FAIL")] == [], said
    assert f"{name}: OK" in said, said[-500:]
    assert name != "mmu" or "PASS refused: a neighbour's frame" in said


@PAGE
def test_hello_reads_xenstore_echoes_and_obeys(host: Host, page: bool) -> None:
    ident = host.start("hello", "greet", page=page)
    host.wait_text(ident, "hello: ready")
    console = host.toolstack.open_console(ident)
    console.write(b"a line from the host\n")
    host.wait_text(ident, "echo: a line from the host")
    console.close()
    host.toolstack.shutdown(ident)
    info, said = host.end(ident)
    assert info.shutdown_reason is ShutdownReason.POWEROFF
    assert f"hello: name {info.name}" in said and f"hello: domid {info.domid}" in said and 'cmdline "greet"' in said


def test_a_32_bit_guest_finds_what_it_would_on_xen(host: Host) -> None:
    if "pv32" not in host.toolstack.host_info().capabilities:
        pytest.skip("32-bit guests need the engine's direct path (see `reeve doctor`)")
    info, said = host.end(host.start("hello32"))
    assert info.shutdown_reason is ShutdownReason.POWEROFF, info.detail
    assert "FAIL" not in said and "hello32: done" in said, said


@PAGE
def test_fifo_events(host: Host, page: bool) -> None:
    """It resets all ports, the console's too, so that what it says goes nowhere: its end is its verdict."""
    info, _ = host.end(host.start("fifo", "console_io crash_if_failed", page=page))
    assert info.shutdown_reason is ShutdownReason.POWEROFF, "FAIL; tests/unit/hypervisor/evtchn says which case"


def test_a_host_levels_the_processors_of_its_guests(tmp_path: Path) -> None:
    rig = HostRig(tmp_path, REAL_RUNTIME, sandbox="required", cpu_policy="x86-64,+sse3")
    try:
        host = Host(rig, rig.start().connect())
        info, said = host.end(host.start("cpuid", "popcnt=0"))
        assert info.shutdown_reason is ShutdownReason.POWEROFF and "cpuid: OK" in said, said
        host.toolstack.close()
    finally:
        rig.stop()


def test_a_level_that_the_engine_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    rig = HostRig(tmp_path, REAL_RUNTIME, cpu_policy="x86-64-v3")
    try:
        host = Host(rig, rig.start().connect())
        with pytest.raises(Unsupported, match=r"cpu policy x86-64-v3: the engine has no .*avx2"):
            host.start("cpuid")
        assert not host.toolstack.list_domains()
        host.toolstack.close()
    finally:
        rig.stop()


def test_a_failed_case_crashes_a_guest_that_was_told_to(host: Host) -> None:
    """So the verdict above means something: a guest that was told wrongly what it may know of its processor."""
    info, _ = host.end(host.start("cpuid", "popcnt=0 count=10 crash_if_failed"))
    assert info.shutdown_reason is ShutdownReason.CRASH
