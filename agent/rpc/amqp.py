"""kombu's ``amqp`` transport without its automatic decompression: a small hostile body could become gigabytes."""

from __future__ import annotations

import ssl
from typing import Any

import amqp
from kombu.exceptions import KombuError
from kombu.transport import base, pyamqp

from agent.rpc.tls import explain


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


class HandshakeFailed(KombuError):  # type: ignore[misc]
    """One of the two does not trust the other. Not tried again at once, as a lost connection is."""


class SSLTransport(pyamqp.SSLTransport):  # type: ignore[misc]
    Connection = Connection

    def establish_connection(self) -> Any:
        """The name to find in the certificate is that of the URL in use, before kombu makes an address of it."""
        given = self.client.ssl
        if isinstance(given, dict) and given.get("server_hostname", "") is None:
            self.client.ssl = given | {"server_hostname": self.client.hostname}
        try:
            return super().establish_connection()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise  # it went away
        except ssl.SSLError as exc:
            raise HandshakeFailed(explain(exc)) from exc
        finally:
            self.client.ssl = given
