"""Writing a suspended guest out of its domain process, in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hypervisor.errors import HostFailure, ToolstackError, WrongState
from hypervisor.host.channel import Message
from hypervisor.host.runtime import Saver

if TYPE_CHECKING:
    from hypervisor.suspended.saver import Frozen

LOG = logging.getLogger(__name__)

RESUME_S = 1.0
"""For how long nothing is written so that a guest which may go on does so first."""


class Saving:
    """One at a time. :param memory: descriptor of the domain's memory. :param send: tells the host.

    :param freeze: freezes the guest's memory, in its thread; None: it has to wait (`hypervisor.host.frozen`).
    """

    def __init__(
        self,
        saver: Saver,
        memory: int,
        send: Callable[[Message], None],
        freeze: Callable[[], Frozen | None] = lambda: None,
    ) -> None:
        self.saver = saver
        self._memory = memory
        self._send = send
        self._freeze = freeze
        self._busy = threading.Lock()
        self._resumed = threading.Event()
        self._lock = threading.Lock()  # guards the rest
        self._asked: list[object] = []
        self._answer: Message | None = None

    def begin(self, number: object, out: int, *, frozen: bool) -> None:
        """Write to `out` and close it; how it ends `saved` tells. Request `number` is answered when it has begun.

        :param frozen: let the guest go on meanwhile, if that can be; the answer says whether it may.
        :raises WrongState: one is under way.
        """
        if not self._busy.acquire(blocking=False):
            os.close(out)
            raise WrongState("the guest is being saved already: wait for that")
        self._resumed.clear()
        with self._lock:
            self._answer = None
        threading.Thread(target=self._run, args=(number, out, frozen), name="save", daemon=True).start()

    def resume(self) -> None:
        """Let the suspended guest go on."""
        self.saver.resume()
        self._resumed.set()

    def saved(self, number: object) -> None:
        """Answer request `number` when what was begun last has ended."""
        with self._lock:
            answer = self._answer
            if answer is None:
                self._asked.append(number)
        if answer is not None:
            self._send({"id": number, **answer})

    def _run(self, number: object, out: int, frozen: bool) -> None:
        begun = False
        try:
            goes_on = frozen and self.saver.freeze(self._freeze)
            begun = True
            self._send({"id": number, "result": {"frozen": goes_on}})
            if goes_on:
                self._resumed.wait(RESUME_S)  # nothing delays that
            pages = self.saver.write(lambda data: _write_all(out, data), self._memory)
            answer: Message = {"result": {"pages": pages}}
        except Exception as exc:
            answer = {"error": _error(exc).to_json()}
        finally:
            os.close(out)
            self._thaw()
        if not begun:
            self._send({"id": number, **answer})
        self._end(answer)

    def _thaw(self) -> None:
        try:
            self.saver.thaw()
        except (OSError, ToolstackError) as exc:  # all is well with the guest; the next save tries again
            LOG.warning("the guest's memory is not thawed: %s", exc)

    def _end(self, answer: Message) -> None:
        with self._lock:
            asked, self._asked, self._answer = self._asked, [], answer
            self._busy.release()
        for number in asked:
            self._send({"id": number, **answer})


def _error(exc: Exception) -> ToolstackError:
    if isinstance(exc, ToolstackError):
        return exc
    if isinstance(exc, OSError):
        return HostFailure(f"the image cannot be passed on: {exc.strerror}: try again")
    LOG.error("saving failed", exc_info=exc)
    return HostFailure(f"saving failed: {type(exc).__name__}: {exc}; see domain.log")


def _write_all(out: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]
