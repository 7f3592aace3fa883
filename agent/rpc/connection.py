"""A broker's URL as a kombu connection, the queues on it, and the errors it may raise.

``amqp://user:password@host:port/vhost`` (RabbitMQ; ``amqps://`` with TLS; several nodes: `agent.rpc.addresses`) or
``filesystem:///folder`` (no broker: one folder that sender and agent share). Queue and exchange arguments live here
only: sender and agent must agree on them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import kombu
from amqp.exceptions import MessageNacked
from kombu.exceptions import KombuError

from agent.errors import ConfigError
from agent.rpc.addresses import addresses
from agent.rpc.addresses import redact as redact
from agent.rpc.tls import VERIFIED, BrokerTls
from agent.wire import MAX_BYTES, REPORT_EXCHANGE, queue_name

POLL_SECONDS = 0.02
HEARTBEAT_SECONDS = 30
CONNECT_SECONDS = 5
REPLY_EXPIRES_SECONDS = 1800.0
REPLY_PREFIX = "reeve.reply."
REPORT_PREFIX = "reeve.listener."

REPORTS = kombu.Exchange(REPORT_EXCHANGE, type="topic", durable=True)

_TRANSPORTS = {
    "filesystem": "agent.rpc.filesystem:Transport",
    "amqp": "agent.rpc.amqp:Transport",
    "pyamqp": "agent.rpc.amqp:Transport",
    "amqps": "agent.rpc.amqp:SSLTransport",
}


def connect(
    url: str,
    *,
    poll_seconds: float = POLL_SECONDS,
    max_message_bytes: int = MAX_BYTES,
    heartbeat: float = HEARTBEAT_SECONDS,
    confirm: bool = True,
    tls: BrokerTls = VERIFIED,
) -> kombu.Connection:
    """A connection, not yet opened. Of several nodes it is the first; all are checked.

    :param confirm: every ``publish`` waits for the broker's confirmation.
    :param heartbeat: seconds; whoever asks for it must call ``heartbeat_check`` about once a second. 0 for none.
    :param tls: for ``amqps`` URLs.
    :raises ConfigError: the URL is not usable, or a file of `tls` is not.
    """
    first, *others = addresses(url)
    if others:
        connections = [
            connect(each, max_message_bytes=max_message_bytes, heartbeat=heartbeat, confirm=confirm, tls=tls)
            for each in (first, *others)
        ]
        return connections[0]
    scheme = urlsplit(url).scheme
    transport = _TRANSPORTS.get(scheme)
    if transport is None:
        raise ConfigError(
            f"broker URL {redact(url)!r} has scheme {scheme!r}: give amqp://user:password@host/vhost, "
            "amqps://… or filesystem:///folder"
        )
    if scheme == "filesystem":
        root = folder(url)
        options: dict[str, Any] = {
            "data_folder_in": str(root / "data"),
            "data_folder_out": str(root / "data"),
            "unacked_folder": str(root / "unacked"),
            "control_folder": str(root / "control"),
            "polling_interval": poll_seconds,
            "max_message_bytes": max_message_bytes,
        }
        return kombu.Connection("filesystem://", transport=transport, transport_options=options)
    return kombu.Connection(
        url,
        transport=transport,
        ssl=_tls_options(url, scheme, tls),
        connect_timeout=CONNECT_SECONDS,
        heartbeat=heartbeat,
        transport_options={"confirm_publish": confirm, "write_timeout": 30},
    )


def _tls_options(url: str, scheme: str, tls: BrokerTls) -> dict[str, Any] | bool:
    if "ssl" in urlsplit(url).query:
        raise ConfigError(
            f"broker URL {redact(url)!r} has TLS options in it: they belong into the options tls_… of [broker]"
        )
    if scheme == "amqps":
        return tls.options()
    if tls.given():
        raise ConfigError(
            f"broker URL {redact(url)!r} speaks no TLS and [broker] has options tls_…: give amqps://… or take them out"
        )
    return False


def folder(url: str) -> Path:
    """The folder of a ``filesystem`` URL, made with its sub-folders.

    :raises ConfigError: no folder named, or it cannot be made.
    """
    parts = urlsplit(url)
    root = Path(unquote(parts.path))
    if parts.netloc or not root.is_absolute() or root == Path("/"):
        raise ConfigError(
            f"broker URL {url!r} names no folder: give three slashes and a full path, filesystem:///var/lib/reeve/broker"
        )
    try:
        for name in ("data", "unacked", "control"):
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the message folder {root} cannot be made: {exc.strerror}") from exc
    if not os.access(root / "data", os.W_OK):
        raise ConfigError(f"the message folder {root} is not writable: run as its owner or choose another broker URL")
    return root


def is_filesystem(url: str) -> bool:
    return urlsplit(url).scheme == "filesystem"


def instruction_queue(host: str, quorum: bool = False) -> kombu.Queue:
    """Durable: instructions wait there while the agent is away. :param quorum: kept by several nodes of a cluster."""
    name = queue_name(host)
    return kombu.Queue(
        name, exchange=kombu.Exchange(""), routing_key=name, durable=True, queue_arguments=_arguments(quorum)
    )


def reply_queue(name: str, quorum: bool = False) -> kombu.Queue:
    return kombu.Queue(
        name,
        exchange=kombu.Exchange(""),
        routing_key=name,
        durable=True,
        expires=REPLY_EXPIRES_SECONDS,
        queue_arguments=_arguments(quorum),
    )


def report_queue(name: str, pattern: str, quorum: bool = False) -> kombu.Queue:
    return kombu.Queue(
        name,
        exchange=REPORTS,
        routing_key=pattern,
        durable=True,
        expires=REPLY_EXPIRES_SECONDS,
        max_length=10000,
        queue_arguments=_arguments(quorum),
    )


def _arguments(quorum: bool) -> dict[str, str]:
    return {"x-queue-type": "quorum"} if quorum else {}


def broker_errors(connection: kombu.Connection) -> tuple[type[BaseException], ...]:
    """What a broken or refusing broker raises. A queue may refuse a message, too: one that has just lost its leader."""
    return (*connection.connection_errors, *connection.channel_errors, KombuError, MessageNacked, OSError, TimeoutError)
