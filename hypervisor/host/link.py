"""The host's end of a channel, inside asyncio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import select
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.errors import HostFailure, HostUnavailable, from_json
from hypervisor.host import channel as channels
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

EventHandler = Callable[[Message, list[int]], None]
"""Takes an event and owns its descriptors."""


class Link:
    """Requests with answers in one direction, events in the other.

    :param on_event: called for each event.
    :param on_closed: called once when the other end is gone or talks nonsense.
    """

    def __init__(self, channel: Channel, on_event: EventHandler, on_closed: Callable[[], None]) -> None:
        self._channel = channel
        self._on_event = on_event
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.closed = False
        channel.setblocking(False)
        self._loop.add_reader(channel.fileno(), self.read_one)

    async def request(
        self, op: str, timeout: float, fields: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> dict[str, Any]:
        """:param fields: of the message, besides ``op`` and ``id``.

        :raises HostUnavailable: no answer in time, or the other end is gone. :raises ToolstackError: its answer.
        """
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._waiting[number] = future
        try:
            self.send({**(fields or {}), "op": op, "id": number}, fds)
            return await within(future, timeout)
        except TimeoutError:
            raise HostUnavailable(f"the process did not answer {op!r} within {timeout:g} s: try again") from None
        finally:
            self._waiting.pop(number, None)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """:raises HostUnavailable: the other end is gone or does not read."""
        if self.closed:
            raise HostUnavailable("the process is gone: look at the domain's state")
        try:
            self._channel.send(message, fds)
        except BlockingIOError:
            raise HostUnavailable("the process does not read its messages: try again") from None
        except ChannelClosed as exc:
            raise HostUnavailable(f"the process is gone ({exc}): look at the domain's state") from exc

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(HostUnavailable("the process went away: look at the domain's state"))

    def readable(self) -> bool:
        """A message or the end lies ready."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def read_one(self) -> None:
        """Take one message, if there is one."""
        try:
            message, fds = self._channel.receive()
        except BlockingIOError:
            return
        except (ChannelClosed, BadMessage) as exc:
            LOG.debug("link ends: %s", exc)
            self.close()
            self._on_closed()
            return
        if "event" in message:
            try:
                self._on_event(message, fds)
            except Exception:
                LOG.exception("event %s", message.get("event"))
            return
        channels.close_all(fds)
        number = message.get("id")
        future = self._waiting.pop(number, None) if isinstance(number, int) else None
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(from_json(message["error"]))
        elif isinstance(message.get("result"), dict):
            future.set_result(message["result"])
        else:
            future.set_exception(HostFailure("the domain process gave a malformed answer: destroy the domain"))
