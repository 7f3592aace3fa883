"""The queues an agent takes instructions from: its own, and those where oslo.messaging's clients send.

oslo.messaging's names and arguments are in ``_drivers/impl_rabbit.py`` (``declare_topic_consumer``,
``declare_fanout_consumer``). A client declares the exchanges, so their arguments must be the client's; the queues
are declared by servers only, so theirs may be safer than the defaults of the stock server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import amqp
import kombu

from agent import oslo, wire
from agent.rpc import connection as broker

LOG = logging.getLogger(__name__)

DURABLE, QUORUM, OSLO_DEFAULTS = "durable", "quorum", "oslo-defaults"
MODES = (DURABLE, QUORUM, OSLO_DEFAULTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A queue and the form of the messages on it.

    :ivar exclusive: a second consumer, so a second agent, is refused by the broker.
    """

    queue: kombu.Queue
    dialect: str
    exclusive: bool


@dataclasses.dataclass(frozen=True, slots=True)
class OsloQueues:
    """How the queues for oslo.messaging's clients are made.

    :ivar exchange: the clients' ``control_exchange``.
    :ivar mode: one of `MODES`; `DURABLE` fits clients with ``amqp_durable_queues``, `QUORUM` those with
        ``rabbit_quorum_queue``, `OSLO_DEFAULTS` those with neither.
    :ivar transient_quorum: the clients' ``rabbit_transient_quorum_queue``.
    :ivar auto_delete: the clients' ``amqp_auto_delete``.
    :ivar expires: seconds after which the fanout queue of an agent that is away is removed; 0 for never.
    :ivar delivery_limit: of quorum queues; 0 for the broker's own.
    :ivar identity: 32 hex digits that stay with the node: the name of a fanout queue that outlives the agent.
    """

    exchange: str
    topic: str
    server: str
    mode: str = DURABLE
    transient_quorum: bool = False
    auto_delete: bool = False
    expires: int = 1800
    delivery_limit: int = 0
    identity: str = ""

    def sources(self) -> list[Source]:
        """Any server of the topic, this server, and every server of the topic."""
        exchange, arguments = self.notifications()
        durable = exchange.durable
        shared, own = (
            kombu.Queue(
                name,
                exchange=exchange,
                routing_key=name,
                durable=durable,
                auto_delete=self.auto_delete,
                queue_arguments=arguments,
            )
            for name in (self.topic, f"{self.topic}.{self.server}")
        )
        return [
            Source(shared, oslo.DIALECT, exclusive=False),
            Source(own, oslo.DIALECT, exclusive=True),
            Source(self._fanout(durable), oslo.DIALECT, exclusive=True),
        ]

    def notifications(self) -> tuple[kombu.Exchange, dict[str, Any]]:
        """The exchange of notifications, and the arguments of their queues."""
        durable = self.mode != OSLO_DEFAULTS
        exchange = kombu.Exchange(self.exchange, type="topic", durable=durable, auto_delete=self.auto_delete)
        return exchange, self._arguments(self.mode == QUORUM)

    def _fanout(self, durable: bool) -> kombu.Queue:
        arguments = self._arguments(self.mode == QUORUM or self.transient_quorum)
        if self.expires:
            arguments["x-expires"] = self.expires * 1000
        # A name that stays, where the queue does: what is sent while the agent restarts is not lost.
        unique = self.identity if durable and self.identity else uuid.uuid4().hex
        return kombu.Queue(
            f"{self.topic}_fanout_{unique}",
            exchange=kombu.Exchange(
                f"{self.topic}_fanout", type="fanout", durable=self.transient_quorum, auto_delete=True
            ),
            routing_key=self.topic,
            durable=durable or self.transient_quorum,
            auto_delete=False,
            queue_arguments=arguments,
        )

    def _arguments(self, quorum: bool) -> dict[str, Any]:
        if not quorum:
            return {}
        return {"x-queue-type": "quorum"} | ({"x-delivery-limit": self.delivery_limit} if self.delivery_limit else {})


def native(host: str, quorum: bool = False) -> Source:
    return Source(broker.instruction_queue(host, quorum), wire.DIALECT, exclusive=True)


def declare(connection: kombu.Connection, channel: Any, sources: Sequence[Source]) -> None:
    """Make what is missing. What is there with other arguments is used as it is."""
    for exchange in {source.queue.exchange.name: source.queue.exchange for source in sources}.values():
        if exchange.name:
            _declare_exchange(connection, exchange)
    for source in sources:
        if source.dialect == wire.DIALECT:
            declare_native(connection, source.queue)
            continue
        queue = source.queue(channel)
        queue.queue_declare()
        if source.queue.exchange.name:
            queue.queue_bind()


def declare_native(connection: kombu.Connection, queue: kombu.Queue) -> None:
    """A host's queue for native instructions, made by whoever comes first: a sender or the agent."""
    cure = "set [broker] queues to what it is, or delete it while it is empty"
    with _used_as_it_is(connection, f"queue %s is used as it is (%s): {cure}", queue.name) as channel:
        queue(channel).queue_declare()


def declare_notifications(connection: kombu.Connection, oslo_queues: OsloQueues, names: Sequence[str]) -> None:
    """What oslo.messaging's notifier would make before it sends: the exchange, and a queue where messages wait.

    A queue that is there with other arguments is used as it is: the listener made it.
    """
    exchange, arguments = oslo_queues.notifications()
    _declare_exchange(connection, exchange)
    told = "queue %s is used as it is (%s): set [oslo] queues to what its listener has"
    for name in names:
        with _used_as_it_is(connection, told, name) as channel:
            queue = kombu.Queue(
                name,
                exchange=exchange,
                routing_key=name,
                durable=exchange.durable,
                auto_delete=exchange.auto_delete,
                queue_arguments=arguments,
            )(channel)
            queue.queue_declare()
            queue.queue_bind()


def _declare_exchange(connection: kombu.Connection, exchange: kombu.Exchange) -> None:
    told = "exchange %s is used as it is (%s); clients made it otherwise: set [oslo] queues to what they have"
    with _used_as_it_is(connection, told, exchange.name) as channel:
        exchange(channel).declare()


@contextlib.contextmanager
def _used_as_it_is(connection: kombu.Connection, told: str, name: str) -> Iterator[Any]:
    """A channel to declare on. What is there with other arguments stays so.

    :param told: the warning then, with places for `name` and what the broker says.
    """
    channel = connection.channel()  # of its own: a refusal closes it
    try:
        yield channel
    except amqp.exceptions.PreconditionFailed as exc:
        LOG.warning(told, name, " ".join(str(exc).split())[:200])
    finally:
        with contextlib.suppress(*broker.broker_errors(connection)):
            channel.close()
