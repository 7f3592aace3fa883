"""The backend of a guest's console ring (hvc0).

Layout: ``struct xencons_interface`` of Xen's ``public/io/console.h``. What the
guest prints goes to the log and to every attached client; what clients type
goes to the guest as it has room. The guest's output is never held up by a
client, only by a rate that keeps a guest that prints without end from taking
the host's time.

What survives a restart of the host process: the ring itself (shared memory),
the log (a file), and input that the guest had no room for (`save`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from hypervisor.devices.console.client import ConsoleClient
from hypervisor.devices.console.log import ConsoleLog
from hypervisor.devices.rate import Bucket
from hypervisor.devices.ring import Consumer, Producer, RingBroken

LOG = logging.getLogger(__name__)

IN_SIZE, OUT_SIZE = 1024, 2048
_IN_AT, _OUT_AT = 0, IN_SIZE
_IN_CONS, _IN_PROD, _OUT_CONS, _OUT_PROD = 3072, 3076, 3080, 3084
_CONNECTION = 3088
_CONNECTED, _DISCONNECTED = 0, 1

INPUT_MAX = 4096
"""Bytes typed that wait for room in the guest's ring."""

RATE = 1 << 20
"""Bytes a second that a guest may print in the long run."""
BURST = 1 << 18


class ConsoleRing:
    """:param page: the shared page, live, 4096 writable bytes.

    :param notify: sends an event to the guest's console port; must not call back.
    :param call_later: as for `hypervisor.xenstore.ring.XenstoreRing`; at most one call outstanding.
    :param state: what `save` of the one before gave.
    """

    def __init__(
        self,
        page: memoryview,
        notify: Callable[[], None],
        log: ConsoleLog,
        call_later: Callable[[float, Callable[[], None]], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        state: dict[str, Any] | None = None,
        label: str = "console",
    ) -> None:
        self.log = log
        self._notify = notify
        self._call_later = call_later
        self._call_pending = False
        self._label = label
        self._page = page
        self._output = Consumer(page, _OUT_AT, OUT_SIZE, _OUT_CONS, _OUT_PROD)
        self._input = Producer(page, _IN_AT, IN_SIZE, _IN_CONS, _IN_PROD)
        self._typed = bytearray()
        self._clients: dict[ConsoleClient, None] = {}
        self._bucket = Bucket(RATE, BURST, clock)
        self._broken = False
        self._closed = False
        if state is not None:
            self._typed += str(state["typed"]).encode("latin-1")[:INPUT_MAX]
        page[_CONNECTION] = _CONNECTED
        # What was printed or typed while nobody listened. The guest is told too: a host process before this one may
        # have ended between a change of the ring and the event that tells of it.
        self._wake_in(0.0)
        notify()

    @property
    def broken(self) -> bool:
        """The guest's indices make no sense: its console is dead until it is made anew."""
        return self._broken

    def on_notify(self) -> None:
        """The guest sent an event, or it is time that `call_later` was told: drain output, give input."""
        if self._broken or self._closed:
            return
        try:
            self._drain()
            self._give_input()
        except RingBroken as exc:
            LOG.warning("%s: ring stopped: %s", self._label, exc)
            self._broken = True
            self._announce(f"\r\n[console stopped: {exc}]\r\n".encode())

    def attach(
        self,
        on_output: Callable[[], None],
        on_input_space: Callable[[], None] = lambda: None,
        *,
        history: int = 4096,
    ) -> ConsoleClient:
        """A new client. It first gets the last `history` bytes that the guest printed."""
        client = ConsoleClient(self, on_output, on_input_space)
        past = self.log.tail(history)
        self._clients[client] = None
        if past:
            client.deliver(past)
        return client

    def detach(self, client: ConsoleClient) -> None:
        """No effect when it is detached already."""
        self._clients.pop(client, None)
        client.ended = True

    def send_input(self, data: bytes) -> int:
        """Type for the guest. :returns: bytes accepted; ``INPUT_MAX`` may wait."""
        if self._broken or self._closed:
            return len(data)  # typed into the void, as on a machine that is off
        accepted = data[: INPUT_MAX - len(self._typed)]
        self._typed += accepted
        if accepted:
            try:
                self._give_input()
            except RingBroken:
                self.on_notify()
        return len(accepted)

    def save(self) -> dict[str, Any]:
        """JSON form of what is neither in the ring nor in the log."""
        return {"typed": self._typed.decode("latin-1")}

    def close(self) -> None:
        """The domain is gone: take what it printed last, end the clients, let go of the page. The log stays."""
        if self._closed:
            return
        self._bucket = Bucket(RATE, float(OUT_SIZE), lambda: 0.0)
        self.on_notify()
        self._closed = True
        for client in list(self._clients):
            client.end()
        self._clients.clear()
        self._output.close()
        self._input.close()
        self.log.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        delay = self._bucket.delay()
        if delay:
            self._wake_in(delay)
            return
        data = self._output.peek(OUT_SIZE)
        if data:
            # Logged before the guest may overwrite it: a restart in between repeats it rather than lose it.
            self._announce(data)
            self._output.advance(len(data))
            self._bucket.take(len(data))
            self._notify()

    def _announce(self, data: bytes) -> None:
        self.log.write(data)
        for client in list(self._clients):
            client.deliver(data)

    def _give_input(self) -> None:
        if not self._typed:
            return
        was_full = len(self._typed) >= INPUT_MAX
        count = self._input.write(bytes(self._typed))
        if not count:
            return
        del self._typed[:count]
        self._notify()
        if was_full:
            for client in list(self._clients):
                client.on_input_space()

    def _wake_in(self, seconds: float) -> None:
        if not self._call_pending:
            self._call_pending = True
            self._call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._call_pending = False
        self.on_notify()
