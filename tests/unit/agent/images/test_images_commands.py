"""Programs are run without a shell and bounded in time; their failures become one line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from agent.images.debian import read_member, read_members, run_command
from agent.images.errors import ImageBuildFailed


def test_output_and_folder(tmp_path: Path) -> None:
    assert run_command(["pwd", "-P"], 10, cwd=tmp_path).strip() == str(tmp_path.resolve())


def test_no_shell() -> None:
    assert run_command(["echo", "$HOME; `id`"], 10) == "$HOME; `id`\n"


@pytest.mark.parametrize(
    ("command", "timeout", "text"),
    [
        (["no-such-program-here"], 10, "is not installed"),
        (["sleep", "30"], 0.05, "did not end"),
        (["false"], 10, "no reason given"),
        (["ls", "/no/such/folder"], 10, "No such file"),
    ],
)
def test_failures(command: list[str], timeout: float, text: str) -> None:
    with pytest.raises(ImageBuildFailed, match=text) as caught:
        run_command(command, timeout)
    assert "\n" not in caught.value.message


def test_a_damaged_package(tmp_path: Path) -> None:
    package = tmp_path / "x.deb"
    package.write_bytes(b"!<arch>\nnonsense")
    with pytest.raises(ImageBuildFailed, match=r"x\.deb"):
        read_member(package, lambda name: True)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this machine: install dpkg")
def test_several_files_of_a_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for path, data in {"lib/a.ko": b"A", "lib/b.ko": b"B", "lib/c.txt": b"C", "lib/d.ko": b"D"}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    package = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "-Zgzip", "--build", str(tree), str(package)], check=True, capture_output=True)
    modules = read_members(package, lambda path: path.endswith(".ko"), 3)
    assert sorted(modules) == [("./lib/a.ko", b"A"), ("./lib/b.ko", b"B"), ("./lib/d.ko", b"D")]
    assert len(read_members(package, lambda path: path.endswith(".ko"), 2)) == 2
    with pytest.raises(ImageBuildFailed, match="does not hold"):
        read_members(package, lambda path: path.endswith(".ko"), 4)
