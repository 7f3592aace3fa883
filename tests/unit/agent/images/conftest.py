"""A small Debian: apt that answers from a dictionary, and packages made by dpkg-deb."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.images.errors import ImageBuildFailed


class FakeApt:
    """Runs in the place of apt-get and apt-cache; remembers the commands.

    :ivar stale: the lists name a version that cannot be downloaded, until `update`.
    :ivar empty: no list knows anything, until `update`.
    """

    def __init__(self, mirror: Path) -> None:
        self.mirror = mirror
        self.commands: list[list[str]] = []
        self.stale = self.empty = self.offline = self.corrupt = False
        self.packages: dict[str, tuple[str, Path | None, str]] = {}

    def make(self, name: str, version: str, files: dict[str, bytes], depends: str = "") -> None:
        tree = self.mirror / name
        for path, data in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: x <x@x>\nDescription: x\n"
        (tree / "DEBIAN" / "control").write_text(control)
        deb = self.mirror / f"{name}.deb"
        subprocess.run(["dpkg-deb", "-Zgzip", "--build", str(tree), str(deb)], check=True, capture_output=True)
        self.packages[name] = (version, deb, depends)

    def run(self, command: Sequence[str], timeout: float, cwd: Path | None = None) -> str:
        assert timeout > 0
        self.commands.append(list(command))
        if "update" in command:
            if self.offline:
                raise ImageBuildFailed("apt-get failed (E: no network): check apt's sources")
            self.stale = self.empty = False
            return ""
        if "show" in command:
            return self._show(command[-1])
        assert "download" in command and cwd is not None
        name, _, version = command[-1].partition("=")
        known, deb, _ = self.packages[name]
        if self.offline or version != known or deb is None:
            raise ImageBuildFailed("apt-get failed (E: 404 Not Found): check apt's sources")
        data = deb.read_bytes()
        (cwd / f"{name}_{version}_amd64.deb").write_bytes(data[:-1] if self.corrupt else data)
        return ""

    def _show(self, name: str) -> str:
        if name not in self.packages or self.empty:
            raise ImageBuildFailed("apt-cache failed (E: No packages found): check apt's sources")
        version, deb, depends = self.packages[name]
        digest = hashlib.sha256(deb.read_bytes() if deb else b"").hexdigest()
        shown = f"{version}~old" if self.stale else version
        return (
            f"Package: {name}\nVersion: {shown}\nArchitecture: amd64\nDepends: {depends}\n"
            f"Description: a package\n Depends: nothing\nSHA256: {digest}\n\nPackage: other\n"
        )

    def count(self, verb: str) -> int:
        return sum(verb in command for command in self.commands)


@pytest.fixture
def fake_apt(tmp_path: Path) -> FakeApt:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    apt = FakeApt(tmp_path / "mirror")
    apt.make("linux-image-amd64", "6.1-1", {"usr/share/doc/x": b""}, "linux-image-6.1.0-1-amd64 (= 6.1-1), linux-base")
    kernel_files = {"boot/config-6.1": b"CONFIG", "boot/vmlinuz-6.1": b"KERNEL" * 100, "lib/modules/x": b"m" * 100000}
    apt.make("linux-image-6.1.0-1-amd64", "6.1-1", kernel_files)
    apt.make("busybox-static", "1:1.35-4", {"bin/busybox": b"BUSYBOX"})
    return apt
