"""What saves the guest of a running machine; from any thread but the run loop's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from hypervisor.errors import HostFailure
from hypervisor.machine import Machine
from hypervisor.suspended.capture import Captured, capture
from hypervisor.suspended.transfer import write

TIMEOUT_S = 60.0
"""For the run loop to look at a guest, which takes some milliseconds for each GiB."""


class MachineSaver:
    """See `hypervisor.host.runtime.Saver`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def watch(self, suspended: Callable[[], None]) -> None:
        self._machine.on_suspend = suspended

    def resume(self) -> None:
        self._machine.resume()

    def write(self, out: Callable[[bytes | memoryview], object], memory: int) -> int:
        return write(self.capture(), out, memory)

    def capture(self) -> Captured:
        """:raises WrongState: the guest cannot be saved. :raises HostFailure: the run loop does not answer."""
        found: Future[Captured] = Future()

        def look() -> None:
            try:
                found.set_result(capture(self._machine.domain))
            except Exception as exc:
                found.set_exception(exc)

        self._machine.post(look)
        try:
            return found.result(TIMEOUT_S)
        except FutureTimeout:
            raise HostFailure("the machine does not tell what its guest is: see domain.log") from None
