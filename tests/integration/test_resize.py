"""Debian's kernel follows: its balloon driver, its vCPUs, what it may have of the CPU; over a SIGKILL of the host.

A kernel takes a vCPU away by itself; to bring one up is left to its userspace (udev, here the test).
"""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from host_rig import HostRig, until

from agent.images import Image, ImageBuildFailed, build_image
from hypervisor.errors import InsufficientMemory, SpecInvalid
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, OnEvent

# The first test has the boot in its time.
pytestmark = pytest.mark.timeout(400)

HOST_MIB = 1024
PROMPT = "/ # "


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("resize"), REAL_RUNTIME, log_level="info", memory_mib=HOST_MIB)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "packages"
    try:
        return build_image(tmp_path_factory.mktemp("images"), name="debian", cache_dir=cache)
    except ImageBuildFailed as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no Debian packages to be had here: {exc}")


class Guest:
    def __init__(self, rig: HostRig, image: Image) -> None:
        self.rig = rig
        self.toolstack = rig.connect()
        self.uuid = str(uuid.uuid4())
        spec = DomainSpec(
            uuid=self.uuid,
            name="resized",
            boot=KernelBoot(image.kernel, image.ramdisk, image.cmdline),
            memory_mib=192,
            max_memory_mib=512,
            vcpus=1,
            max_vcpus=2,
            on_crash=OnEvent.PRESERVE,
            owner="tests",
        )
        self.toolstack.create(spec)
        self.toolstack.unpause(self.uuid)
        until(lambda: PROMPT in self.log(), "the guest to boot", 180)

    def log(self) -> str:
        return self.toolstack.console_log(self.uuid, 1 << 20).decode(errors="replace")

    def run(self, command: str) -> str:
        """What a shell command printed."""
        mark = f"{time.monotonic_ns():x}"
        console = self.toolstack.open_console(self.uuid)
        console.write(f"echo begin-{mark[:3]}''{mark[3:]}; {command}; echo end-{mark[:3]}''{mark[3:]}\n".encode())
        try:
            until(lambda: f"end-{mark}" in self.log(), command, 60)
        finally:
            console.close()
        return self.log().partition(f"begin-{mark}")[2].partition(f"end-{mark}")[0]

    def total_kib(self) -> int:
        found = re.search(r"MemTotal: +(\d+) kB", self.run("head -1 /proc/meminfo"))
        assert found is not None
        return int(found[1])

    def reaches(self, memory_mib: int) -> None:
        until(self.has(memory_mib), f"{memory_mib} MiB", 90)

    def has(self, memory_mib: int) -> Callable[[], bool]:
        return lambda: self.toolstack.get_domain(self.uuid).memory_mib == memory_mib

    def free_mib(self) -> int:
        return self.toolstack.host_info().memory_free_mib


@pytest.fixture(scope="module")
def guest(rig: HostRig, image: Image) -> Iterator[Guest]:
    made = Guest(rig, image)
    yield made
    assert made.toolstack.get_domain(made.uuid).state is DomainState.RUNNING, made.log()[-2000:]
    made.toolstack.destroy(made.uuid)
    made.toolstack.close()


def test_memory_up_and_down_and_up(guest: Guest) -> None:
    toolstack, free, total = guest.toolstack, guest.free_mib(), guest.total_kib()
    toolstack.set_memory(guest.uuid, 512)
    assert free - guest.free_mib() == 320, "what it may have is taken at once"
    assert toolstack.get_domain(guest.uuid).memory_target_mib == 512
    guest.reaches(512)
    assert guest.total_kib() - total == 320 << 10
    guest.run("mount -t tmpfs none /tmp; dd if=/dev/urandom of=/tmp/fill bs=1M count=200 2>/dev/null; rm /tmp/fill")
    filled = toolstack.stats(guest.uuid)["resident_mib"]
    assert filled > 200
    toolstack.set_memory(guest.uuid, 160)
    guest.reaches(160)
    until(lambda: guest.free_mib() == free + 32, "the host to count what it gave back")
    assert guest.total_kib() == total - (32 << 10)
    assert toolstack.stats(guest.uuid)["resident_mib"] <= 160 + 16, "its memory is the host's again"
    toolstack.set_memory(guest.uuid, 192)
    guest.reaches(192)
    assert guest.total_kib() == total
    assert toolstack.get_spec(guest.uuid).memory_mib == 192


