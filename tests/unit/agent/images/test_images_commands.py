"""Programs are run without a shell and bounded in time; their failures become one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.images.debian import read_member, run_command
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
