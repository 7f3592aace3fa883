"""What saves the guest of a running machine; from any thread but the run loop's."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from hypervisor.errors import HostFailure
from hypervisor.machine import Machine
from hypervisor.suspended.capture import Captured, capture
from hypervisor.suspended.transfer import write

TIMEOUT_S = 60.0
"""For the run loop to look at a guest, which takes some milliseconds for each GiB."""

_T = TypeVar("_T")


class Frozen(Protocol):
    """Memory that stays what it was while the guest runs (`hypervisor.host.frozen`)."""

    def read(self, indexes: Any) -> Any: ...

    def stop(self) -> None: ...

    def thaw(self) -> bool: ...


class MachineSaver:
    """See `hypervisor.host.runtime.Saver`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._frozen: Frozen | None = None
        self._captured: Captured | None = None
        self._over = threading.Event()
        self._done: threading.Event | None = None  # of the call that is under way

    def watch(self, suspended: Callable[[], None]) -> None:
        self._machine.on_suspend = suspended

    def resume(self) -> None:
        self._machine.resume()

    def ended(self) -> None:
        """The run loop is over."""
        self._over.set()
        if self._done is not None:
            self._done.set()

    def freeze(self, make: Callable[[], Frozen | None]) -> bool:
        def both() -> tuple[Captured, Frozen | None]:
            captured = capture(self._machine.domain)
            return captured, make()

        self._captured, self._frozen = self._call(both)
        return self._frozen is not None

    def write(self, out: Callable[[bytes | memoryview], object], memory: int) -> int:
        captured, frozen = self._captured or self._call(lambda: capture(self._machine.domain)), self._frozen
        self._captured = None
        if frozen is not None:
            captured = dataclasses.replace(captured, read=frozen.read)
        try:
            return write(captured, out, memory)
        finally:
            if frozen is not None:
                frozen.stop()

    def thaw(self) -> None:
        frozen, self._captured = self._frozen, None
        if frozen is None:
            return
        frozen.stop()
        while self._call(frozen.thaw):
            pass
        self._frozen = None

    def _call(self, function: Callable[[], _T]) -> _T:
        """In the run loop's thread, as long as there is one. :raises HostFailure: it does not answer."""
        done = self._done = threading.Event()
        result: list[_T] = []
        failure: list[Exception] = []

        def look() -> None:
            try:
                result.append(function())
            except Exception as exc:
                failure.append(exc)
            done.set()

        if not self._over.is_set():
            self._machine.post(look)
            if not done.wait(TIMEOUT_S):
                raise HostFailure("the machine does not tell what its guest is: see domain.log")
        if not result and not failure:  # the guest has ended, and nothing changes any more
            return function()
        if failure:
            raise failure[0]
        return result[0]