def test_memory_that_cannot_be(rig: HostRig, guest: Guest) -> None:
    with pytest.raises(SpecInvalid, match="512"):
        guest.toolstack.set_memory(guest.uuid, 513)
    filler = rig.spec("")
    big = DomainSpec(
        uuid=filler.uuid,
        name="filler",
        boot=guest.toolstack.get_spec(guest.uuid).boot,
        memory_mib=guest.free_mib() - 64,
    )
    guest.toolstack.create(big)
    try:
        with pytest.raises(InsufficientMemory, match="MiB"):
            guest.toolstack.set_memory(guest.uuid, 512)
        info = guest.toolstack.get_domain(guest.uuid)
        assert (info.memory_mib, info.memory_target_mib) == (192, 192)
    finally:
        guest.toolstack.destroy(big.uuid)


def test_a_guest_takes_no_more_than_its_target(guest: Guest) -> None:
    """Its own wish, without the host's consent."""
    guest.run("echo 300000 > /sys/devices/system/xen_memory/xen_memory0/target_kb; sleep 3")
    assert guest.toolstack.get_domain(guest.uuid).memory_mib == 192
    guest.run(f"echo {192 << 10} > /sys/devices/system/xen_memory/xen_memory0/target_kb; sleep 1")


def test_vcpus_up_and_down(guest: Guest) -> None:
    online = "/sys/devices/system/cpu/cpu1/online"
    assert guest.toolstack.get_domain(guest.uuid).vcpus == 1
    for _ in range(2):
        guest.toolstack.set_vcpus(guest.uuid, 2)
        guest.run(f"until echo 1 > {online}; do sleep 1; done 2>/dev/null")
        until(lambda: guest.toolstack.get_domain(guest.uuid).vcpus == 2, "the second vCPU")
        assert "2" in guest.run("nproc")
        guest.toolstack.set_vcpus(guest.uuid, 1)
        until(lambda: guest.toolstack.get_domain(guest.uuid).vcpus == 1, "the second vCPU to go")
    with pytest.raises(SpecInvalid):
        guest.toolstack.set_vcpus(guest.uuid, 3)


def test_a_cap_holds(guest: Guest) -> None:
    toolstack = guest.toolstack
    toolstack.set_scheduling(guest.uuid, 128, 20)
    autogroups = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if autogroups.exists() and autogroups.read_text().strip() == "1":
        assert Path(f"/proc/{guest.rig.process_of(guest.uuid)}/autogroup").read_text().endswith("nice 3\n")
    guest.run("while :; do :; done & echo started")
    used, begun = toolstack.stats(guest.uuid)["cpu_time_ns"], time.monotonic_ns()
    until(lambda: time.monotonic_ns() - begun > 5_000_000_000, "five seconds to pass")
    now = time.monotonic_ns()
    share = (toolstack.stats(guest.uuid)["cpu_time_ns"] - used) / (now - begun)
    assert share < 0.25
    toolstack.set_scheduling(guest.uuid, 256, 0)
    guest.run("kill %1")


def test_a_lowered_target_survives_the_host_process(rig: HostRig, guest: Guest) -> None:
    free = guest.free_mib()
    guest.toolstack.set_memory(guest.uuid, 160)
    rig.restart()
    guest.reaches(160)
    until(lambda: guest.free_mib() == free + 32, "the host to count what it gave back")
    assert guest.toolstack.get_domain(guest.uuid).memory_target_mib == 160
    guest.toolstack.set_memory(guest.uuid, 192)
    guest.reaches(192)
