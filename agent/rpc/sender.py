"""Sends messages so that the broker answers for them: many at a time, each confirmed or returned.

With RabbitMQ the confirmations of a batch are awaited together; one at a time, a durable queue would allow a few
hundred replies a second. A folder has taken a message when `publish` returns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import amqp
import kombu
from kombu.exceptions import OperationalError

from agent.rpc import connection as broker
from agent.wire import REPORT_EXCHANGE, Outgoing

CONFIRM_SECONDS = 30.0


class FolderSender:
    """One after another; a folder takes every message."""

    def __init__(self, connection: kombu.Connection) -> None:
        channel = connection.channel()
        broker.REPORTS(channel).declare()
        self._producer = kombu.Producer(channel)

    def send(self, messages: Sequence[Outgoing], *, mandatory: bool) -> list[bool]:
        for message in messages:
            self._producer.publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                content_type=message.content_type,
                content_encoding="utf-8",
                correlation_id=message.correlation_id or None,
                delivery_mode=2,
                headers=dict(message.headers),
            )
        return [True] * len(messages)


class AmqpSender:
    """:param connection: one whose channels do not wait for confirmations by themselves."""

    def __init__(self, connection: kombu.Connection) -> None:
        self._connection = connection
        self._channel = connection.channel()
        broker.REPORTS(self._channel).declare()
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        self._tag = 0  # the broker counts what is published on a channel from 1
        self._pending: set[int] = set()
        self._refused: set[int] = set()
        self._returned: set[str] = set()
        self._exchanges = {"", REPORT_EXCHANGE}

    def send(self, messages: Sequence[Outgoing], *, mandatory: bool) -> list[bool]:
        """Publish all and wait for the broker; for each, whether a queue took it, or the exchange it names.

        :raises OperationalError: the broker refused one (it may have no memory left); any of them may have been sent.
        :raises TimeoutError: it did not answer within `CONFIRM_SECONDS`.
        """
        self._returned.clear()
        self._refused.clear()
        tags = []
        for message in messages:
            if not self._there(message.exchange):
                tags.append(0)
                continue
            self._tag += 1
            tags.append(self._tag)
            self._pending.add(self._tag)
            # An exchange may have no queue: who wants notifications binds one.
            self._publish(message, self._tag, mandatory and not message.exchange)
        end = time.monotonic() + CONFIRM_SECONDS
        while self._pending:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no confirmation within {CONFIRM_SECONDS:.0f} s")
            self._connection.drain_events(timeout=left)
        if self._refused:
            raise OperationalError(f"the broker refused {len(self._refused)} messages: see its log")
        return [tag > 0 and str(tag) not in self._returned for tag in tags]

    def _there(self, exchange: str) -> bool:
        """Whether it is: publishing to one that is not closes the channel, and nothing else would be sent."""
        if exchange not in self._exchanges:
            channel = self._connection.channel()
            try:
                kombu.Exchange(exchange, passive=True)(channel).declare()
                self._exchanges.add(exchange)
            except amqp.exceptions.NotFound:
                return False
            finally:
                with contextlib.suppress(*broker.broker_errors(self._connection)):
                    channel.close()
        return True

    def _publish(self, message: Outgoing, tag: int, mandatory: bool) -> None:
        properties = {"delivery_mode": 2, "message_id": str(tag)}
        if message.correlation_id:
            properties["correlation_id"] = message.correlation_id
        self._channel.basic_publish(
            self._channel.prepare_message(
                message.body,
                priority=0,
                content_type=message.content_type,
                content_encoding="utf-8",
                headers=dict(message.headers),
                properties=properties,
            ),
            exchange=message.exchange,
            routing_key=message.routing_key,
            mandatory=mandatory,
            timeout=CONFIRM_SECONDS,
        )

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._settle(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused |= self._settle(tag, multiple)

    def _settle(self, tag: int, multiple: bool) -> set[int]:
        settled = {item for item in self._pending if item <= tag} if multiple else self._pending & {tag}
        self._pending -= settled
        return settled

    def _on_return(self, _exc: Any, _exchange: str, _routing_key: str, message: Any) -> None:
        """It comes before the confirmation of the same message."""
        self._returned.add(str(message.properties.get("message_id")))
