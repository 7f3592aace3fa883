"""Debian guests with nics, for tests of networks: an image with netfront and `netload`, a host process, consoles."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.images import Image, ImageBuildFailed, build_image
from agent.images.debian import KERNEL_META_PACKAGE, Apt, read_members
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainSpec, KernelBoot, OnEvent, Toolstack
from hypervisor.toolstack.devices import NicSpec
from hypervisor.toolstack.drivers import load

SOURCE = Path(__file__).resolve().parents[1] / "guests" / "net" / "netload.c"
MODULES = ("drivers/net/xen-netfront.ko",)
PROMPT = b"/ # "
BOOT_SECONDS = 90.0

START = """#!/bin/busybox sh
for module in /lib/net/*.ko; do
    /bin/busybox insmod "$module"
done
/bin/busybox ip link set lo up
"""

LEASE = """#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "LEASE $ip/$mask via $router, names from $dns"
"""


def missing(what: str) -> None:
    """Skip, unless nothing may be skipped."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def build_netload(folder: Path) -> Path:
    """The program, for guest and host."""
    compiler = shutil.which("gcc")
    if compiler is None:
        missing("gcc is not installed: it builds the guest's program")
    assert compiler is not None
    result = folder / "netload"
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(result), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return result


def build_net_image(
    folder: Path, program: Path, modules: Sequence[str] = MODULES, more: Sequence[tuple[Path, str]] = ()
) -> Image:
    """:param modules: loaded when it boots. :param more: files and where they go."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "packages"
    start = folder / "start"
    start.write_text(START)
    start.chmod(0o755)
    lease = folder / "lease"
    lease.write_text(LEASE)
    lease.chmod(0o755)
    add = [(program, "bin/netload"), (start, "etc/init.d/net"), (lease, "etc/lease"), *more]
    apt = Apt(cache)
    try:
        _, package = apt.fetch(KERNEL_META_PACKAGE)
        for name, content in read_members(package, lambda path: path.endswith(tuple(modules)), len(modules)):
            module = folder / Path(name).name
            module.write_bytes(content)
            add.append((module, f"lib/net/{module.name}"))
        return build_image(folder / "images", name="net", add=add, cache_dir=cache, apt=apt)
    except ImageBuildFailed as exc:
        missing(f"no Debian packages to be had here: {exc}")
        raise


def driver_pid(folder: Path, domain: str) -> int:
    """The process that serves the nics of a domain: it listens at a socket in the domain's folder."""
    directory = os.open(folder / "domains" / domain, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            # A path of any length, which the folders of tests may have.
            sock.connect(f"/proc/self/fd/{directory}/driver-nic.sock")
            return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    finally:
        os.close(directory)


def switch_pid(folder: Path) -> int | None:
    """The switch process of the host whose state folder this is."""
    path = str(folder / "net" / "switch.sock").encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path in entry.read_bytes().split(b"\0"):
                return int(entry.parent.name)
    return None


@contextlib.contextmanager
def net_host(
    folder: Path,
    networks: Sequence[str],
    memory_mib: int = 1024,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Toolstack]:
    """A host process with these networks; its log is ``host.log`` in the folder.

    :param options: further lines of its configuration.
    :param prefix: a command that becomes what it is given, as ``ip netns exec`` and ``setpriv`` do.
    """
    program = shutil.which("reeve-hypervisor", path=str(Path(sys.executable).parent)) or "reeve-hypervisor"
    folder.mkdir(exist_ok=True)
    config, log, control = folder / "hypervisor.conf", folder / "host.log", folder / "hypervisor.sock"
    lines = [*(f"networks = {network}" for network in networks), *options]
    config.write_text("\n".join(["[hypervisor]", *lines, ""]))
    command = [*prefix, program, "--config-file", str(config), "--state-dir", str(folder), "--socket", str(control)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--memory-mib", str(memory_mib)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                toolstack = load("embedded", {"socket": str(control)})
                toolstack.list_domains()
                break
            except HostUnavailable:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)  # a poll with a deadline
        try:
            yield toolstack
        finally:
            with contextlib.suppress(HostUnavailable):
                for info in toolstack.list_domains():
                    toolstack.destroy(info.uuid)
            toolstack.close()
    finally:
        process.terminate()
        process.wait(timeout=20)


class Guest:
    """A Debian guest, driven by its console's shell."""

    def __init__(
        self, toolstack: Toolstack, image: Image, nics: Sequence[NicSpec], memory_mib: int = 128, **fields: Any
    ) -> None:
        """:param fields: further ones of the `DomainSpec`."""
        self.toolstack = toolstack
        self.uuid = str(uuid.uuid4())
        self._seen = b""
        self._number = 0
        toolstack.create(
            DomainSpec(
                uuid=self.uuid,
                name=f"net-{self.uuid[:8]}",
                boot=KernelBoot(kernel=image.kernel, ramdisk=image.ramdisk, cmdline=image.cmdline),
                memory_mib=memory_mib,
                nics=tuple(nics),
                on_crash=OnEvent.PRESERVE,
                owner="tests",
                **fields,
            )
        )
        self.console = toolstack.open_console(self.uuid)
        toolstack.unpause(self.uuid)

    @classmethod
    def joined(cls, toolstack: Toolstack, ident: str) -> Guest:
        """A domain that is there already, and paused: it is let run."""
        guest = cls.__new__(cls)
        guest.toolstack, guest.uuid, guest._seen, guest._number = toolstack, ident, b"", 0
        guest.console = toolstack.open_console(ident)
        toolstack.unpause(ident)
        return guest

    def reconnect(self) -> None:
        """To the console of the domain's next incarnation."""
        self.console.close()
        self.console = self.toolstack.open_console(self.uuid)

    def booted(self) -> Guest:
        self.until(re.escape(PROMPT), BOOT_SECONDS)
        return self

    def until(self, pattern: bytes, seconds: float) -> bytes:
        """What was printed up to a match."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {seconds:g} s:\n{self._seen[-3000:].decode(errors='replace')}"
            self._seen += self.console.read(timeout=left)
        text, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return text

    def begin(self, command: str) -> bytes:
        """Type a command; the pattern that tells of its end."""
        self._number += 1
        # Written so that the echo of what is typed is not taken for the answer.
        self.console.write(f"{command}; echo DONE''-{self._number} $?\n".encode())
        return rb"DONE-%d (\d+)\r?\n" % self._number

    def end(self, pattern: bytes, seconds: float = 60.0) -> tuple[int, str]:
        """Exit code and output."""
        text = self.until(pattern, seconds)
        found = re.search(pattern, text)
        assert found is not None
        return int(found[1]), text.decode(errors="replace")

    def run(self, command: str, seconds: float = 60.0) -> str:
        """:raises AssertionError: it fails."""
        code, text = self.end(self.begin(command), seconds)
        assert code == 0, text
        return text

    def address(self, text: str, nic: int = 0) -> None:
        """Bring a nic up with ``ADDRESS/LENGTH``; Linux makes the interface some time after the front end connects."""
        name = f"eth{nic}"
        self.run(
            f"n=0; until ip link show {name} >/dev/null 2>&1 || [ $n -gt 100 ]; do usleep 100000; n=$((n+1)); done"
        )
        self.run(f"ip addr add {text} dev {name} && ip link set {name} up")

    def nic(self, ident: str = "0") -> dict[str, int]:
        """Its counters."""
        found = [info for info in self.toolstack.list_devices(self.uuid) if info.kind == "nic" and info.id == ident]
        return dict(found[0].stats) if found else {}

    def destroy(self) -> None:
        self.console.close()
        self.toolstack.destroy(self.uuid)
