"""The single thread of a driver process: descriptors and timers (`hypervisor.devices.driver.Loop`)."""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import select
import time
from collections.abc import Callable


class EventLoop:
    """:param clock: seconds, monotonic. What a callback raises ends `run`: the process is replaced then.

    :ivar on_activity: called after each turn in which a descriptor was readable.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_activity: Callable[[], None] = lambda: None
        self._clock = clock
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._numbers = itertools.count()
        self._soon: collections.deque[Callable[[], None]] = collections.deque()
        self._running = False

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable or its other end is gone; replaces an earlier one."""
        if fd not in self._readers:
            self._epoll.register(fd, select.EPOLLIN)
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """No effect if there is none, or `fd` was closed already."""
        if self._readers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        entry = [callback]  # emptied when it is cancelled
        heapq.heappush(self._timers, (self._clock() + max(0.0, seconds), next(self._numbers), entry))
        return entry.clear

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def run(self) -> None:
        """Until `stop`."""
        self._running = True
        while self._running:
            self.run_once(None)

    def stop(self) -> None:
        self._running = False

    def run_once(self, timeout: float | None) -> None:
        """One turn. :param timeout: seconds to wait at most; None: until something happens."""
        while self._timers and not self._timers[0][2]:
            heapq.heappop(self._timers)
        if self._soon:
            timeout = 0.0
        elif self._timers:
            left = max(0.0, self._timers[0][0] - self._clock())
            timeout = left if timeout is None else min(timeout, left)
        ready = self._epoll.poll(timeout)
        for fd, _ in ready:
            callback = self._readers.get(fd)
            if callback is not None:
                callback()
        if ready:
            self.on_activity()
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            entry = heapq.heappop(self._timers)[2]
            if entry:
                entry[0]()

    def close(self) -> None:
        self._epoll.close()
