"""kombu's ``amqp`` transport without its automatic decompression: a small hostile body could become gigabytes."""

from __future__ import annotations

from typing import Any

import amqp
from kombu.transport import base, pyamqp


class Message(pyamqp.Message):  # type: ignore[misc]
    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        props = msg.properties
        headers = dict(props.get("application_headers") or {})
        packed = headers.pop("compression", None)
        base.Message.__init__(
            self,
            body=msg.body,
            channel=channel,
            delivery_tag=msg.delivery_tag,
            content_type=props.get("content_type"),
            content_encoding=props.get("content_encoding"),
            delivery_info=msg.delivery_info,
            properties=props,
            headers=headers,
            **kwargs,
        )
        if packed is not None:
            self.headers["compression"] = packed


class Channel(pyamqp.Channel):  # type: ignore[misc]
    Message = Message


class Connection(amqp.Connection):  # type: ignore[misc]
    Channel = Channel


class Transport(pyamqp.Transport):  # type: ignore[misc]
    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):  # type: ignore[misc]
    Connection = Connection
