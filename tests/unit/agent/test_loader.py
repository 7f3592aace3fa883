from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from agent.api import InstructionError, Plan, Plugin
from agent.errors import ConfigError
from agent.loader import Verb, load_driver, load_verbs
from hypervisor.errors import HostFailure, SpecInvalid

PLUGIN = """
from agent.api import Plan, Plugin


class Good(Plugin):
    verb = "third_party"
    args_schema = {"type": "object", "additionalProperties": False}

    def plan(self, args, host):
        return Plan(())


class Old(Good):
    verb = "old"
    api_version = (0, 9)


class Newer(Good):
    verb = "newer"
    api_version = (1, 99)


class Versionless(Good):
    verb = "versionless"
    api_version = "1.2"


class BadLane(Good):
    verb = "bad_lane"
    lane = "fast"


class BadStep(Good):
    verb = "bad_step"
    step_kinds = (Plan,)


class BadProperty(Good):
    verb = "bad_property"

    @property
    def args_schema(self):
        raise SystemExit(4)


class Misnamed(Good):
    verb = "other"


class BadSchema(Good):
    verb = "bad_schema"
    args_schema = {"type": "nonsense"}


class NoPlan(Plugin):
    verb = "no_plan"
    args_schema = {}


class NoPlugin:
    pass


def factory(settings):
    return settings["boom"]
"""

ENTRY_POINTS = """
[test.reeve.instructions]
third_party = third_party_verbs:Good
old = third_party_verbs:Old
misnamed = third_party_verbs:Misnamed
bad_schema = third_party_verbs:BadSchema
no_plan = third_party_verbs:NoPlan
no_plugin = third_party_verbs:NoPlugin
missing = no_such_module:Thing
newer = third_party_verbs:Newer
versionless = third_party_verbs:Versionless
bad_lane = third_party_verbs:BadLane
bad_step = third_party_verbs:BadStep
bad_property = third_party_verbs:BadProperty

[reeve.drivers]
broken = third_party_verbs:factory
gone = no_such_module:create
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution of somebody else, as pip leaves it on the path."""
    (tmp_path / "third_party_verbs.py").write_text(textwrap.dedent(PLUGIN))
    info = tmp_path / "third_party-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "third_party_verbs", raising=False)
    return "test.reeve.instructions"


def test_a_third_party_verb_is_found_and_broken_ones_are_left_out(
    installed: str, caplog: pytest.LogCaptureFixture
) -> None:
    verbs, broken = load_verbs(installed)
    assert sorted(verbs) == ["third_party"]
    assert sorted(broken) == [
        "bad_lane", "bad_property", "bad_schema", "bad_step", "misnamed", "missing", "newer", "no_plan", "no_plugin",
        "old", "versionless",
    ]  # fmt: skip
    assert "1.99" in broken["newer"] and broken["newer"].endswith(": upgrade the agent")
    assert broken["versionless"] == "api_version '1.2' is no (major, minor)" and "'fast'" in broken["bad_lane"]
    assert "agent.api.Step" in broken["bad_step"] and broken["bad_property"] == "SystemExit: 4"
    assert "cannot be loaded: ModuleNotFoundError" in broken["missing"] and "plugin API 0.9" in broken["old"]
    assert "leads to the verb 'other'" in broken["misnamed"] and "JSON Schema" in broken["bad_schema"]
    assert "is no agent.api.Plugin" in broken["no_plugin"] and "no_plan" in broken
    assert "plugin old left out" in caplog.text


def test_our_own_verbs_all_load() -> None:
    verbs, broken = load_verbs()
    assert not broken
    assert set(verbs) >= {
        "console_log", "create", "destroy", "list", "pause", "reboot", "show", "shutdown", "unpause",
    }  # fmt: skip


class Strict(Plugin):
    verb = "strict"
    args_schema: Any = {  # noqa: RUF012
        "type": "object",
        "additionalProperties": False,
        "required": ["n"],
        "properties": {
            "n": {"type": "integer", "minimum": 1, "maximum": 10},
            "s": {"type": "string", "pattern": "^[a-z]+$"},
        },
    }

    def plan(self, args: Any, host: Any) -> Plan:
        return Plan(())


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({}, "args: 'n' is a required property"),
        ({"n": 0}, "args.n: 0 is less than"),
        ({"n": 11}, "args.n: 11 is greater"),
        ({"n": 1.0}, "args.n: 1.0 is not of type 'integer'"),
        ({"n": True}, "args.n: True is not of type"),
        ({"n": "1"}, "args.n: '1' is not of type"),
        ({"n": None}, "args.n: None is not of type"),
        ({"n": 1, "x": 1}, "args: Additional properties"),
        ({"n": 1, "s": "A"}, "args.s: 'A' does not match"),
        ({"n": 1, "s": "a\n"}, "args.s: 'a\\n' does not match"),
        ({"n": 1, "s": "A" * 100000}, "args.s: 'AAAA"),
    ],
)
def test_bad_arguments_name_the_field(args: dict[str, Any], where: str) -> None:
    with pytest.raises(InstructionError) as caught:
        Verb.of(Strict()).check(args)
    assert caught.value.code == "instruction.bad_args"
    assert caught.value.message.startswith(where) and len(caught.value.message) < 400
    assert "arguments of 'strict': n, s" in caught.value.message


def test_good_arguments() -> None:
    Verb.of(Strict()).check({"n": 10, "s": "abc"})


def test_drivers(installed: str) -> None:
    assert load_driver("fake", {"cpus": "3"}).host_info().cpus == 3
    with pytest.raises(ConfigError, match=r"'vmware' is not installed: give .* fake"):
        load_driver("vmware", {})
    with pytest.raises(SpecInvalid):
        load_driver("fake", {"colour": "blue"})
    with pytest.raises(HostFailure, match="did not start: KeyError"):
        load_driver("broken", {})
    with pytest.raises(HostFailure, match="'gone' cannot be imported: ModuleNotFoundError"):
        load_driver("gone", {})
    with pytest.raises(HostFailure, match="which is no Toolstack"):
        load_driver("broken", {"boom": "x"})
