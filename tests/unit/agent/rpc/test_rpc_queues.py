"""The queues for oslo.messaging's clients, beside what its own server declares (impl_rabbit.py, 12.0.0 to 18.3.1)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agent import oslo, wire
from agent.rpc import connection as broker
from agent.rpc import queues
from agent.rpc.queues import OsloQueues

ID = "0" * 31 + "1"


def made(**options: Any) -> list[queues.Source]:
    return OsloQueues("nova", "topic", "node1", identity=ID, **options).sources()


def flags(source: queues.Source) -> tuple[Any, ...]:
    queue = source.queue
    return (queue.durable, queue.auto_delete, queue.exclusive, queue.queue_arguments)


def exchange(source: queues.Source) -> tuple[Any, ...]:
    made = source.queue.exchange
    return (made.name, made.type, made.durable, made.auto_delete)


def test_names_and_bindings() -> None:
    shared, own, fanout = made()
    assert [source.queue.name for source in (shared, own, fanout)] == ["topic", "topic.node1", f"topic_fanout_{ID}"]
    assert [source.queue.routing_key for source in (shared, own, fanout)] == ["topic", "topic.node1", "topic"]
    assert [source.exclusive for source in (shared, own, fanout)] == [False, True, True]
    assert {source.dialect for source in (shared, own, fanout)} == {oslo.DIALECT}
    assert exchange(shared) == exchange(own) == ("nova", "topic", True, False)
    assert exchange(fanout) == ("topic_fanout", "fanout", False, True)


def test_oslo_defaults_are_what_the_stock_server_declares() -> None:
    shared, own, fanout = made(mode=queues.OSLO_DEFAULTS)
    assert flags(shared) == flags(own) == (False, False, False, {})
    assert exchange(shared) == ("nova", "topic", False, False)
    assert flags(fanout) == (False, False, False, {"x-expires": 1800000})
    assert exchange(fanout) == ("topic_fanout", "fanout", False, True)
    assert re.fullmatch("topic_fanout_[0-9a-f]{32}", fanout.queue.name) and ID not in fanout.queue.name


@pytest.mark.parametrize(
    ("options", "own", "fanout", "fanout_exchange_durable"),
    [
        ({}, (True, False, False, {}), (True, False, False, {"x-expires": 1800000}), False),
        (
            {"mode": queues.QUORUM},
            (True, False, False, {"x-queue-type": "quorum"}),
            (True, False, False, {"x-queue-type": "quorum", "x-expires": 1800000}),
            False,
        ),
        (
            {"mode": queues.QUORUM, "delivery_limit": 9, "transient_quorum": True, "expires": 0},
            (True, False, False, {"x-queue-type": "quorum", "x-delivery-limit": 9}),
            (True, False, False, {"x-queue-type": "quorum", "x-delivery-limit": 9}),
            True,
        ),
        (
            {"mode": queues.OSLO_DEFAULTS, "transient_quorum": True, "auto_delete": True},
            (False, True, False, {}),
            (True, False, False, {"x-queue-type": "quorum", "x-expires": 1800000}),
            True,
        ),
    ],
)
def test_modes(options: dict[str, Any], own: Any, fanout: Any, fanout_exchange_durable: bool) -> None:
    sources = made(**options)
    assert flags(sources[1]) == own
    assert flags(sources[2]) == fanout
    assert exchange(sources[2])[2:] == (fanout_exchange_durable, True)


def test_the_native_queue() -> None:
    source = queues.native("node1")
    assert (source.queue.name, source.dialect, source.exclusive) == ("reeve.node1", wire.DIALECT, True)


@pytest.mark.parametrize(("quorum", "arguments"), [(False, {}), (True, {"x-queue-type": "quorum"})])
def test_native_queues_of_a_cluster(quorum: bool, arguments: dict[str, str]) -> None:
    source = queues.native("node1", quorum)
    assert source.queue.name == "reeve.node1" and source.exclusive and source.dialect == wire.DIALECT
    made = (source.queue, broker.reply_queue("r", quorum), broker.report_queue("l", "#", quorum))
    assert [queue.queue_arguments for queue in made] == [arguments] * 3
    assert all(queue.durable for queue in made)
