"""How an agent speaks to other agents, and to its own queue: as a scheduler does, with instructions of the usual form.

The caller is a worker with a connection of its own; the agent's consumer has no part in it. Every wait is bounded or
gives way when the agent is stopped.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from agent import trace, wire
from agent.api import JsonDict
from agent.context import Interrupted
from agent.errors import AgentError, BrokerError, InstructionError, ReplyTimeout
from agent.rpc import connection as broker
from agent.rpc.client import Client
from agent.rpc.tls import VERIFIED, BrokerTls
from agent.signing import Signer

LOG = logging.getLogger(__name__)

SLICE_SECONDS = 0.5
"""Between two looks whether the agent is being stopped."""
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
ASK_AGAIN_SECONDS = 30.0
"""An instruction that is not answered is sent again, with its id, after so long: a reply may be lost with its queue."""


class BrokerPeers:
    """`agent.api.Peers` over the broker at `url`.

    :param stopping: set when the agent ends; whoever waits gets `Interrupted`.
    :param outbox: keeps a message until the broker has taken it.
    """

    def __init__(
        self,
        url: str,
        stopping: threading.Event,
        outbox: Callable[[wire.Outgoing], None],
        *,
        poll_seconds: float = broker.POLL_SECONDS,
        max_message_bytes: int = wire.MAX_BYTES,
        ask_again_seconds: float = ASK_AGAIN_SECONDS,
        tls: BrokerTls = VERIFIED,
        signer: Signer | None = None,
        quorum: bool = False,
    ) -> None:
        self._quorum = quorum
        self._signer = signer
        self._tls = tls
        self._url = url
        self._stopping = stopping
        self._outbox = outbox
        self._told: set[str] = set()
        self._poll_seconds = poll_seconds
        self._max_message_bytes = max_message_bytes
        self._ask_again_seconds = ask_again_seconds

    def call(self, host: str, verb: str, args: JsonDict, *, ident: str, timeout: float, expire: bool) -> JsonDict:
        """See `agent.api.Peers.call`."""
        end = time.monotonic() + timeout
        with self._client(host) as client:
            client.send(verb, args, instruction_id=ident, deadline=time.time() + timeout if expire else None)
            while True:
                self._check()
                left = end - time.monotonic()
                try:
                    return _result(client.wait(ident, max(0.0, min(left, SLICE_SECONDS))))
                except ReplyTimeout:
                    if left <= SLICE_SECONDS:
                        raise ReplyTimeout(
                            f"the agent of host {host!r} gave no answer to {verb} within {timeout:g} s: is it running, "
                            "with the same broker?"
                        ) from None

    def tell(self, host: str, verb: str, args: JsonDict, *, ident: str) -> None:
        """See `agent.api.Peers.tell`."""
        if ident in self._told:
            return
        body = wire.encode_instruction(wire.Instruction(ident, verb, host, dict(args), context=dict(trace.current())))
        self._outbox(wire.Outgoing("", wire.queue_name(host), body, correlation_id=ident))
        self._told.add(ident)

    def call_all(
        self,
        host: str,
        verb: str,
        calls: Sequence[tuple[str, JsonDict]],
        *,
        at_once: int,
        done: Callable[[str, JsonDict | InstructionError], None],
        more: Callable[[], bool],
    ) -> None:
        """See `agent.api.Peers.call_all`."""
        waiting = collections.deque(calls)
        under_way: dict[str, JsonDict] = {}
        pause = FIRST_PAUSE
        while waiting or under_way:
            self._check()
            try:
                with self._client(host) as client:
                    for ident, args in under_way.items():
                        client.send(verb, args, instruction_id=ident)
                    self._serve(client, verb, waiting, under_way, at_once, done, more)
                    pause = FIRST_PAUSE
            except BrokerError as exc:
                LOG.warning("%s; trying again in %.1f s", exc, pause)
                if self._stopping.wait(pause):
                    raise Interrupted from exc
                pause = min(pause * 2, LONGEST_PAUSE)

    def _serve(
        self,
        client: Client,
        verb: str,
        waiting: collections.deque[tuple[str, JsonDict]],
        under_way: dict[str, JsonDict],
        at_once: int,
        done: Callable[[str, JsonDict | InstructionError], None],
        more: Callable[[], bool],
    ) -> None:
        """Send and receive until all is done, or for so long that it should be asked again."""
        end = time.monotonic() + self._ask_again_seconds
        while waiting or under_way:
            self._check()
            while waiting and len(under_way) < at_once:
                if not more():
                    waiting.clear()
                    break
                ident, args = waiting.popleft()
                under_way[ident] = args
                client.send(verb, args, instruction_id=ident)
            if not under_way:
                return
            reply = client.wait_any(under_way, SLICE_SECONDS)
            if reply is not None:
                del under_way[reply.id]
                try:
                    outcome: JsonDict | InstructionError = _result(reply)
                except InstructionError as exc:
                    outcome = exc
                done(reply.id, outcome)
                end = time.monotonic() + self._ask_again_seconds
            elif time.monotonic() >= end:
                return

    @contextlib.contextmanager
    def _client(self, host: str) -> Iterator[Client]:
        """:raises BrokerError: the broker cannot be reached, also where it is a folder that is gone."""
        try:
            client = Client(
                self._url,
                host,
                poll_seconds=self._poll_seconds,
                max_message_bytes=self._max_message_bytes,
                tls=self._tls,
                signer=self._signer,
                quorum=self._quorum,
            )
        except BrokerError:
            raise
        except AgentError as exc:
            raise BrokerError(exc.message) from exc
        try:
            yield client
        finally:
            client.close()

    def _check(self) -> None:
        if self._stopping.is_set():
            raise Interrupted


def _result(reply: wire.Reply) -> JsonDict:
    """:raises InstructionError: it failed there."""
    if reply.error is None:
        return dict(reply.result or {})
    error = reply.error
    code, message = str(error.get("code", "instruction.failed")), str(error.get("message", "no reason given"))
    raise InstructionError(code, f"host {reply.host}: {message}", bool(error.get("retryable", False)))
