"""The whole way with the real machine: host process, zygote, sandboxed domain processes, micro-guests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "guests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import build as guests
from host_rig import HostRig, alive, kill_process, until

from hypervisor.errors import KernelInvalid, KernelNotXen, MemoryTooSmall, ToolstackError
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import Console, DomainInfo, DomainSpec, DomainState, KernelBoot, ShutdownReason
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
READY = b"hello: ready"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("machine"), REAL_RUNTIME, sandbox="required").start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    for info in made.list_domains():
        made.destroy(info.uuid)
    assert rig.left_behind() == []
    made.close()


def guest_spec(rig: HostRig, name: str, cmdline: str = "", **fields: object) -> DomainSpec:
    boot = KernelBoot(kernel=str(guests.build_guest(name)), cmdline=cmdline)
    spec = rig.spec("", memory_mib=16)
    return DomainSpec(**{**{f: getattr(spec, f) for f in spec.__slots__}, "boot": boot, **fields})


def start(toolstack: EmbeddedToolstack, spec: DomainSpec, line: bytes) -> DomainInfo:
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: line in toolstack.console_log(spec.uuid), f"{line!r} on the console")
    return toolstack.get_domain(spec.uuid)


def read_until(console: Console, wanted: bytes) -> None:
    seen = bytearray()

    def found() -> bool:
        seen.extend(console.read(timeout=0.2))
        return wanted in seen

    until(found, f"{wanted!r} from the console")


def test_a_guest_lives_from_create_to_poweroff(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = guest_spec(rig, "hello")
    info = toolstack.create(spec)
    assert info.state is DomainState.PAUSED
    console = toolstack.open_console(info.uuid)
    toolstack.unpause(info.uuid)
    read_until(console, READY)
    console.write(b"anybody there?\n")
    read_until(console, b"anybody there?")
    assert f"hello: name {spec.name}".encode() in toolstack.console_log(info.uuid)
    toolstack.shutdown(info.uuid)
    assert toolstack.wait(info.uuid, ENDED, 10) is None


def test_reboot_is_a_new_process_of_the_same_domain(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = start(toolstack, guest_spec(rig, "hello"), READY)
    pid = rig.process_of(info.uuid)
    console = toolstack.open_console(info.uuid)
    toolstack.reboot(info.uuid)
    read_until(console, READY)  # the attachment outlives the reboot
    console.close()
    after = toolstack.get_domain(info.uuid)
    assert after.domid > info.domid
    assert after.state is DomainState.RUNNING
    assert not alive(pid)


@pytest.mark.parametrize(("guest", "line"), [("triple", b"triple: "), ("crashme", b"crashme: ")])
def test_a_crash_is_that_domains_only(rig: HostRig, toolstack: EmbeddedToolstack, guest: str, line: bytes) -> None:
    other = start(toolstack, guest_spec(rig, "hello"), READY)
    info = start(toolstack, guest_spec(rig, guest), line)
    found = toolstack.wait(info.uuid, ENDED, 10)
    assert found is not None
    assert (found.state, found.shutdown_reason) == (DomainState.CRASHED, ShutdownReason.CRASH)
    assert toolstack.get_domain(other.uuid).state is DomainState.RUNNING


def test_a_guest_that_spins_is_paused_and_destroyed(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = start(toolstack, guest_spec(rig, "spin"), b"spin: spinning")
    other = start(toolstack, guest_spec(rig, "hello"), READY)
    toolstack.pause(info.uuid)
    until(lambda: _still(toolstack, info.uuid), "its CPU time to stand still")
    toolstack.destroy(info.uuid)
    assert [i.uuid for i in toolstack.list_domains()] == [other.uuid]


def _still(toolstack: EmbeddedToolstack, uuid: str) -> bool:
    first = toolstack.get_domain(uuid).cpu_time_ns
    return first > 0 and toolstack.get_domain(uuid).cpu_time_ns == first


def test_a_running_guest_survives_the_host_process(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = start(toolstack, guest_spec(rig, "hello"), READY)
    paused = toolstack.create(guest_spec(rig, "hello"))
    rig.restart()
    assert toolstack.get_domain(info.uuid).state is DomainState.RUNNING
    console = toolstack.open_console(info.uuid)
    console.write(b"still here\n")
    read_until(console, b"still here")
    console.close()
    toolstack.unpause(paused.uuid)
    until(lambda: READY in toolstack.console_log(paused.uuid), "the paused guest to boot")
    toolstack.shutdown(info.uuid)  # by way of the watch that the guest set before
    assert toolstack.wait(info.uuid, ENDED, 10) is None


def test_a_killed_domain_process_is_a_crash(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = start(toolstack, guest_spec(rig, "idle"), b"idle: ")
    kill_process(rig.process_of(info.uuid))
    found = toolstack.wait(info.uuid, ENDED, 10)
    assert found is not None
    assert found.state is DomainState.CRASHED
    toolstack.reset(info.uuid)
    until(lambda: toolstack.console_log(info.uuid).count(b"idle: ") == 2, "the second boot")


def test_the_machine_runs_under_the_whole_sandbox(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = start(toolstack, guest_spec(rig, "ticks"), b"ticks: ")
    tasks = Path(f"/proc/{rig.process_of(info.uuid)}/task")
    for task in tasks.iterdir():
        status = (task / "status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        assert "CapEff:\t0000000000000000" in status


@pytest.mark.parametrize(
    ("content", "memory_mib", "error"),
    [(b"no kernel at all", 16, KernelInvalid), ("plain", 16, KernelNotXen), ("hello", 1, MemoryTooSmall)],
)
def test_bad_input_leaves_nothing(
    rig: HostRig,
    toolstack: EmbeddedToolstack,
    tmp_path: Path,
    content: bytes | str,
    memory_mib: int,
    error: type[ToolstackError],
) -> None:
    free = toolstack.host_info().memory_free_mib
    if isinstance(content, bytes):
        kernel = tmp_path / "kernel"
        kernel.write_bytes(content)
    else:
        kernel = guests.build_guest("hello", NO_XEN_NOTES=content == "plain")
    spec = guest_spec(rig, "hello", boot=KernelBoot(kernel=str(kernel)), memory_mib=memory_mib)
    with pytest.raises(error) as caught:
        toolstack.create(spec)
    assert "\n" not in caught.value.message
    assert toolstack.list_domains() == []
    assert toolstack.host_info().memory_free_mib == free
    assert rig.left_behind() == []


def test_idle_domains_cost_little(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    infos = [start(toolstack, guest_spec(rig, "idle"), b"idle: ") for _ in range(5)]
    for info in infos:
        rollup = Path(f"/proc/{rig.process_of(info.uuid)}/smaps_rollup").read_text()
        pss = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
        assert pss["Pss_Anon:"] < 20 * 1024, rollup
