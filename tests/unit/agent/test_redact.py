from __future__ import annotations

import pytest

from agent.redact import redact

HIDDEN = "auth_token password PASSWD client_secret api_key key private_data trust-credentials auth X-Auth-Token"


@pytest.mark.parametrize("name", [*HIDDEN.split(), "signature", "session_cookie", "passphrase"])
def test_what_is_hidden(name: str) -> None:
    assert redact({name: "x", "list": [{name: {"deep": 1}}]}) == {name: "***", "list": [{name: "***"}]}


@pytest.mark.parametrize("name", ["user", "request_id", "keyboard", "author", "monkey", "project_id"])
def test_what_is_not(name: str) -> None:
    assert redact({name: "x"}) == {name: "x"}


def test_an_absent_secret_stays_absent() -> None:
    assert redact({"auth_token": None, "password": ""}) == {"auth_token": None, "password": ""}


def test_the_original_is_left_alone() -> None:
    data = {"a": [{"token": "x"}]}
    redact(data)
    assert data == {"a": [{"token": "x"}]}
