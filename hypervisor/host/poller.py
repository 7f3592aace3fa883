"""The channel thread of a domain process: descriptors and what is called when they are readable."""

from __future__ import annotations

import collections
import logging
import os
import select
from collections.abc import Callable

from hypervisor.host.handles import answer, ring

LOG = logging.getLogger(__name__)


class Poller:
    """Sleeps in poll until something arrives. All but `call` is for the thread that is in `run`."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.POLLIN)

    def add(self, fd: int, readable: Callable[[], None]) -> None:
        """Call `readable` whenever `fd` is, or its other end is gone."""
        self._watched[fd] = readable
        self._poll.register(fd, select.POLLIN)

    def remove(self, fd: int) -> None:
        """Before `fd` is closed. No effect if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call(self, function: Callable[[], None]) -> None:
        """From any thread: have `function` called in the poller's."""
        self._calls.append(function)
        ring(self._wake)

    def run_once(self, timeout_ms: int | None = None) -> None:
        """One wait. What a callback raises is logged: the thread serves others, too."""
        for fd, _ in self._poll.poll(timeout_ms):
            if fd == self._wake:
                answer(fd)
                self._run_calls()
            else:
                readable = self._watched.get(fd)
                if readable is not None:  # another callback may have removed it
                    _guarded(readable)

    def _run_calls(self) -> None:
        while self._calls:
            _guarded(self._calls.popleft())

    def run(self) -> None:
        while True:
            self.run_once()


def _guarded(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception:
        LOG.exception("in the channel thread")
