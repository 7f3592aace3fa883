"""docs/instructions.md against the plugins, and its error codes against the code."""

from __future__ import annotations

import re
from pathlib import Path

from agent.loader import load_verbs
from hypervisor import errors

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "instructions.md").read_text()


def sections() -> dict[str, str]:
    parts = re.split(r"^## (\w+)$", TEXT, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_verb_has_a_section_with_its_summary() -> None:
    verbs, _ = load_verbs()
    assert set(sections()) - {"Errors"} == set(verbs)
    for name, verb in verbs.items():
        assert verb.plugin.summary in sections()[name], name


def test_every_argument_is_listed_with_type_and_need() -> None:
    verbs, _ = load_verbs()
    for name, verb in verbs.items():
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", sections()[name], flags=re.M))
        properties = verb.plugin.args_schema.get("properties", {})
        assert set(rows) == set(properties), name
        for argument, row in rows.items():
            kind, default = (cell.strip() for cell in row.split("|")[:2])
            assert kind == properties[argument].get("type", "string"), (name, argument)
            assert (default == "required") == (argument in verb.plugin.args_schema.get("required", ())), (
                name,
                argument,
            )
            if "default" in properties[argument]:
                assert default == str(properties[argument]["default"]).replace("True", "true").replace("False", "false")


def test_every_code_is_listed() -> None:
    listed = set(re.findall(r"`([a-z]+\.[a-z_]+)`", sections()["Errors"]))
    source = "".join(path.read_text() for folder in ("agent", "plugins") for path in (ROOT / folder).glob("*.py"))
    source += "".join(path.read_text() for path in (ROOT / "agent" / "images").rglob("*.py"))
    used = set(re.findall(r'"((?:message|instruction|plugin|quarantine|lock|image|resize)\.[a-z_]+)"', source))
    # The base class's own, always overridden; what only building an image raises.
    used -= {"instruction.failed", "image.build_failed"}
    used |= {"reply.timeout", "broker.unreachable"}  # what an agent gets that asks another one
    used |= set(errors._tree(errors.ToolstackError)) | {"host.failure"}
    assert used <= listed | {"host.failure"} and listed <= used, (used - listed, listed - used)
