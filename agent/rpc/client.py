"""The scheduler's side: send instructions, wait for replies, listen to reports.

For ``reeve instruct``, tests and anyone who speaks the native form from Python::

    with Client("amqp://guest:guest@127.0.0.1/", "node1") as client:
        reply = client.call("create", {"name": "web", ...}, timeout=60)
        if not reply.ok:
            print(reply.error["code"], reply.error["message"])
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Container, Mapping
from types import TracebackType
from typing import Any, Self

import kombu

from agent import trace, wire
from agent.errors import BrokerError, MessageError, ReplyTimeout
from agent.rpc import connection as broker
from agent.rpc.addresses import Turn
from agent.rpc.queues import declare_native
from agent.rpc.tls import VERIFIED, BrokerTls, explain
from agent.signing import HEADER, Signer

LOG = logging.getLogger(__name__)

SEND_SECONDS = 30
"""How long a broker may take to confirm a message."""
FAILOVER_SECONDS = 15.0
FAILOVER_PAUSE = 0.3
"""How long the nodes of a cluster are tried, one after the other, when the one in use has failed, and how often."""


class Client:
    """One sender with a reply queue of its own. Not for several threads at once.

    When a node of a cluster fails, the next one in the URL is used; replies and reports wait in their queues.

    :param broker_url: ``amqp://…`` or ``filesystem:///folder``.
    :param host: the host whose agent is addressed. :param tls: for ``amqps`` URLs.
    :param signer: signs what is sent; replies that it has not signed are dropped.
    :param quorum: the queues it makes are quorum queues.
    :raises ConfigError: the URL is not usable.
    :raises BrokerError: the broker cannot be reached.
    """

    def __init__(
        self,
        broker_url: str,
        host: str,
        *,
        poll_seconds: float = broker.POLL_SECONDS,
        max_message_bytes: int = wire.MAX_BYTES,
        tls: BrokerTls = VERIFIED,
        signer: Signer | None = None,
        quorum: bool = False,
    ) -> None:
        self._signer = signer
        self._quorum = quorum
        self._tls = tls
        self._poll_seconds = poll_seconds
        self.host = wire.check_host_name(host)
        self.reply_to = f"{broker.REPLY_PREFIX}{uuid.uuid4().hex}"
        self._max_message_bytes = max_message_bytes
        self._replies: dict[str, wire.Reply] = {}
        self._listeners: dict[str, tuple[str, Callable[[Any], None]]] = {}  # by queue: (pattern, callback)
        self._turn = Turn(broker_url)
        self._connection: kombu.Connection
        self._errors: tuple[type[BaseException], ...] = ()
        try:
            self._open()
        except BrokerError:
            if len(self._turn) == 1:
                raise
            self._failover()

    def _open(self) -> None:
        """Connect to the node whose turn it is, and take what comes. :raises BrokerError: it is not there."""
        # No heartbeat: the caller may be busy with something else for minutes between two calls.
        self._connection = broker.connect(self._turn.url, poll_seconds=self._poll_seconds, heartbeat=0, tls=self._tls)
        self._errors = broker.broker_errors(self._connection)
        try:
            self._connection.connect()
            self._channel = self._connection.channel()
            self._queue = broker.reply_queue(self.reply_to, self._quorum)(self._channel)
            self._queue.declare()
            declare_native(self._connection, broker.instruction_queue(self.host, self._quorum))
            self._producer = kombu.Producer(self._channel)
            self._consumer = kombu.Consumer(self._channel, [self._queue], on_message=self._on_reply)
            self._consumer.consume()
            for name in self._listeners:
                self._listen(name)
        except self._errors as exc:
            raise self._unreachable(exc) from exc

    def _failover(self) -> None:
        """Try the other nodes, and all again. :raises BrokerError: none of them can be used."""
        end = time.monotonic() + FAILOVER_SECONDS
        while True:
            self._release()
            self._turn.next()
            try:
                return self._open()
            except BrokerError:
                if time.monotonic() > end:
                    raise
            time.sleep(FAILOVER_PAUSE)

    def _release(self) -> None:
        try:
            self._connection.release()
        except self._errors as exc:
            LOG.debug("while closing: %s", explain(exc))

    def call(
        self, verb: str, args: Mapping[str, Any] | None = None, timeout: float = 60.0, *, expire: bool = True
    ) -> wire.Reply:
        """Send one instruction and wait for its reply.

        :param timeout: seconds to wait; also the instruction's deadline unless `expire` is false.
        :raises ReplyTimeout: no reply in time. The instruction may still have been carried out.
        :raises BrokerError, MessageError: it was not sent.
        """
        deadline = time.time() + timeout if expire else None
        return self.wait(self.send(verb, args, deadline=deadline), timeout)

    def send(
        self,
        verb: str,
        args: Mapping[str, Any] | None = None,
        *,
        instruction_id: str | None = None,
        deadline: float | None = None,
        traceparent: str = "",
    ) -> str:
        """Send and do not wait; returns the instruction's id. Sending an id again asks for its reply again.

        :param traceparent: W3C trace context; by default that of the instruction this is part of, if there is one.
        """
        ident = instruction_id or str(uuid.uuid4())
        context = trace.adopt({trace.PARENT: traceparent}, trace.current())
        instruction = wire.Instruction(
            ident, verb, self.host, dict(args or {}), self.reply_to, deadline, context=dict(context)
        )
        body = wire.encode_instruction(instruction)
        if len(body) > self._max_message_bytes:
            raise MessageError(
                f"the instruction has {len(body)} bytes: at most {self._max_message_bytes} are accepted",
                code="message.too_large",
            )
        self.send_raw(body, correlation_id=ident)
        return ident

    def send_raw(self, body: bytes, *, correlation_id: str = "", headers: Mapping[str, Any] | None = None) -> None:
        """Send bytes as they are to the host's queue (for tests of hostile input)."""
        end = time.monotonic() + FAILOVER_SECONDS
        while True:
            try:
                return self._publish(body, correlation_id, headers or {})
            except self._errors as exc:
                if len(self._turn) == 1 or time.monotonic() > end:
                    raise self._unreachable(exc) from exc
            # It may have come through all the same: then the same id comes twice, which does no harm.
            time.sleep(FAILOVER_PAUSE)
            self._failover()

    def _publish(self, body: bytes, correlation_id: str, headers: Mapping[str, Any]) -> None:
        self._producer.publish(
            body,
            exchange="",
            routing_key=wire.queue_name(self.host),
            content_type=wire.CONTENT_TYPE,
            content_encoding="utf-8",
            delivery_mode=2,
            reply_to=self.reply_to,
            correlation_id=correlation_id or None,
            headers={**(self._signer.headers(body) if self._signer else {}), **headers},
            timeout=SEND_SECONDS,
        )

    def wait(self, instruction_id: str, timeout: float) -> wire.Reply:
        """The reply to one instruction, from this or an earlier `send`. :raises ReplyTimeout: none in time."""
        end = time.monotonic() + timeout
        while instruction_id not in self._replies:
            left = end - time.monotonic()
            if left <= 0:
                raise ReplyTimeout(
                    f"no reply from host {self.host!r} within {timeout:g} s: is reeve-agent running there with this "
                    f"broker ({broker.redact(self._turn.url)})? Ask again with the same id, {instruction_id}"
                )
            self._drain(min(left, 1.0))
        return self._replies.pop(instruction_id)

    def wait_any(self, instruction_ids: Container[str], timeout: float) -> wire.Reply | None:
        """The reply to one of several, whichever comes first; None when none did in time."""
        end = time.monotonic() + timeout
        while True:
            for ident in self._replies:
                if ident in instruction_ids:
                    return self._replies.pop(ident)
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._drain(min(left, 1.0))

    def listen(self, on_report: Callable[[wire.Report], None], pattern: str = "#") -> None:
        """From now on pass reports whose routing key (``kind.host``) matches `pattern`; they come during `drain`."""

        def receive(message: Any) -> None:
            message.ack()
            try:
                on_report(wire.Report.from_json(wire.parse(_body(message))))
            except (MessageError, KeyError, TypeError, ValueError) as exc:
                LOG.warning("a report that cannot be read was dropped: %s", exc)

        name = f"{broker.REPORT_PREFIX}{uuid.uuid4().hex}"
        self._listeners[name] = (pattern, receive)
        try:
            self._listen(name)
        except self._errors as exc:
            raise self._unreachable(exc) from exc

    def _listen(self, name: str) -> None:
        pattern, receive = self._listeners[name]
        channel = self._connection.channel()
        queue = broker.report_queue(name, pattern, self._quorum)(channel)
        queue.declare()
        kombu.Consumer(channel, [queue], on_message=receive).consume()

    def drain(self, seconds: float) -> None:
        """Take in what arrives within `seconds`; returns after the first message."""
        self._drain(seconds)

    def close(self) -> None:
        try:
            self._queue.delete()
            for name, (pattern, _) in self._listeners.items():
                broker.report_queue(name, pattern, self._quorum)(self._channel).delete()
        except self._errors as exc:
            LOG.debug("reply queue not removed (it expires by itself): %s", exc)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _drain(self, seconds: float) -> None:
        try:
            self._connection.drain_events(timeout=seconds)
        except TimeoutError:
            return
        except self._errors as exc:
            if len(self._turn) == 1:
                raise self._unreachable(exc) from exc
            LOG.warning("%s", self._unreachable(exc))
            self._failover()

    def _on_reply(self, message: Any) -> None:
        message.ack()
        correlation = str(message.properties.get("correlation_id") or "")
        try:
            if self._signer is not None and self._signer.replies:
                self._signer.check_reply(_body(message), correlation, (message.headers or {}).get(HEADER))
            reply = wire.Reply.from_json(wire.parse(_body(message), max_bytes=64 << 20))
        except (MessageError, KeyError, TypeError) as exc:
            LOG.warning("a reply to %.60s was dropped: %s", correlation or "?", exc)
            return
        self._replies[reply.id or correlation] = reply

    def _unreachable(self, exc: BaseException) -> BrokerError:
        return BrokerError(
            f"the broker {broker.redact(self._turn.url)} cannot be used ({explain(exc)}): is it running?"
        )


def _body(message: Any) -> bytes:
    body = message.body
    return body.encode() if isinstance(body, str) else bytes(body or b"")
