"""Core dumps and watchdogs of real guests, on a real host process; gdb reads the dumps."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import build as guests
from host_rig import HostRig, kill_process, until

from hypervisor.errors import HostUnavailable, SpecInvalid, ToolstackError, WrongState
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainState, KernelBoot, OnEvent, ShutdownReason
from hypervisor.toolstack.coredump import EHDR, SHDR
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

ROOT = Path(__file__).resolve().parents[2]
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("host"), REAL_RUNTIME).start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    for info in made.list_domains():
        made.destroy(info.uuid)
    made.close()


def start(
    toolstack: EmbeddedToolstack, rig: HostRig, name: str, ready: str, cmdline: str = "", **fields: object
) -> str:
    kernel = guests.build_guest(name)
    boot = KernelBoot(kernel=str(kernel), cmdline=cmdline)
    spec = rig.spec("", memory_mib=16, on_poweroff=OnEvent.PRESERVE, **fields)
    spec = dataclasses.replace(spec, boot=boot)
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: ready.encode() in toolstack.console_log(spec.uuid), repr(ready), 60)
    return spec.uuid


def sections(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    header = EHDR.unpack_from(data)
    found = [SHDR.unpack_from(data, header[6] + n * SHDR.size) for n in range(header[12])]
    names = data[found[header[13]][4] :]
    return {names[s[0] :].partition(b"\0")[0].decode(): data[s[4] : s[4] + s[5]] for s in found}


def gdb(core: Path, kernel: Path, *commands: str) -> str:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed (Debian: gdb)")
    arguments = [word for command in commands for word in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", *arguments, str(kernel), str(core)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_a_running_guest(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "hello", "hello: ready")
    core = tmp_path / "core"
    toolstack.dump_core(uuid_, str(core))
    assert core.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["core"]
    assert core.stat().st_blocks * 512 < core.stat().st_size  # what the guest never touched takes no room
    found = sections(core)
    pfns = [pfn for pfn, _mfn in struct.iter_unpack("<QQ", found[".xen_p2m"])]
    assert pfns == sorted(pfns) and len(pfns) == len(found[".xen_pages"]) // 4096 == 16 << 8
    assert b"hello: ready" in found[".xen_pages"]
    note = found[".note.Xen"]
    assert struct.unpack_from("<4Q", note, 16 + 16) == (0xF00FEBED, 1, len(pfns), 4096)
    readelf = subprocess.run(["readelf", "-hS", str(core)], capture_output=True, text=True, timeout=60, check=True)
    assert "CORE (Core file)" in readelf.stdout and not readelf.stderr
    # It goes on as if nothing had been.
    console = toolstack.open_console(uuid_)
    console.write(b"still there\n")
    until(lambda: b"echo: still there" in toolstack.console_log(uuid_), "the guest to answer")
    console.close()


def test_gdb_reads_it(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "hello", "hello: ready")
    core, made = tmp_path / "core", tmp_path / "core.gdb"
    toolstack.dump_core(uuid_, str(core))
    command = [sys.executable, str(ROOT / "tools" / "core_to_gdb.py"), str(core), str(made)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    said = gdb(made, guests.build_guest("hello"), "info registers rip", "info symbol $rip", "x/s (char *)start_info")
    assert "rip            0xffff" in said
    assert " in section .text" in said
    assert '"xen-3.0-x86_64"' in said or "xen-" in said
    memory = gdb(made, guests.build_guest("hello"), "find &guest_main, +16, (char)*(char *)&guest_main")
    assert "<guest_main>" in memory
    again = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    assert again.returncode == 1 and "File exists" in again.stderr


def test_a_guest_that_crashed(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "crashme", "crashing")
    info = toolstack.wait(uuid_, ENDED, 30)
    assert info is not None and info.state is DomainState.CRASHED
    core = tmp_path / "core"
    toolstack.dump_core(uuid_, str(core))
    assert b"crashme: crashing" in sections(core)[".xen_pages"]
    assert toolstack.get_domain(uuid_).state is DomainState.CRASHED


def test_two_vcpus(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "smp", "smp:", vcpus=2)
    core, made = tmp_path / "core", tmp_path / "core.gdb"
    toolstack.dump_core(uuid_, str(core))
    assert len(sections(core)[".xen_prstatus"]) == 2 * 5168
    command = [sys.executable, str(ROOT / "tools" / "core_to_gdb.py"), str(core), str(made)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert gdb(made, guests.build_guest("smp"), "info threads").count("LWP") >= 2


def test_a_32_bit_guest(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "hello32", "hello32:")
    core = tmp_path / "core"
    toolstack.dump_core(uuid_, str(core))
    found = sections(core)
    assert len(found[".xen_prstatus"]) == 2800
    assert len(found[".xen_p2m"]) // 16 in (16 << 8, (16 << 8) - 2)  # it gives two frames back for a moment
    assert core.read_bytes()[18] == 3  # EM_386


def test_what_is_refused(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    uuid_ = start(toolstack, rig, "idle", "blocking")
    there = tmp_path / "there"
    there.write_text("kept")
    (tmp_path / "link").symlink_to(there)
    for path, why in (
        ("core", "absolute"),
        (str(there), "is there already"),
        (str(tmp_path / "link"), "is there already"),
        (str(tmp_path / "no" / "core"), "is no folder"),
        (f"{tmp_path}/{'n' * 201}", "200 characters"),
    ):
        with pytest.raises(SpecInvalid, match=why):
            toolstack.dump_core(uuid_, path)
    assert there.read_text() == "kept"
    with pytest.raises(ToolstackError, match="cannot be made"):
        toolstack.dump_core(uuid_, "/proc/core")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    kill_process(rig.process_of(uuid_))
    assert toolstack.wait(uuid_, ENDED, 20) is not None
    with pytest.raises(WrongState, match="no memory"):
        toolstack.dump_core(uuid_, str(tmp_path / "core"))


def test_a_host_process_that_is_killed_while_it_dumps_leaves_the_guest_running(
    rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path
) -> None:
    uuid_ = start(toolstack, rig, "hello", "hello: ready")
    worker = rig.connect()

    def dump() -> None:
        with pytest.raises(HostUnavailable):
            worker.dump_core(uuid_, str(tmp_path / "core"))

    thread = threading.Thread(target=dump)
    thread.start()
    # The guest is held by the time that another process writes the dump.
    until(lambda: any(b"coredump" in cmdline(pid) for pid in rig.children(rig.pid)), "the dump to begin")
    rig.restart()
    thread.join(20)
    assert not thread.is_alive()
    worker.close()
    assert list(tmp_path.iterdir()) == []
    assert toolstack.get_domain(uuid_).state is DomainState.RUNNING
    console = toolstack.open_console(uuid_)
    console.write(b"still there\n")
    until(lambda: b"echo: still there" in toolstack.console_log(uuid_), "the guest to answer")
    console.close()


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("action", [OnEvent.PRESERVE, OnEvent.DESTROY])
def test_a_watchdog_that_runs_out(rig: HostRig, toolstack: EmbeddedToolstack, action: OnEvent) -> None:
    uuid_ = start(toolstack, rig, "watchdog", "watchdog: set, 1", on_crash=action)
    info = toolstack.wait(uuid_, ENDED, 30)
    if action is OnEvent.DESTROY:
        assert info is None
    else:
        assert info is not None and info.shutdown_reason is ShutdownReason.WATCHDOG


def test_a_watchdog_that_is_stopped(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    uuid_ = start(toolstack, rig, "watchdog", "watchdog: set, 1", "stop")
    info = toolstack.wait(uuid_, ENDED, 30)
    assert info is not None and info.shutdown_reason is ShutdownReason.POWEROFF


def test_a_watchdog_does_not_wait_for_a_paused_guest(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    uuid_ = start(toolstack, rig, "watchdog", "watchdog: set, 1", on_crash=OnEvent.PRESERVE)
    toolstack.pause(uuid_)
    info = toolstack.wait(uuid_, ENDED, 30)
    assert info is not None and info.shutdown_reason is ShutdownReason.WATCHDOG
