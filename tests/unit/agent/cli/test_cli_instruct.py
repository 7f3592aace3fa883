"""`reeve instruct`, with a real agent in this process: fake driver, folder broker."""

from __future__ import annotations

import io
import json
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from agent import conf
from agent.cli.values import arguments
from agent.service import Service
from hypervisor import errors


@pytest.fixture
def agent(reeve: Any) -> Iterator[Service]:
    service = Service(conf.load([reeve.options[1]]))
    service.start()
    yield service
    service.close()


def create(reeve: Any, *more: str) -> Any:
    words = ("--arg", "name=web", "--arg", f"kernel={reeve.kernel}", "--arg", "memory_mib=64")
    return reeve("instruct", "create", *words, "-f", "json", *more)


def test_an_instruction_is_carried_out(reeve: Any, agent: Service) -> None:
    reply = create(reeve).json
    assert (reply["ok"], reply["error"], reply["verb"], reply["host"]) == (True, None, "create", "testnode")
    assert reply["result"]["domain"]["state"] == "running"
    assert [step["name"] for step in reply["steps"]] == ["claim", "build", "start"]
    assert all(step["seconds"] >= 0 for step in reply["steps"])
    assert reply["accepted"] <= reply["finished"]
    assert [info.name for info in reeve.host.list_domains()] == ["web"]


def test_the_columns_are_those_of_the_reply(reeve: Any, agent: Service) -> None:
    assert set(reeve("instruct", "list", "-f", "json").json) == {
        *("id", "host", "verb", "ok", "result", "error", "steps", "accepted", "finished")
    }


def test_steps_are_told_to_a_human(reeve: Any, agent: Service) -> None:
    create(reeve)
    uuid_text = reeve.host.list_domains()[0].uuid
    out = reeve("instruct", "shutdown", "--arg", f"uuid={uuid_text}").out
    assert "ask the guest to power off" in out
    assert " s  " in out


def test_a_refusal_is_shown_and_fails(reeve: Any, agent: Service) -> None:
    result = reeve("instruct", "show", "--arg", f"uuid={uuid.uuid4()}", "-f", "json")
    assert result.code == 1
    assert json.loads(result.out)["error"]["code"] == "domain.not_found"
    assert result.error["code"] == "domain.not_found"


def test_a_failure_while_it_is_carried_out(reeve: Any, agent: Service) -> None:
    reeve.host.inject_error("create", errors.HostUnavailable("host is away"))
    result = create(reeve)
    assert (result.code, result.error["code"], result.error["retryable"]) == (1, "host.unavailable", True)
    assert reeve.host.list_domains() == []


def test_the_same_id_gets_the_same_reply(reeve: Any, agent: Service) -> None:
    ident = str(uuid.uuid4())
    first = create(reeve, "--id", ident).json
    again = create(reeve, "--id", ident).json
    assert first["result"]["domain"]["uuid"] == again["result"]["domain"]["uuid"]
    assert len(reeve.host.list_domains()) == 1


def test_arguments_from_a_file_and_from_standard_input(
    reeve: Any, agent: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"name": "web", "kernel": reeve.kernel, "memory_mib": 64}
    file = reeve.folder / "args.json"
    file.write_text(json.dumps(args))
    assert reeve("instruct", "create", "--json", str(file), "-f", "json").json["ok"]
    args["name"] = "other"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(args).encode())))
    shown = reeve("instruct", "create", "--json", "-", "--arg", "memory_mib=32", "-f", "json").json
    assert shown["result"]["domain"]["memory_mib"] == 32


def test_nobody_answers(reeve: Any) -> None:
    result = reeve("instruct", "list", "--timeout", "0.1", "-f", "json")
    assert (result.code, result.error["code"], result.error["retryable"]) == (1, "reply.timeout", True)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--broker", "gopher://x"], "agent.config"),
        (["--broker", "amqp://guest:secret@127.0.0.1:1/"], "broker.unreachable"),
        (["--host", "no/host"], "message.bad_field"),
        (["--id", "nonsense"], "message.bad_field"),
    ],
)
def test_it_cannot_be_sent(reeve: Any, options: list[str], code: str) -> None:
    result = reeve("instruct", "list", "--timeout", "0.2", *options, "-f", "json")
    assert result.code == 1
    assert "secret" not in result.err
    if code == "message.bad_field":
        assert result.error["code"].startswith(("message.", "agent.", "reply."))
    else:
        assert result.error["code"] == code


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([], {}),
        (["a=1", "b=true", "c=null", "d=1.5"], {"a": 1, "b": True, "c": None, "d": 1.5}),
        (["a=text", "b=", "c=a=b"], {"a": "text", "b": "", "c": "a=b"}),
        (['a="1"', "b=[1,2]", 'c={"x":1}'], {"a": "1", "b": [1, 2], "c": {"x": 1}}),
        (["boot.kernel=/k", "boot.cmdline=quiet ro"], {"boot": {"kernel": "/k", "cmdline": "quiet ro"}}),
        (["a=NaN", "b=Infinity", "c=01"], {"a": "NaN", "b": "Infinity", "c": "01"}),
        (["a=" + "[" * 100_000], {"a": "[" * 100_000}),
    ],
)
def test_arguments(pairs: list[str], wanted: dict[str, Any]) -> None:
    assert arguments(pairs) == wanted


@pytest.mark.parametrize("pairs", [["a"], ["=1"], ["a..b=1"], ["1=2"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["a b=1"]])
def test_arguments_that_are_refused(pairs: list[str]) -> None:
    with pytest.raises(Exception) as caught:
        arguments(pairs)
    assert getattr(caught.value, "code", "") == "cli.usage"
