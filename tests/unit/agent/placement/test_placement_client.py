"""Placement's client against a server that knows the rules, and against one of bad will."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from fake_placement import FakePlacement, Handler
from image_servers import Cloud, Server, serving

from agent.conf_keystone import KeystoneSettings
from agent.placement.auth import FixedAuth, KeystoneAuth
from agent.placement.client import ATTEMPTS, Client, Consumer
from agent.placement.errors import Conflict, PlacementError
from agent.placement.http import Http

HOST = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
DOMAIN = "33333333-3333-4333-8333-333333333333"
STOCK = {"total": 100, "reserved": 0, "min_unit": 1, "max_unit": 100, "step_size": 1, "allocation_ratio": 1.0}
MARKS: dict[str, Any] = {"project": "reeve", "user": "reeve", "type": "REEVE_DOMAIN"}


def make(server: FakePlacement, **options: Any) -> Client:
    return Client(Http(seconds=options.pop("seconds", 5.0), **options), FixedAuth("admin"), server.url)


def failure(call: Callable[[], object]) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        call()
    assert "\n" not in caught.value.message and len(caught.value.message) < 600
    return caught.value


def test_a_provider_is_made_found_and_renamed(server: FakePlacement) -> None:
    client = make(server)
    assert client.provider(HOST) is None and client.provider_named("node1") is None
    made = client.create_provider(HOST, "node1")
    assert (made.uuid, made.name) == (HOST, "node1")
    assert client.provider(HOST) == made == client.provider_named("node1")
    client.rename_provider(HOST, "node one")
    assert client.provider_named("node one") is not None
    assert failure(lambda: client.create_provider(OTHER, "node one")).code == "placement.name_taken"
    assert len(server.providers) == 1


def test_inventories_traits_and_aggregates(server: FakePlacement) -> None:
    client = make(server)
    client.create_provider(HOST, "node1")
    client.set_inventories(HOST, client.inventories(HOST)[0], {"VCPU": STOCK})
    generation, found = client.inventories(HOST)
    assert found == {"VCPU": STOCK}
    assert failure(lambda: client.set_inventories(HOST, generation - 1, {})).code == "placement.conflict"
    assert failure(lambda: client.set_traits(HOST, generation, ["CUSTOM_REEVE"])).code == "placement.refused"
    client.create_trait("CUSTOM_REEVE")
    client.create_trait("CUSTOM_REEVE")
    client.set_traits(HOST, generation, ["CUSTOM_REEVE"])
    assert client.traits(HOST)[1] == {"CUSTOM_REEVE"}
    client.set_aggregates(HOST, generation + 1, [OTHER])
    assert client.aggregates(HOST) == (generation + 2, {OTHER})
    assert failure(lambda: client.inventories(OTHER)).code == "placement.no_provider"


def test_a_consumer_comes_changes_and_goes(server: FakePlacement) -> None:
    client = make(server)
    client.create_provider(HOST, "node1")
    client.set_inventories(HOST, 0, {"VCPU": STOCK})
    assert client.consumer(DOMAIN) == Consumer()
    client.set_consumer(DOMAIN, Consumer({HOST: {"VCPU": 4}}, **MARKS))
    found = client.consumer(DOMAIN)
    assert found == Consumer({HOST: {"VCPU": 4}}, generation=1, **MARKS)
    assert client.allocations(HOST) == {DOMAIN: {"VCPU": 4}}
    more = dataclasses.replace(found, allocations={HOST: {"VCPU": 101}})
    assert failure(lambda: client.set_consumer(DOMAIN, more)).code == "placement.over_capacity"
    stale = dataclasses.replace(found, generation=0)
    assert failure(lambda: client.set_consumer(DOMAIN, stale)).code == "placement.conflict"
    client.set_consumer(DOMAIN, dataclasses.replace(found, allocations={}))
    assert client.consumer(DOMAIN) == Consumer() and client.allocations(HOST) == {}


def test_conflicts_are_met_a_bounded_number_of_times(server: FakePlacement) -> None:
    pauses: list[float] = []

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        return False

    client = Client(Http(), FixedAuth("admin"), server.url, wait=wait, chance=lambda: 0.5)
    client.create_provider(HOST, "node1")
    others = [2]

    def meanwhile(method: str, path: str) -> None:
        if method == "PUT" and others[0]:
            others[0] -= 1
            server.providers[HOST].generation += 1

    server.before = meanwhile

    def attempt() -> None:
        generation, found = client.inventories(HOST)
        client.set_inventories(HOST, generation, found | {"VCPU": STOCK})

    client.repeat(attempt)
    assert pauses == [0.125, 0.25] and client.inventories(HOST)[1] == {"VCPU": STOCK}
    others[0] = 100
    asked = server.count("PUT")
    with pytest.raises(Conflict):
        client.repeat(attempt)
    assert server.count("PUT") - asked == ATTEMPTS
    client = Client(Http(), FixedAuth("admin"), server.url, wait=lambda seconds: True)
    asked = server.count("PUT")
    with pytest.raises(Conflict):
        client.repeat(attempt)
    assert server.count("PUT") - asked == 1, "whoever is to stop does not try again"


def body(status: int, data: object) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(status, data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe{",
        b"[" * 100_000,
        [],
        {"allocations": []},
        {"allocations": {HOST: {"resources": {"VCPU": 1}}}},  # not whose
        {"allocations": {"../x": {"resources": {}}}},
        {"allocations": {HOST: {"resources": {"VCPU": -1}}}, **MARKS},
        {"allocations": {HOST: {"resources": {"VCPU": 1 << 40}}}, **MARKS},
        {"allocations": {HOST: {"resources": {"VCPU": "many"}}}, **MARKS},
        {"allocations": {HOST: {"resources": {"a b": 1}}}, **MARKS},
    ],
    ids=str,
)
def test_an_answer_that_makes_no_sense_is_not_used(server: FakePlacement, data: object) -> None:
    server.misdeeds.append(body(200, data))
    assert failure(lambda: make(server).consumer(DOMAIN)).code == "placement.bad_answer"


def test_another_provider_than_was_asked_for_is_not_taken(server: FakePlacement) -> None:
    server.misdeeds.append(body(200, {"uuid": OTHER, "name": "node1", "generation": 1}))
    assert failure(lambda: make(server).provider(HOST)).code == "placement.bad_answer"


def test_a_redirect_is_not_followed(server: FakePlacement) -> None:
    server.misdeeds.append(lambda handler: handler.reply(302, b"", {"Location": server.url + "/allocations/x"}))
    assert failure(lambda: make(server).allocations(HOST)).code == "placement.refused"
    assert len(server.asked) == 1


def test_too_long_an_answer_is_not_read(server: FakePlacement) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.over.is_set():
            handler.wfile.write(b" " * 4096)

    server.misdeeds.append(endless)
    found = failure(lambda: make(server, max_bytes=100_000).allocations(HOST))
    assert found.code == "placement.bad_answer" and not found.retryable


def headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    trickle(handler, b"X-Slow: yes\r\n" * 100)


def slowly(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    trickle(handler, b" " * 1000)


def trickle(handler: Handler, data: bytes) -> None:
    for byte in data:
        if handler.server.over.wait(0.02):
            break
        handler.wfile.write(bytes([byte]))


@pytest.mark.parametrize("misdeed", [headers, slowly])
def test_a_byte_now_and_then_is_no_answer(server: FakePlacement, misdeed: Callable[[Handler], None]) -> None:
    server.misdeeds.append(misdeed)
    client = make(server, seconds=1.0)  # time enough on a busy machine for an answer that comes at once
    found = failure(lambda: client.allocations(HOST))
    assert found.code == "placement.unreachable" and found.retryable
    assert failure(lambda: client.allocations(HOST)).code == "placement.no_provider", "the next question is answered"


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = Client(Http(seconds=1), FixedAuth(), f"http://127.0.0.1:{port}")
    found = failure(lambda: client.provider(HOST))
    assert found.code == "placement.unreachable" and found.retryable
    assert failure(lambda: Client(Http(), FixedAuth()).provider(HOST)).code == "placement.unreachable"


def test_a_server_in_trouble_or_too_old_is_said(server: FakePlacement) -> None:
    server.misdeeds.append(body(503, b"<html>"))
    assert failure(lambda: make(server).provider(HOST)).retryable
    server.misdeeds.append(body(406, {"errors": [{"detail": "\x1b[1mno\nsuch"}]}))
    assert "1.38" in failure(lambda: make(server).provider(HOST)).message
    server.misdeeds.append(body(400, {"errors": [{"detail": "\x1b[1mno\nsuch" + "x" * 5000}]}))
    assert "no such" in failure(lambda: make(server).provider(HOST)).message


def test_without_a_right_token(server: FakePlacement) -> None:
    server.tokens = {"admin"}
    assert make(server).provider(HOST) is None
    server.tokens = {"another"}
    assert failure(lambda: make(server).provider(HOST)).code == "placement.auth_failed"
    assert len(server.asked) == 2, "a fixed token is not tried again"


def credentials(auth_url: str, password: str = "s3cret") -> KeystoneSettings:
    return KeystoneSettings(auth_url=auth_url, username="reeve", password=password, project_name="service")


def keystone(cloud: Server, server: FakePlacement) -> Cloud:
    made = Cloud(cloud)
    made.services["placement"] = server.url
    return made


def test_keystone_says_where_placement_is_and_a_revoked_token_is_replaced(server: FakePlacement) -> None:
    with serving() as identity:
        cloud = keystone(identity, server)
        client = Client(Http(), KeystoneAuth(credentials(cloud.auth_url)))
        assert client.provider(HOST) is None and client.provider(HOST) is None
        assert len(identity.posts) == 1, "one token for many questions"
        server.tokens = {"token-1"}
        assert client.provider(HOST) is None and len(identity.posts) == 2
        assert [token for *_, token in server.asked] == ["token-0"] * 3 + ["token-1"]
        server.tokens = set()
        asked = len(server.asked)
        assert failure(lambda: client.provider(HOST)).code == "placement.auth_failed"
        assert len(server.asked) - asked == 2, "once more with a new token and not again"
        bad = Client(Http(), KeystoneAuth(credentials(cloud.auth_url, password="wrong")))
        found = failure(lambda: bad.provider(HOST))
        assert found.code == "placement.auth_failed" and "[placement]" in found.message
    gone = Client(Http(), KeystoneAuth(credentials(cloud.auth_url)))
    assert failure(lambda: gone.provider(HOST)).code == "placement.unreachable"
