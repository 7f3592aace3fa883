"""Resize of Debian's kernel while it runs, by the plan of the instruction: it follows up and down, and works on."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from build import available
from host_rig import HostRig, until

from agent.cli.local import carry_out
from agent.images import READY, Image, ImageBuildFailed, build_image
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

BOOT_SECONDS = 300
FOLLOW_SECONDS = 120

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if why := available():
        pytest.skip(why)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "packages"
    try:
        return build_image(tmp_path_factory.mktemp("images"), name="resize", cache_dir=cache)
    except ImageBuildFailed as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no Debian packages to be had here: {exc}")


@pytest.fixture(scope="module")
def toolstack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedToolstack]:
    rig = HostRig(tmp_path_factory.mktemp("host"), runtime=REAL_RUNTIME, memory_mib=1024)
    try:
        made = rig.start().connect()
        yield made
        made.close()
    finally:
        rig.stop()


@pytest.fixture(scope="module")
def guest(toolstack: EmbeddedToolstack, image: Image) -> Iterator[str]:
    """A booted guest of 256 MiB that may have 512, and 2 vCPUs."""
    spec = DomainSpec(
        uuid=str(uuid.uuid4()),
        name="resize",
        boot=KernelBoot(image.kernel, image.ramdisk, image.cmdline),
        memory_mib=256,
        max_memory_mib=512,
        max_vcpus=2,
        owner="test",
    )
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: READY.encode() in toolstack.console_log(spec.uuid), "Debian to boot", BOOT_SECONDS)
    until(lambda: b"/ # " in toolstack.console_log(spec.uuid), "its shell", BOOT_SECONDS)
    yield spec.uuid
    toolstack.destroy(spec.uuid)


def resize(toolstack: EmbeddedToolstack, guest: str, **args: Any) -> list[dict[str, Any]]:
    """What was told of the progress."""
    told: list[dict[str, Any]] = []
    full = {"uuid": guest, "wait_seconds": FOLLOW_SECONDS, **args}
    carry_out("resize", full, toolstack, toolstack.get_domain(guest), lambda _step, data: told.append(data))
    return [data for data in told if data]


def said(toolstack: EmbeddedToolstack, guest: str, command: str) -> str:
    """What the guest's shell answers, one line."""
    mark = uuid.uuid4().hex
    console = toolstack.open_console(guest)
    try:
        console.write(f"{command} >/tmp/out 2>&1; echo {mark[:16]}''{mark[16:]} `cat /tmp/out`\n".encode())
        until(lambda: mark.encode() in toolstack.console_log(guest), f"an answer to {command}", 120)
    finally:
        console.close()
    return toolstack.console_log(guest).decode(errors="replace").rpartition(mark)[2].split("\r\n")[0].strip()


def test_memory_follows_up_and_down(toolstack: EmbeddedToolstack, guest: str) -> None:
    free = toolstack.host_info().memory_free_mib
    small = int(said(toolstack, guest, "awk '/MemTotal/{print $2}' /proc/meminfo"))
    told = resize(toolstack, guest, memory_mib=512)
    assert told[-1] == {"done": told[-1]["total"], "total": 256, "unit": "MiB"} and len(told) > 1
    assert toolstack.host_info().memory_free_mib == free - 256
    large = int(said(toolstack, guest, "awk '/MemTotal/{print $2}' /proc/meminfo"))
    assert 250 << 10 <= large - small <= 257 << 10
    resize(toolstack, guest, memory_mib=256)
    assert toolstack.get_domain(guest).memory_mib == 256
    # The host looks for itself whether the memory is really given back, every few seconds.
    until(lambda: toolstack.host_info().memory_free_mib == free, "the host to count it as free", 60)
    again = int(said(toolstack, guest, "awk '/MemTotal/{print $2}' /proc/meminfo"))
    assert abs(again - small) < 2 << 10


def test_vcpus_follow_up_and_down(toolstack: EmbeddedToolstack, guest: str) -> None:
    for vcpus in (2, 1, 2, 1):
        resize(toolstack, guest, vcpus=vcpus)
        assert toolstack.get_domain(guest).vcpus == vcpus
        assert said(toolstack, guest, "nproc") == str(vcpus)


def test_the_kernel_has_no_complaint(toolstack: EmbeddedToolstack, guest: str) -> None:
    log = toolstack.console_log(guest).decode(errors="replace")
    assert [line for line in log.splitlines() if "BUG" in line or "WARNING" in line or "Call Trace" in line] == []
