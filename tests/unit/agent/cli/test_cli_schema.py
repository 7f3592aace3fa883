from __future__ import annotations

from typing import Any


def test_every_schema(reeve: Any) -> None:
    data = reeve("schema").json
    assert set(data) == {"reeve", "instructions", "reply", "report"}
    assert data["instructions"]["create"]["properties"]["args"]["required"] == ["name"]


def test_one_of_them(reeve: Any) -> None:
    assert reeve("schema", "list").json["title"] == "list"
    assert reeve("schema", "--reply").json["$id"] == "urn:reeve:1.0:reply"
    assert reeve("schema", "--report").json["$id"] == "urn:reeve:1.0:report"


def test_a_verb_that_is_not_there(reeve: Any) -> None:
    result = reeve("schema", "frobnicate")
    assert result.code == 2 and "there is no verb 'frobnicate'" in result.err
