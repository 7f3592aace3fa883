"""The options of what can be seen of the agent from outside: the groups ``[log]``, ``[http]``, ``[notifications]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from agent import wire
from agent.errors import AgentError, ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")

LOGGING = (
    cfg.StrOpt(
        "level", default="info", choices=LOG_LEVELS, mutable=True, help="Least severe messages that are logged."
    ),
    cfg.StrOpt("file", help="Log file; standard error when not given. SIGHUP opens it again, after a rotation."),
    cfg.StrOpt(
        "format",
        default="text",
        choices=("text", "json"),
        mutable=True,
        help="text: lines for people; json: one JSON object a line, with instruction, domain, request and traceparent "
        "as fields.",
    ),
)
HTTP = (
    cfg.BoolOpt("enabled", default=True, help="Offer /metrics (Prometheus), /healthz and /readyz over HTTP."),
    cfg.StrOpt(
        "address",
        default="127.0.0.1",
        help="Address to listen on. There is neither TLS nor a password: whoever reaches it reads the names and "
        "numbers of all domains.",
    ),
    cfg.PortOpt("port", default=9177, help="Port to listen on; 0: any free one, which is logged."),
)
NOTIFICATIONS = (
    cfg.BoolOpt(
        "native",
        default=True,
        help="Tell what instructions begin and end (instruction.<host>) and what happens to domains (lifecycle.<host>) "
        "on the exchange reeve.reports, each at least once.",
    ),
    cfg.BoolOpt(
        "oslo",
        default=False,
        help="The same for notification listeners of oslo.messaging, on the exchange [oslo] exchange. Only with "
        "RabbitMQ. The queues are made if there are none, and fill up if nobody listens.",
    ),
    cfg.ListOpt(
        "topics",
        default=["notifications"],
        help="Topics for oslo.messaging's listeners; the queues are TOPIC.info and TOPIC.error.",
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class NotificationSettings:
    """The group ``[notifications]``."""

    native: bool
    oslo: bool
    topics: tuple[str, ...]


def notification_settings(values: Mapping[str, Any]) -> NotificationSettings:
    """:raises ConfigError: a topic that cannot be one."""
    for topic in values["topics"]:
        try:
            wire.check_host_name(topic)
        except AgentError as exc:
            raise ConfigError(f"[notifications] topics has {topic!r}: give letters, digits, '.', '_' or '-'") from exc
    return NotificationSettings(values["native"], values["oslo"], tuple(values["topics"]))


@dataclasses.dataclass(frozen=True, slots=True)
class HttpSettings:
    """The group ``[http]``."""

    enabled: bool
    address: str
    port: int


@dataclasses.dataclass(frozen=True, slots=True)
class LogSettings:
    """The group ``[log]``."""

    level: str
    file: str
    format: str


def log_settings(values: Mapping[str, Any]) -> LogSettings:
    return LogSettings(values["level"], values["file"] or "", values["format"])
