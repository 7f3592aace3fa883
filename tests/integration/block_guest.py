"""A Debian guest with disks on a real host process, for the tests of the block back end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from host_rig import HostRig, until

from agent.images import Image, ImageBuildFailed, build_image
from agent.images.debian import KERNEL_META_PACKAGE, Apt, read_members
from hypervisor.toolstack.api import Console, DomainSpec, KernelBoot, OnEvent
from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskSpec

SOURCE = Path(__file__).resolve().parents[1] / "guests" / "block" / "blockload.c"
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
MODULES = ("drivers/block/xen-blkfront.ko",)
PROMPT = rb"/ # "
BOOT_SECONDS = 90.0
LOG_BYTES = 8 << 20

START = """#!/bin/busybox sh
for module in /lib/block/*.ko; do
    /bin/busybox insmod "$module"
done
"""


def missing(what: str) -> None:
    """Skip, but not where everything can be installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def compile_load(folder: Path) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        missing("gcc is not installed: it builds the guest's program")
    program = folder / "blockload"
    done = subprocess.run([str(compiler), *CFLAGS, "-o", str(program), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def make_image(folder: Path, modules: Sequence[str] = MODULES, more: Sequence[tuple[Path, str]] = ()) -> Image:
    """:param modules: loaded when it boots. :param more: files and where they go."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "packages"
    start = folder / "start"
    start.write_text(START)
    start.chmod(0o755)
    add = [(compile_load(folder), "bin/blockload"), (start, "etc/init.d/block"), *more]
    apt = Apt(cache)
    try:
        _, package = apt.fetch(KERNEL_META_PACKAGE)
        for name, content in read_members(package, lambda path: path.endswith(tuple(modules)), len(modules)):
            module = folder / Path(name).name
            module.write_bytes(content)
            add.append((module, f"lib/block/{module.name}"))
        return build_image(folder / "images", name="block", add=add, cache_dir=cache, apt=apt)
    except ImageBuildFailed as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no Debian packages to be had here: {exc}")


class Guest:
    """A domain with a shell on its console."""

    def __init__(self, rig: HostRig, image: Image, disks: tuple[DiskSpec, ...] = (), vcpus: int = 1) -> None:
        self.rig = rig
        self.toolstack = rig.connect()
        self.uuid = str(uuid.uuid4())
        self.seen = b""
        boot = KernelBoot(kernel=image.kernel, ramdisk=image.ramdisk, cmdline=image.cmdline)
        spec = DomainSpec(
            uuid=self.uuid,
            name=f"block-{self.uuid[:8]}",
            boot=boot,
            memory_mib=192,
            vcpus=vcpus,
            on_crash=OnEvent.PRESERVE,
            on_reboot=OnEvent.PRESERVE,
            owner="tests",
            disks=disks,
        )
        self.toolstack.create(spec)
        self.console: Console = self.toolstack.open_console(self.uuid)
        self.toolstack.unpause(self.uuid)
        self.until(rb"REEVE-GUEST-READY", BOOT_SECONDS)
        self.until(PROMPT, BOOT_SECONDS)
        self.run("echo 7 >/proc/sys/kernel/printk")

    def until(self, pattern: bytes, seconds: float = 60.0) -> bytes:
        """What came up to the end of the first match; the rest is kept."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen, re.MULTILINE)) is None:
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} within {seconds:g} s\n{self.seen[-3000:].decode(errors='replace')}"
            self.seen += self.console.read(timeout=min(left, 1.0))
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def run(self, command: str, seconds: float = 60.0) -> str:
        """What a shell command printed."""
        self.start(command)
        return self.result(seconds)

    def start(self, command: str) -> None:
        self.console.write(f"{command}; echo DONE-$((40+2))\n".encode())

    def result(self, seconds: float) -> str:
        text = self.until(rb"DONE-42", seconds).decode(errors="replace")
        self.until(PROMPT)
        return text.replace("\r", "")

    def device(self, name: str = "xvda") -> DeviceInfo:
        return next(info for info in self.toolstack.list_devices(self.uuid) if info.id == name)

    def connected(self, name: str = "xvda", seconds: float = 30.0) -> DeviceInfo:
        until(lambda: self.device(name).state is DeviceState.CONNECTED, f"{name} to be connected", seconds)
        return self.device(name)

    def driver_pid(self) -> int | None:
        """The process that serves its disks now."""
        return driver_of(self.rig, self.toolstack.get_domain(self.uuid).domid)

    def kill_driver(self) -> int:
        pid = until(self.driver_pid, "a driver process")
        os.kill(pid, signal.SIGKILL)
        return int(pid)

    def log(self) -> bytes:
        return self.toolstack.console_log(self.uuid, LOG_BYTES)

    def close(self) -> None:
        self.console.close()
        self.toolstack.destroy(self.uuid)
        self.toolstack.close()


def driver_of(rig: HostRig, domid: int | None) -> int | None:
    """By its name, and by a file of this host's that it has open: there may be others on the machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().strip() == f"reeve-disk{domid}" and any(
                str(rig.state) in os.readlink(fd) for fd in (folder / "fd").iterdir()
            ):
                return int(folder.name)
    return None


def reconnect(guest: Guest) -> None:
    """After another host process was started."""
    guest.toolstack.close()
    guest.toolstack = guest.rig.connect()
    guest.console = guest.toolstack.open_console(guest.uuid)
    guest.seen = b""


def daemons(rig: HostRig) -> list[int]:
    """Storage daemons of this host."""
    found = []
    for path in rig.state.glob("disks/*/pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-storage"):
                found.append(pid)
    return found


def new_disk(rig: HostRig, mib: int, name: str = "") -> Path:
    folder = rig.state / "images"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{uuid.uuid4().hex[:8]}.img")
    with path.open("wb") as file:
        file.truncate(mib << 20)
    return path


@contextlib.contextmanager
def guest(rig: HostRig, image: Image, *disks: DiskSpec, **options: Any) -> Iterator[Guest]:
    made = Guest(rig, image, disks, **options)
    try:
        yield made
    finally:
        made.close()
