"""Signs of life for callers that watch over their calls (oslo.messaging's ``call_monitor_timeout``).

From the moment an instruction is accepted until it is finished each such caller gets one every so many seconds,
also while the instruction waits for its turn. Nothing of it is stored: a restarted agent begins anew from the journal.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from agent import oslo, wire

NEVER = 3600.0


@dataclasses.dataclass(slots=True)
class _Watch:
    reply_to: str
    correlation: str
    interval: float
    due: float


class Heartbeats:
    """Who hears what and when; safe to call from several threads.

    :param wake: called when there is a new one to send, perhaps sooner than all others.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, wake: Callable[[], None] = lambda: None) -> None:
        self._now = now
        self._wake = wake
        self._lock = threading.Lock()
        self._watches: dict[str, list[_Watch]] = {}

    def watch(self, ident: str, reply_to: str, correlation: str, interval: float) -> None:
        """:param interval: seconds between two signs of life; the first comes after one."""
        watch = _Watch(reply_to, correlation, interval, self._now() + interval)
        with self._lock:
            known = self._watches.setdefault(ident, [])
            if any((item.reply_to, item.correlation) == (reply_to, correlation) for item in known):
                return
            known.append(watch)
        self._wake()

    def forget(self, ident: str) -> None:
        """The instruction is finished."""
        with self._lock:
            self._watches.pop(ident, None)

    def gone(self, reply_to: str) -> None:
        """Nobody has this reply queue: its owner hears no more."""
        with self._lock:
            for ident, watches in list(self._watches.items()):
                watches[:] = [item for item in watches if item.reply_to != reply_to]
                if not watches:
                    del self._watches[ident]

    def due(self) -> tuple[list[wire.Outgoing], float]:
        """(what is to be sent now, seconds until there is more)."""
        now = self._now()
        messages = []
        with self._lock:
            for watches in self._watches.values():
                for item in watches:
                    if item.due <= now:
                        item.due = now + item.interval
                        messages.append(oslo.encode_heartbeat(item.reply_to, item.correlation))
            soonest = min((item.due for watches in self._watches.values() for item in watches), default=now + NEVER)
        return messages, max(0.0, soonest - now)
