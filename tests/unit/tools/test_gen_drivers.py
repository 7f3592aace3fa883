"""The table of verbs and drivers says what the code does."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from hypervisor.toolstack.api import Toolstack
from hypervisor.toolstack.drivers._optional import OptionalVerbs
from hypervisor.toolstack.drivers.fake import FakeToolstack
from hypervisor.toolstack.drivers.xl.driver import XlToolstack
from hypervisor.toolstack.needs import NEEDS

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
import gen_drivers


def test_what_is_committed_is_what_is_generated(tmp_path: Path) -> None:
    assert gen_drivers.problems() == [] and gen_drivers.main(["--check"]) == 0
    other = tmp_path / "drivers.md"
    for text in (None, gen_drivers.generate().replace("| `save` | save | yes", "| `save` | save | no")):
        if text is not None:
            other.write_text(text)
        (problem,) = gen_drivers.problems(other)
        assert str(other) in problem


def test_every_verb_and_every_driver_is_in_it() -> None:
    verbs = [name for name, value in vars(Toolstack).items() if callable(value) and not name.startswith("_")]
    assert list(NEEDS) == verbs
    assert set(gen_drivers.DRIVERS) == {
        point.name for point in importlib.metadata.entry_points(group="reeve.drivers") if point.dist is not None
    }


@pytest.mark.parametrize(("name", "driver"), [("fake", FakeToolstack), ("xl", XlToolstack)])
def test_a_verb_is_done_exactly_where_its_capability_is_declared(name: str, driver: type[OptionalVerbs]) -> None:
    for verb, needed in NEEDS.items():
        done = getattr(driver, verb) is not getattr(OptionalVerbs, verb, None)
        assert (gen_drivers.DRIVERS[name].cell(needed) != gen_drivers.NO) is done, verb
