"""The generator names things as documented and notices a change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import abi_render
import gen_abi
from abi_headers import Abi, Field, GenerationError, Layout


@pytest.mark.parametrize(
    ("header", "python"),
    [
        ("__HYPERVISOR_iret", "HYPERVISOR_iret"),
        ("_GTF_reading", "GTF_reading_BIT"),
        ("GTF_reading", "GTF_reading"),
        ("__XEN_LATEST_INTERFACE_VERSION__", "XEN_LATEST_INTERFACE_VERSION"),
    ],
)
def test_constants_can_be_used_inside_classes(header: str, python: str) -> None:
    assert abi_render.python_name(header) == python


def test_anonymous_members_are_flattened() -> None:
    layouts = {
        "outer.u": Layout("outer.u", True, 8, (Field("first", 0, "u8"), Field("second", 0, "u4")), anonymous=True),
        "outer": Layout("outer", False, 16, (Field("id", 0, "u4"), Field("u", 8, "outer.u"))),
    }
    assert abi_render.offsets(layouts) == {
        "SIZEOF_OUTER": 16,
        "OUTER_ID": 0,
        "OUTER_U": 8,
        "OUTER_U_FIRST": 8,
        "OUTER_U_SECOND": 8,
    }


def test_a_structure_differs_when_a_member_of_it_does() -> None:
    inner64, inner32 = Layout("a", False, 8, (Field("x", 0, "u8"),)), Layout("a", False, 4, (Field("x", 0, "u4"),))
    outer = Layout("b", True, 8, (Field("a", 0, "a"), Field("y", 0, "u8")))
    same = Layout("c", False, 4, (Field("z", 0, "u4"),))
    native = {"a": inner64, "b": outer, "c": same}
    assert list(abi_render.differing(native, {"a": inner32, "b": outer, "c": same})) == ["a", "b"]


def test_two_values_of_one_name_are_refused() -> None:
    layouts = {"start": Layout("start", False, 8, (Field("a", 4, "u4"),))}
    abi = Abi({"START_A": 5}, layouts)
    with pytest.raises(GenerationError, match="START_A would have two values: 5 and 4"):
        abi_render.render_numbers(abi, abi)


def test_check_tells_of_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gen_abi, "TARGET", tmp_path)
    (tmp_path / "errno.py").write_text("EPERM = 1\n")
    assert gen_abi.check({"errno.py": "EPERM = 1\n"}) == 0
    assert gen_abi.check({"errno.py": "EPERM = 2\n", "structs.py": ""}) == 1
    assert "+EPERM = 2" in capsys.readouterr().out


def test_missing_headers_are_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gen_abi.main(["--headers", str(tmp_path)]) == 2
    assert "install libxen-dev" in capsys.readouterr().err
