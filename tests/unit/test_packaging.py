"""What is in the tree is also in the package that gets installed."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.mark.parametrize("package", ["hypervisor", "agent", "plugins"])
def test_every_folder_with_modules_is_a_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_dependency_has_its_line_of_why() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    config = setup_cfg()
    wanted = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    names = [line.split(">")[0].split("=")[0].split("<")[0].split(";")[0].strip() for line in wanted.split("\n")]
    assert len([name for name in names if name]) > 5
    assert [name for name in names if name and f"`{name}`" not in text] == []


def test_no_module_is_too_long() -> None:
    generated = {"_generated.py", "structs.py", "errno.py", "hypercalls.py"}
    modules = [
        path
        for package in ("hypervisor", "agent", "plugins", "tools", "bench")
        for path in (ROOT / package).rglob("*.py")
        if not (path.parent.name == "abi" and path.name in generated)
    ]
    assert [f"{path}" for path in modules if len(path.read_text().splitlines()) > 400] == []
