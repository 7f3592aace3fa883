"""The fake driver beyond the contract: its hooks, its settings, and two processes on one state folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor import errors
from hypervisor.toolstack import drivers
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers import _fake_store as store_module
from hypervisor.toolstack.drivers.fake import FakeToolstack, create

UUID = "12345678-1234-4234-8234-1234567890ab"


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "kernel"
    if not path.exists():  # an instruction may be reading it
        path.write_bytes(b"\x7fELF" + bytes(500))
    return str(path)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeToolstack]:
    toolstack = FakeToolstack(str(tmp_path / "state"))
    yield toolstack
    toolstack.close()


def spec(kernel: str, words: str = "", **fields: object) -> DomainSpec:
    values = {"uuid": UUID, "name": "web", "boot": KernelBoot(kernel, cmdline=words), "memory_mib": 64, "owner": "me"}
    return DomainSpec(**{**values, **fields})  # type: ignore[arg-type]


def started(host: FakeToolstack, kernel: str, words: str = "", **fields: object) -> str:
    info = host.create(spec(kernel, words, **fields))
    host.unpause(info.uuid)
    return info.uuid


def test_a_bzimage_is_a_kernel(host: FakeToolstack, tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    assert host.create(spec(str(path))).state is DomainState.PAUSED


def test_without_a_state_folder_nothing_is_shared(kernel: str) -> None:
    one, other = FakeToolstack(), FakeToolstack()
    one.create(spec(kernel))
    assert other.list_domains() == []
    one.close()
    other.close()


def test_a_crash_can_be_made_to_happen(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel)
    host.crash(uuid, "divide error")
    info = host.get_domain(uuid)
    assert (info.state, info.shutdown_reason, info.detail) == (
        DomainState.CRASHED,
        ShutdownReason.CRASH,
        "divide error",
    )


def test_a_guest_can_end_by_itself(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel, on_poweroff=OnEvent.PRESERVE)
    host.guest_exit(uuid, ShutdownReason.POWEROFF)
    assert host.get_domain(uuid).state is DomainState.SHUTDOWN


def test_an_injected_error_comes_once_and_leaves_nothing(host: FakeToolstack, kernel: str) -> None:
    host.inject_error("create", errors.HostUnavailable("try again"))
    with pytest.raises(errors.HostUnavailable, match="try again"):
        host.create(spec(kernel))
    assert host.list_domains() == []
    assert host.create(spec(kernel)).uuid == UUID


def test_an_error_after_the_fact_hides_a_success(host: FakeToolstack, kernel: str) -> None:
    host.inject_error("create", errors.OperationTimeout("too slow"), when="after")
    with pytest.raises(errors.OperationTimeout):
        host.create(spec(kernel))
    assert host.get_domain(UUID).state is DomainState.PAUSED


def test_an_error_may_come_several_times_at_any_verb(host: FakeToolstack) -> None:
    host.inject_error("*", errors.HostUnavailable("away"), times=2)
    for look in (host.list_domains, host.host_info):
        with pytest.raises(errors.HostUnavailable):
            look()
    assert host.list_domains() == []


def test_faults_can_be_cleared(host: FakeToolstack) -> None:
    host.inject_error("list_domains", errors.HostFailure("x"), times=9)
    host.clear_faults()
    assert host.list_domains() == []


def test_a_delay_delays(host: FakeToolstack) -> None:
    host.inject_delay("host_info", 0.05)
    began = time.monotonic()
    host.host_info()
    assert time.monotonic() - began >= 0.05


def test_a_fault_needs_a_known_moment(host: FakeToolstack) -> None:
    with pytest.raises(ValueError, match="before or after"):
        host.inject_error("create", errors.HostFailure("x"), when="during")


def test_unknown_is_not_stopped(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel)
    host.set_readable(uuid, False)
    assert host.get_domain(uuid).state is DomainState.UNKNOWN
    assert host.get_domain(uuid).shutdown_reason is None
    for verb in (host.pause, host.destroy, host.shutdown, host.reset):
        with pytest.raises(errors.HostUnavailable) as caught:
            verb(uuid)
        assert caught.value.retryable
    host.set_readable(uuid, True)
    assert host.get_domain(uuid).state is DomainState.RUNNING


def test_a_shutdown_asked_of_a_paused_guest_happens_when_it_runs(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel, on_poweroff=OnEvent.PRESERVE)
    host.pause(uuid)
    host.shutdown(uuid)
    assert host.get_domain(uuid).state is DomainState.PAUSED
    host.unpause(uuid)
    assert host.get_domain(uuid).state is DomainState.SHUTDOWN


def test_a_guest_that_ignores_requests(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel, "fake.shutdown=ignore")
    host.shutdown(uuid)
    assert host.get_domain(uuid).state is DomainState.RUNNING


def test_the_shell_adds(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel)
    console = host.open_console(uuid)
    console.write(b"echo demo-$((40+2))\r")
    host.guest_print(uuid, b"tail\r\n")
    console.close()
    assert b"\r\ndemo-42\r\n" in host.console_log(uuid)
    assert host.console_log(uuid).endswith(b"tail\r\n")


def test_the_log_is_bounded(host: FakeToolstack, kernel: str) -> None:
    uuid = started(host, kernel)
    host.guest_print(uuid, b"x" * (store_module.LOG_LIMIT + 5))
    assert host.console_log(uuid, 1 << 30) == b"x" * store_module.LOG_LIMIT


def test_a_closed_connection_says_so(tmp_path: Path) -> None:
    toolstack = FakeToolstack(str(tmp_path))
    toolstack.close()
    toolstack.close()
    with pytest.raises(errors.HostUnavailable, match="closed"):
        toolstack.list_domains()


def test_a_state_folder_that_cannot_be_used(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(errors.HostUnavailable, match="not usable"):
        FakeToolstack(str(blocker / "state"))


def test_a_damaged_database_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "fake.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(errors.ToolstackError) as caught:
        FakeToolstack(str(tmp_path))
    assert "\n" not in caught.value.message


def test_domain_records_survive_their_json_form(kernel: str) -> None:
    domain = store_module.FakeDomain(
        spec=spec(kernel), domid=7, state=DomainState.CRASHED, shutdown_reason=ShutdownReason.CRASH, detail="d", boots=2
    )
    assert store_module.FakeDomain.from_json(domain.to_json()) == domain


CHILD = f"""
import sys
from hypervisor.toolstack.drivers.fake import FakeToolstack
from hypervisor.toolstack.api import DomainSpec, KernelBoot
host = FakeToolstack(sys.argv[1])
host.create(DomainSpec("{UUID}", "web", KernelBoot(sys.argv[2]), 64, owner="me"))
host.unpause("{UUID}")
"""


@pytest.mark.parametrize(("when", "made"), [("before", False), ("after", True)])
def test_a_process_can_be_killed_at_a_verb(
    host: FakeToolstack, tmp_path: Path, kernel: str, when: str, made: bool
) -> None:
    host.inject_kill("create", when)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "state"), kernel], timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [info.uuid for info in host.list_domains()] == ([UUID] if made else [])


def test_another_process_sees_the_same_host(host: FakeToolstack, tmp_path: Path, kernel: str) -> None:
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "state"), kernel], timeout=30, check=True)
    assert host.get_domain(UUID).state is DomainState.RUNNING
    assert os.stat(tmp_path / "state").st_mode & 0o777 == 0o700


def test_settings() -> None:
    toolstack = create({"cpus": "3", "memory_mib": "77", "hostname": "n1"})
    info = toolstack.host_info()
    assert (info.cpus, info.memory_total_mib, info.hostname) == (3, 77, "n1")
    toolstack.close()


@pytest.mark.parametrize("settings", [{"cpu": "3"}, {"cpus": "three"}])
def test_settings_that_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(errors.SpecInvalid):
        create(settings)


def test_the_loader_finds_it(tmp_path: Path) -> None:
    assert "fake" in drivers.names()
    toolstack = drivers.load("fake", {"state_dir": str(tmp_path)})
    assert toolstack.name == "fake"
    toolstack.close()


def test_the_loader_names_what_there_is() -> None:
    with pytest.raises(errors.Unsupported, match=r"'vmware' is not installed: installed are .*fake"):
        drivers.load("vmware")


def test_the_loader_passes_a_drivers_own_error_on() -> None:
    with pytest.raises(errors.SpecInvalid, match="unknown setting"):
        drivers.load("fake", {"colour": "blue"})
