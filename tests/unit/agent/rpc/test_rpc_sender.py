"""Confirmations and returns of a batch, against a broker that is told what to say."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from kombu.exceptions import OperationalError

from agent.rpc import sender as module
from agent.rpc.sender import AmqpSender
from agent.wire import Outgoing


class Message:
    def __init__(self, properties: dict[str, str]) -> None:
        self.properties = properties


class Broker:
    """A kombu connection and its channel: `script` is what it answers, one item a `drain_events`."""

    def __init__(self) -> None:
        self.events: dict[str, set[Callable[..., None]]] = collections.defaultdict(set)
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.script: list[tuple[Any, ...]] = []

    connection_errors = channel_errors = (OSError,)

    def channel(self) -> Broker:
        return self

    def confirm_select(self) -> None:
        self.events["selected"] = set()

    def exchange_declare(self, **_options: Any) -> None: ...

    def prepare_message(self, body: bytes, **options: Any) -> Message:
        return Message(options["properties"])

    def basic_publish(self, message: Message, *, routing_key: str, **options: Any) -> None:
        self.published.append((routing_key, message.properties))

    def drain_events(self, timeout: float) -> None:
        if not self.script:
            raise TimeoutError("silence")
        event, *values = self.script.pop(0)
        for callback in self.events[event]:
            callback(*values)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    class Reports:
        def __init__(self, _channel: Broker) -> None: ...

        def declare(self) -> None: ...

    monkeypatch.setattr(module.broker, "REPORTS", Reports)
    return Broker()


def messages(count: int) -> list[Outgoing]:
    return [Outgoing("", f"q{n}", b"x", f"c{n}") for n in range(count)]


def returned(tag: str) -> tuple[Any, ...]:
    return ("basic_return", None, "", "q", Message({"message_id": tag}))


def test_confirmations_come_one_by_one_or_together(broker: Broker) -> None:
    sender = AmqpSender(broker)  # type: ignore[arg-type]
    broker.script = [("basic_ack", 2, False), ("basic_ack", 3, True)]
    assert sender.send(messages(3), mandatory=True) == [True, True, True]
    broker.script = [("basic_ack", 5, True)]
    assert sender.send(messages(2), mandatory=True) == [True, True]
    assert [key for key, _ in broker.published] == ["q0", "q1", "q2", "q0", "q1"]
    assert broker.published[0][1]["correlation_id"] == "c0"


def test_returned_messages_are_told_apart(broker: Broker) -> None:
    sender = AmqpSender(broker)  # type: ignore[arg-type]
    broker.script = [returned("2"), ("basic_ack", 3, True)]
    assert sender.send(messages(3), mandatory=True) == [True, False, True]
    broker.script = [("basic_ack", 4, False)]
    assert sender.send(messages(1), mandatory=True) == [True]


def test_an_exchange_that_is_not_there_does_not_stop_the_rest(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def declare(exchange: str, **options: Any) -> None:
        assert options["passive"]
        if exchange == "gone":
            raise amqp.exceptions.NotFound("no exchange")

    monkeypatch.setattr(broker, "exchange_declare", declare)
    monkeypatch.setattr(broker, "close", lambda: None, raising=False)
    sender = AmqpSender(broker)  # type: ignore[arg-type]
    sent = [Outgoing("gone", "a", b"x"), Outgoing("there", "b", b"x"), *messages(1)]
    broker.script = [returned("2"), ("basic_ack", 2, True)]
    assert sender.send(sent, mandatory=True) == [False, True, False]
    assert [key for key, _ in broker.published] == ["b", "q0"]


def test_a_refusal_of_the_broker_is_an_error(broker: Broker) -> None:
    sender = AmqpSender(broker)  # type: ignore[arg-type]
    broker.script = [("basic_ack", 1, False), ("basic_nack", 2, False)]
    with pytest.raises(OperationalError, match="refused 1 messages"):
        sender.send(messages(2), mandatory=True)


def test_silence_is_an_error(broker: Broker) -> None:
    sender = AmqpSender(broker)  # type: ignore[arg-type]
    broker.script = [("basic_ack", 1, False)]
    with pytest.raises(TimeoutError):
        sender.send(messages(2), mandatory=True)
