"""The nodes of a broker in one URL."""

from __future__ import annotations

import pytest

from agent.errors import ConfigError
from agent.rpc import connection as broker
from agent.rpc.addresses import Turn, addresses, redact

CLUSTER = "amqp://user:se%2Ccret@a:5672,b,other:word@c:5673/vhost?x=1"


@pytest.mark.parametrize(
    ("url", "all_of_them"),
    [
        ("amqp://a/", ["amqp://a/"]),
        ("amqp://a,b:5673/v", ["amqp://a/v", "amqp://b:5673/v"]),
        (
            CLUSTER,
            [
                "amqp://user:se%2Ccret@a:5672/vhost?x=1",
                "amqp://user:se%2Ccret@b/vhost?x=1",
                "amqp://other:word@c:5673/vhost?x=1",
            ],
        ),
        ("filesystem:///a,b/c", ["filesystem:///a,b/c"]),
        ("nonsense", ["nonsense"]),
    ],
)
def test_a_url_for_each_node(url: str, all_of_them: list[str]) -> None:
    assert list(addresses(url)) == all_of_them


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://a/", "amqp://a/"),
        ("amqp://user@a/", "amqp://user@a/"),
        ("amqp://user:p:w@a:1/v", "amqp://user:***@a:1/v"),
        (CLUSTER, "amqp://user:***@a:5672,b,other:***@c:5673/vhost?x=1"),
        ("filesystem:///a,b/c", "filesystem:///a,b/c"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_after_a_failure_it_is_the_next_ones_turn() -> None:
    turn = Turn("amqp://a,b,c/")
    seen = []
    for _ in range(4):
        seen.append(turn.url)
        turn.next()
    assert seen == ["amqp://a/", "amqp://b/", "amqp://c/", "amqp://a/"] and len(turn) == 3


def test_one_node_has_every_turn() -> None:
    turn = Turn("amqp://a/")
    turn.next()
    assert turn.url == "amqp://a/" and len(turn) == 1


def test_a_connection_is_to_the_first_node() -> None:
    made = broker.connect(CLUSTER.partition("?")[0])
    assert (made.hostname, made.userid, made.password, made.virtual_host) == ("a", "user", "se,cret", "vhost")


@pytest.mark.parametrize("url", ["amqp://a,b/?ssl=1", "http://a,b/"])
def test_what_is_wrong_with_several_is_said(url: str) -> None:
    with pytest.raises(ConfigError):
        broker.connect(url)
