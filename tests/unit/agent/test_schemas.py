"""The published schemas, against what the agent takes and says."""

from __future__ import annotations

import dataclasses
import json
import uuid
from typing import Any

import jsonschema
import pytest
from agent_rig import Rig

from agent import schemas, wire
from agent.errors import MessageError

ID = str(uuid.uuid4())
MESSAGE: dict[str, Any] = {"reeve": "1.0", "id": ID, "verb": "show", "host": "node1", "args": {"uuid": ID}}


def problems(schema: dict[str, Any], data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(data)]


def test_each_verb_has_one_and_it_is_a_schema(rig: Rig) -> None:
    every = schemas.everything({name: verb.plugin for name, verb in rig.verbs.items()})
    assert set(every["instructions"]) == set(rig.verbs) and len(rig.verbs) >= 20
    made = [*every["instructions"].values(), every["reply"], every["report"]]
    for schema in made:
        jsonschema.Draft202012Validator.check_schema(schema)
        json.dumps(schema)
    assert len({schema["$id"] for schema in made}) == len(made)


def test_what_the_client_sends_fits(rig: Rig) -> None:
    schema = schemas.instruction(rig.verbs["show"].plugin)
    sent = wire.Instruction(ID, "show", "node1", {"uuid": ID}, "reeve.reply.1", 1e9)
    for instruction in (sent, dataclasses.replace(sent, reply_to="", deadline=None)):
        assert problems(schema, json.loads(wire.encode_instruction(instruction))) == []


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"deadline": None, "reply_to": None}, True),
        ({"deadline": 0}, False),
        ({"deadline": 1e300}, False),
        ({"reply_to": "a b"}, False),
        ({"id": ID.upper()}, ID.upper() == ID),
        ({"reeve": "2.0"}, False),
        ({"host": ""}, False),
        ({"colour": "red"}, False),
        ({"args": []}, False),
        ({"verb": None}, False),
    ],
)
def test_the_schema_and_the_agent_agree(rig: Rig, change: dict[str, Any], taken: bool) -> None:
    message = MESSAGE | change
    assert (problems(schemas.instruction(rig.verbs["show"].plugin), message) == []) is taken
    body = json.dumps(message).encode()
    try:
        wire.decode(wire.Raw(body, len(body)), "node1")
        decoded = True
    except MessageError:
        decoded = False
    assert decoded is taken


def test_replies_fit(rig: Rig) -> None:
    schema = schemas.reply()
    good = rig.run("list")
    bad = rig.run("show", {"uuid": ID})
    for reply in (good, bad, wire.Reply("", "node1", error={"code": "message.not_json", "message": "m",
                                                            "retryable": False, "undone": True})):  # fmt: skip
        assert problems(schema, reply.to_json()) == []
    assert problems(schema, good.to_json() | {"ok": False})


def test_reports_fit() -> None:
    report = wire.Report("capacity", "node1", 1.0, 1, {"cpus": 4})
    assert problems(schemas.report(), report.to_json()) == []
    assert problems(schemas.report(), report.to_json() | {"type": "weather"})
