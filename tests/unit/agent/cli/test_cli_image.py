"""`reeve image`, with images made from files (Debian's packages are the library's own tests)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def built(reeve: Any, tmp_path: Path) -> Path:
    (tmp_path / "ramdisk").write_bytes(b"070701" + bytes(200))
    result = reeve(
        "image", "build", "small", "--kernel", reeve.kernel, "--ramdisk", str(tmp_path / "ramdisk"), "-f", "json"
    )
    assert result.json["name"] == "small"
    return Path(result.json["directory"])


def test_build_lands_in_the_agents_store(reeve: Any, built: Path) -> None:
    assert built == reeve.folder / "agent" / "images" / "small"
    assert (built / "manifest.json").exists()


def test_stages_are_told_on_standard_error(reeve: Any) -> None:
    result = reeve("image", "build", "own", "--kernel", reeve.kernel, "--ramdisk", reeve.kernel)
    assert "writing image own" in result.err
    assert "writing image" not in result.out


def test_quiet_is_quiet(reeve: Any) -> None:
    result = reeve("-q", "image", "build", "own", "--kernel", reeve.kernel, "--ramdisk", reeve.kernel)
    assert (result.code, result.err) == (0, "")


def test_list_and_show(reeve: Any, built: Path) -> None:
    assert reeve("image", "list", "-f", "value", "-c", "name").out == "small\n"
    (row,) = reeve("image", "list", "-f", "json").json
    assert set(row) == {"name", "size", "created", "packages", "cmdline"}
    shown = reeve("image", "show", "small", "-f", "json").json
    assert shown["size"] == row["size"]
    assert Path(shown["kernel"]).exists() and Path(shown["ramdisk"]).exists()
    assert reeve("image", "show", f"{built}/", "-f", "json").json["name"] == "small"


def test_verify(reeve: Any, built: Path) -> None:
    assert reeve("image", "verify", "small", "-f", "json").json["verified"] is True
    kernel = Path(reeve("image", "show", "small", "-f", "json").json["kernel"])
    kernel.chmod(0o644)
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"!")
    assert reeve("image", "verify", "small", "-f", "json").error["code"] == "image.invalid"


def test_a_domain_boots_an_image(reeve: Any, built: Path) -> None:
    made = reeve("domain", "create", "web", "--image", "small", "--cmdline=quiet", "-f", "json").json
    boot = reeve.host.get_spec(made["uuid"]).boot
    assert boot.cmdline == "quiet"
    assert Path(boot.kernel).parent == built
    assert boot.ramdisk and Path(boot.ramdisk).parent == built


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("image show nix", "image.not_found"),
        ("image show ..", "image.invalid"),
        ("image verify nix", "image.not_found"),
        ("image build -- -x", "image.invalid"),
        ("image build own --kernel /does/not/exist", "image.invalid"),
        ("domain create web --image nix", "image.not_found"),
    ],
)
def test_refusals(reeve: Any, line: str, code: str) -> None:
    command, dashes, rest = line.partition(" -- ")
    result = reeve(*command.split(), "-f", "json", *([dashes.strip(), *rest.split()] if dashes else []))
    assert result.error["code"] == code


def test_an_image_is_not_replaced_unasked(reeve: Any, built: Path) -> None:
    again = ("image", "build", "small", "--kernel", reeve.kernel, "--ramdisk", reeve.kernel, "-f", "json")
    assert reeve(*again).error["code"] == "image.invalid"
    assert reeve(*again, "--replace").json["name"] == "small"
