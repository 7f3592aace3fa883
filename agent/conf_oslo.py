"""The options of the group ``[oslo]``: how clients of oslo.messaging reach this agent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from agent import wire
from agent.errors import AgentError, ConfigError

OPTIONS = (
    cfg.BoolOpt(
        "enabled",
        default=True,
        help="Also take calls, casts and fanouts of oslo.messaging's RPC clients: a method is a verb. Only with "
        "RabbitMQ.",
    ),
    cfg.StrOpt(
        "exchange", default="openstack", help="The clients' control_exchange (oslo.messaging's default is openstack)."
    ),
    cfg.StrOpt(
        "topic",
        default="reeve-agent",
        help="Topic of the clients' targets. The queues are TOPIC (any agent), TOPIC.<host> (this one) and "
        "TOPIC_fanout_<id> (all); the clients' target server is [agent] host.",
    ),
    cfg.StrOpt(
        "queues",
        default="durable",
        choices=("durable", "quorum", "oslo-defaults"),
        help="What the queues and the topic exchange survive, as the clients have it too. durable: a restart of the "
        "broker (clients: amqp_durable_queues = true); quorum: also the loss of a node (clients: rabbit_quorum_queue = "
        "true); oslo-defaults: neither, exactly what oslo.messaging makes when nothing is configured.",
    ),
    cfg.BoolOpt(
        "transient-quorum",
        default=False,
        help="The clients' rabbit_transient_quorum_queue: whether the fanout exchange is durable.",
    ),
    cfg.BoolOpt("auto-delete", default=False, help="The clients' amqp_auto_delete."),
    cfg.IntOpt(
        "fanout-ttl",
        default=1800,
        min=0,
        help="Seconds after which the fanout queue of an agent that is away is removed; 0: never. What is sent to it "
        "before is carried out when the agent is back, but not with queues = oslo-defaults.",
    ),
    cfg.IntOpt(
        "delivery-limit",
        default=0,
        min=0,
        help="With queues = quorum: deliveries after which the broker drops a message (rabbit_quorum_delivery_limit); "
        "0: the broker's own limit.",
    ),
    cfg.ListOpt(
        "namespaces",
        default=["reeve"],
        help="Namespaces of targets that are accepted, besides none.",
    ),
    cfg.BoolOpt(
        "call-deadlines",
        default=True,
        help="The timeout of a call is also its instruction's deadline: past it nothing is begun and what was begun is "
        "undone, since nobody waits any more. False: only what has expired at the broker is not carried out.",
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class OsloSettings:
    """The group ``[oslo]``."""

    enabled: bool
    exchange: str
    topic: str
    queues: str
    transient_quorum: bool
    auto_delete: bool
    fanout_ttl: int
    delivery_limit: int
    namespaces: tuple[str, ...]
    call_deadlines: bool


def settings(values: Mapping[str, Any]) -> OsloSettings:
    """:raises ConfigError: a name that cannot be one."""
    for name in ("exchange", "topic"):
        try:
            wire.check_host_name(values[name])
        except AgentError as exc:
            raise ConfigError(
                f"[oslo] {name} {values[name]!r} is not usable: give letters, digits, '.', '_' or '-'"
            ) from exc
    if values["topic"] == "reeve":
        raise ConfigError("[oslo] topic 'reeve' would share the queue of native instructions: give another")
    return OsloSettings(**dict(values, namespaces=tuple(values["namespaces"])))
