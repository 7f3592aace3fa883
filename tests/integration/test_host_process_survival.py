"""What survives whose death: host process, zygote, domain processes, all real, with scripted guests."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig, alive, kill_process, until

from hypervisor.errors import HostUnavailable, KernelInvalid, ToolstackError
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, KernelBoot, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

RUNNING = frozenset({DomainState.RUNNING})
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[HostRig]:
    made = HostRig(tmp_path / "host").start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    made.close()


def booted(toolstack: EmbeddedToolstack, spec: DomainSpec) -> DomainInfo:
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: b"hello" in toolstack.console_log(spec.uuid), "the guest to print")
    return toolstack.get_domain(spec.uuid)


def zygote_pid(toolstack: EmbeddedToolstack) -> int:
    return int(dict(toolstack.host_info().detail)["zygote_pid"])


def test_a_killed_host_process_finds_everything_again(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    running = booted(toolstack, rig.spec("print hello"))
    paused = toolstack.create(rig.spec("print hello"))
    preserved = booted(toolstack, rig.spec("print hello", on_poweroff=OnEvent.PRESERVE))
    toolstack.shutdown(preserved.uuid)
    assert toolstack.wait(preserved.uuid, ENDED, 10) is not None
    before = toolstack.list_domains()
    free = toolstack.host_info().memory_free_mib
    pids = [rig.process_of(info.uuid) for info in before]

    rig.restart()

    after = toolstack.list_domains()
    stable = {"cpu_time_ns": 0}
    assert [dataclasses.replace(i, **stable) for i in after] == [dataclasses.replace(i, **stable) for i in before]
    assert [rig.process_of(info.uuid) for info in after] == pids
    assert toolstack.host_info().memory_free_mib == free
    # The same guests still have their consoles and their xenstore.
    console = toolstack.open_console(running.uuid)
    console.write(b"who is there\n")
    until(lambda: b"who is there" in toolstack.console_log(running.uuid), "the guest to echo")
    console.close()
    toolstack.unpause(paused.uuid)
    until(lambda: b"hello" in toolstack.console_log(paused.uuid), "the paused guest to print")
    toolstack.shutdown(running.uuid)
    assert toolstack.wait(running.uuid, ENDED, 10) is None
    # New domains get frames and numbers of their own.
    new = toolstack.create(rig.spec("print hello"))
    assert new.domid > max(info.domid for info in before)


def test_what_a_guest_says_while_nobody_listens_is_not_lost(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = rig.spec("print hello\nspin")
    toolstack.create(spec)
    pid = rig.process_of(spec.uuid)
    rig.kill()
    assert alive(pid)
    rig.start()
    toolstack.unpause(spec.uuid)
    rig.kill()  # the guest may print before or after this
    rig.start()
    until(lambda: toolstack.console_log(spec.uuid).count(b"hello") == 1, "the output, once")
    assert toolstack.get_domain(spec.uuid).state is DomainState.RUNNING


def test_a_guest_that_ended_meanwhile_is_dealt_with(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    kept = booted(toolstack, rig.spec("print hello\nprint bye\nawait\npoweroff", on_poweroff=OnEvent.PRESERVE))
    rebooted = booted(toolstack, rig.spec("print hello\nonce await\nonce reboot"))
    rig.kill()
    for info in (kept, rebooted):
        os.kill(rig.process_of(info.uuid), signal.SIGUSR1)
    rig.start()
    found = toolstack.wait(kept.uuid, ENDED, 10)
    assert found is not None
    assert (found.state, found.shutdown_reason) == (DomainState.SHUTDOWN, ShutdownReason.POWEROFF)
    until(lambda: toolstack.get_domain(rebooted.uuid).domid != rebooted.domid, "the reboot")
    assert toolstack.wait(rebooted.uuid, RUNNING, 10) is not None


def test_a_domain_process_that_died_meanwhile_is_reported(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    free = toolstack.host_info().memory_free_mib
    spec = rig.spec("print hello")
    booted(toolstack, spec)
    other = booted(toolstack, rig.spec("print hello"))
    pid = rig.process_of(spec.uuid)
    rig.kill()
    kill_process(pid)
    rig.start()
    found = toolstack.wait(spec.uuid, ENDED, 10)
    assert found is not None
    assert (found.state, found.detail) == (
        DomainState.CRASHED,
        "its process ended while the host process was away",
    )
    assert toolstack.get_domain(other.uuid).state is DomainState.RUNNING
    toolstack.destroy(other.uuid)
    assert toolstack.host_info().memory_free_mib == free
    toolstack.reset(spec.uuid)
    assert toolstack.get_domain(spec.uuid).state is DomainState.RUNNING


def test_a_killed_domain_process_is_that_domains_crash_only(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    one, two = booted(toolstack, rig.spec("print hello")), booted(toolstack, rig.spec("print hello"))
    kill_process(rig.process_of(one.uuid))
    found = toolstack.wait(one.uuid, ENDED, 10)
    assert found is not None
    assert (found.state, found.detail) == (DomainState.CRASHED, "its process ended: killed by SIGKILL")
    assert toolstack.get_domain(two.uuid).state is DomainState.RUNNING


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("segv", "its process ended: killed by SIGSEGV"),
        ("raise", "hypervisor error: RuntimeError: scripted bug; see domain.log"),
        ("crash", "scripted crash"),
    ],
)
def test_a_crash_of_any_kind(rig: HostRig, toolstack: EmbeddedToolstack, script: str, detail: str) -> None:
    spec = rig.spec(f"print hello\n{script}")
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    found = toolstack.wait(spec.uuid, ENDED, 10)
    assert found is not None
    assert (found.state, found.detail, found.shutdown_reason) == (DomainState.CRASHED, detail, ShutdownReason.CRASH)
    assert b"hello" in toolstack.console_log(spec.uuid)


def test_a_killed_zygote_takes_no_domain_with_it(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    old = zygote_pid(toolstack)
    os.kill(old, signal.SIGKILL)
    until(lambda: not alive(old), "the zygote to die")
    assert toolstack.get_domain(info.uuid).state is DomainState.RUNNING
    booted(toolstack, rig.spec("print hello"))
    assert zygote_pid(toolstack) != old
    # Its orphan's end is still seen, with the signal.
    kill_process(rig.process_of(info.uuid), signal.SIGTERM)
    found = toolstack.wait(info.uuid, ENDED, 10)
    assert found is not None
    assert found.detail == "its process ended: killed by SIGTERM"


def test_a_stopped_process_is_unknown_not_stopped(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    pid = rig.process_of(info.uuid)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert toolstack.get_domain(info.uuid).state is DomainState.UNKNOWN
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: toolstack.get_domain(info.uuid).state is DomainState.RUNNING, "it to be seen running")


def test_a_process_that_is_stopped_during_the_restart_is_adopted_later(
    rig: HostRig, toolstack: EmbeddedToolstack
) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    free = toolstack.host_info().memory_free_mib
    pid = rig.process_of(info.uuid)
    os.kill(pid, signal.SIGSTOP)
    try:
        rig.restart()
        assert toolstack.get_domain(info.uuid).state is DomainState.UNKNOWN
        assert toolstack.host_info().memory_free_mib == free
        with pytest.raises(HostUnavailable):
            toolstack.pause(info.uuid)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert toolstack.wait(info.uuid, RUNNING, 10) is not None
    toolstack.pause(info.uuid)
    toolstack.destroy(info.uuid)
    assert not alive(pid)


def test_a_lost_domain_can_be_destroyed(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    pid = rig.process_of(info.uuid)
    os.kill(pid, signal.SIGSTOP)
    rig.restart()
    toolstack.destroy(info.uuid)
    until(lambda: not alive(pid), "its process to end")
    assert toolstack.list_domains() == []


def test_a_failed_create_leaves_nothing(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    free = toolstack.host_info().memory_free_mib
    zygote = zygote_pid(toolstack)
    bad = rig.spec("print hello")
    Path(bad.boot.kernel).write_text("no script")
    with pytest.raises(KernelInvalid):
        toolstack.create(bad)
    dies = rig.spec("die-in-build")
    with pytest.raises(ToolstackError, match="exit code 3"):
        toolstack.create(dies)
    assert toolstack.list_domains() == []
    assert toolstack.host_info().memory_free_mib == free
    assert rig.left_behind() == []
    until(lambda: rig.children(zygote) == [], "the zygote to have no children")
    assert xenstore(rig, "xenstore-list", "/local/domain").split() == ["0"]


def test_a_host_killed_in_the_middle_of_a_create_cleans_up(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    free = toolstack.host_info().memory_free_mib
    spec = rig.spec("hang-in-build")
    worker = rig.connect()
    thread = threading.Thread(target=lambda: _ignore(worker, spec), daemon=True)
    thread.start()
    hangs = Path(f"{spec.boot.kernel}.hangs")  # made first, written then
    pid = int(until(lambda: hangs.exists() and hangs.read_text(), "the build to hang"))
    rig.restart()
    thread.join(20)
    assert not thread.is_alive()
    worker.close()
    assert toolstack.list_domains() == []
    assert toolstack.host_info().memory_free_mib == free
    assert rig.left_behind() == []
    until(lambda: not alive(pid), "the half-made process to end")


def _ignore(toolstack: EmbeddedToolstack, spec: DomainSpec) -> None:
    with pytest.raises(HostUnavailable):
        toolstack.create(spec)


def test_twenty_domains(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    infos = [booted(toolstack, rig.spec("print hello")) for _ in range(20)]
    assert len({info.domid for info in infos}) == 20
    claims = sorted(
        (claim["base_mfn"], claim["base_mfn"] + claim["frames"])
        for claim in (rig.record(info.uuid)["claim"] for info in infos)
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(claims))
    rig.restart()
    assert [i.state for i in toolstack.list_domains()] == [DomainState.RUNNING] * 20
    for info in infos:
        toolstack.destroy(info.uuid)
    assert toolstack.list_domains() == []


def test_idle_domains_wake_for_nothing(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    pids = [rig.pid, zygote_pid(toolstack), rig.process_of(info.uuid)]
    threads = [Path(f"/proc/{pid}/task") for pid in pids]

    def switches() -> list[str]:
        return [
            line
            for folder in threads
            for task in sorted(folder.iterdir())
            for line in (task / "status").read_text().splitlines()
            if line.startswith(("voluntary", "nonvoluntary"))
        ]

    until(lambda: switches() == (subprocess.run(["sleep", "0.5"], check=True) and switches()), "half a second of sleep")


def test_a_second_host_process_is_refused(rig: HostRig) -> None:
    command = [sys.executable, "-m", "hypervisor.host.main", "--state-dir", str(rig.state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"reeve-hypervisor: a host process (pid {rig.pid}) uses {rig.state} already: "
        "stop it or give another --state-dir"
    )


def test_an_orderly_stop_leaves_the_domains(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    assert rig.terminate() == 0
    with pytest.raises(HostUnavailable, match="start reeve-hypervisor"):
        toolstack.list_domains()
    rig.start()
    assert toolstack.get_domain(info.uuid).state is DomainState.RUNNING


def xenstore(rig: HostRig, *command: str) -> str:
    if not Path(f"/usr/bin/{command[0]}").exists():
        pytest.skip(f"{command[0]} is not installed (Debian: xenstore-utils)")
    environment = {**os.environ, "XENSTORED_PATH": str(rig.state / "xenstored.sock")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True).stdout


def test_debians_tools_see_the_domain(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    info = booted(toolstack, rig.spec("print hello"))
    home = f"/local/domain/{info.domid}"
    assert xenstore(rig, "xenstore-read", f"{home}/name").strip() == info.name
    assert xenstore(rig, "xenstore-read", f"{home}/reeve/owner").strip() == "tests"
    rig.restart()
    assert xenstore(rig, "xenstore-read", f"{home}/name").strip() == info.name
    toolstack.destroy(info.uuid)
    assert xenstore(rig, "xenstore-list", "/local/domain").split() == ["0"]


def test_the_kernel_path_is_read_by_the_domain_process_only(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = rig.spec("print hello")
    with pytest.raises(KernelInvalid, match="cannot be read"):
        toolstack.create(dataclasses.replace(spec, boot=KernelBoot(kernel="/nonexistent/kernel")))


ATTEMPTS = (
    *("open", "openat", "creat", "unlink", "socket", "connect", "execve", "fork", "clone", "clone3", "ptrace"),
    *("kill", "tgkill", "setown", "mount", "process_vm_readv", "bpf", "io_uring", "prctl"),
)


def test_a_guest_that_took_its_process_over_reaches_nothing(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = rig.spec("\n".join([f"try {what}" for what in ATTEMPTS]) + "\nprint hello")
    booted(toolstack, spec)
    lines = toolstack.console_log(spec.uuid).decode().split("\r\n")
    assert lines[: len(ATTEMPTS)] == [f"{what}: refused {38 if what == 'clone3' else 1}" for what in ATTEMPTS]
    status = Path(f"/proc/{rig.process_of(spec.uuid)}/status").read_text()
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"):
        assert line in status
    assert len(os.listdir(f"/proc/{rig.process_of(spec.uuid)}/fd")) < 20


def test_a_broken_channel_is_made_again(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    """Whoever hangs up, for whatever reason: the host calls again."""
    info = booted(toolstack, rig.spec("print hello\nawait\ndrop-host\nprint dropped"))
    os.kill(rig.process_of(info.uuid), signal.SIGUSR1)
    until(lambda: b"dropped" in toolstack.console_log(info.uuid), "the guest to go on")
    until(lambda: "connected again" in rig.log.read_text(), "the host to call again")
    until(lambda: toolstack.get_domain(info.uuid).state is DomainState.RUNNING, "the channel to be there again")
    toolstack.pause(info.uuid)
    assert toolstack.get_domain(info.uuid).state is DomainState.PAUSED
