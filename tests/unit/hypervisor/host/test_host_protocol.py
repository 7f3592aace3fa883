from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import HostUnavailable, from_json
from hypervisor.host import protocol
from hypervisor.host.protocol import ProtocolError, Request


def test_a_request_goes_there_and_back() -> None:
    line = protocol.encode({"id": 7, "verb": "domain.get", "args": {"uuid": "u"}})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert protocol.decode_request(line) == Request(7, "domain.get", {"uuid": "u"})
    assert protocol.decode_request(b'{"id":1,"verb":"v"}').args == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"verb":"v"}', "id is missing"),
        (b'{"id":true,"verb":"v"}', "id is missing"),
        (b'{"id":1}', "verb is missing"),
        (b'{"id":1,"verb":2}', "verb is missing"),
        (b'{"id":1,"verb":"v","args":[]}', "args is no object"),
    ],
)
def test_what_is_no_request_is_named(line: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        protocol.decode_request(line)
    assert "\n" not in caught.value.message
    assert isinstance(from_json(caught.value.to_json()), ProtocolError)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(line: bytes) -> None:
    try:
        request = protocol.decode_request(line)
    except ProtocolError:
        return
    assert json.loads(line)["verb"] == request.verb


@pytest.mark.parametrize("theirs", [None, 1, [], [2, 0], ["1", 0], [1, 0, 0]])
def test_another_version_is_refused(theirs: object) -> None:
    with pytest.raises(ProtocolError, match="upgrade the older one"):
        protocol.check_version(theirs)


def test_a_newer_minor_version_is_fine() -> None:
    protocol.check_version([1, 99])
    assert protocol.version()


def test_places_by_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.os, "geteuid", lambda: 0)
    assert protocol.default_socket() == Path("/run/reeve/hypervisor.sock")
    assert protocol.default_state_dir() == Path("/var/lib/reeve/hypervisor")
    monkeypatch.setattr(protocol.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/r")
    assert protocol.default_socket() == Path("/r/reeve/hypervisor.sock")
    assert protocol.default_state_dir() == Path("/s/reeve/hypervisor")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert protocol.default_socket() == Path("/s/reeve/hypervisor/hypervisor.sock")


def test_unavailable_names_path_and_cure() -> None:
    error = protocol.unavailable(Path("/x/y.sock"), "no such file")
    assert isinstance(error, HostUnavailable) and error.retryable
    assert "/x/y.sock" in error.message and "start reeve-hypervisor" in error.message
