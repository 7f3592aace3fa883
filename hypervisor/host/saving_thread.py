"""Writing a suspended guest out of its domain process, in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from hypervisor.errors import HostFailure, ToolstackError, WrongState
from hypervisor.host.channel import Message
from hypervisor.host.runtime import Saver

LOG = logging.getLogger(__name__)


class Saving:
    """One at a time. :param memory: descriptor of the domain's memory. :param send: tells the host."""

    def __init__(self, saver: Saver, memory: int, send: Callable[[Message], None]) -> None:
        self.saver = saver
        self._memory = memory
        self._send = send
        self._busy = threading.Lock()

    def begin(self, number: object, out: int) -> None:
        """Write to `out` and close it; then answer request `number`. :raises WrongState: one is under way."""
        if not self._busy.acquire(blocking=False):
            os.close(out)
            raise WrongState("the guest is being saved already: wait for that")
        threading.Thread(target=self._run, args=(number, out), name="save", daemon=True).start()

    def _run(self, number: object, out: int) -> None:
        try:
            pages = self.saver.write(lambda data: _write_all(out, data), self._memory)
            answer: Message = {"result": {"pages": pages}}
        except ToolstackError as exc:
            answer = {"error": exc.to_json()}
        except OSError as exc:
            answer = {"error": HostFailure(f"the image cannot be passed on: {exc.strerror}: try again").to_json()}
        except Exception as exc:
            LOG.exception("saving failed")
            error = HostFailure(f"saving failed: {type(exc).__name__}: {exc}; see domain.log")
            answer = {"error": error.to_json()}
        finally:
            os.close(out)
            self._busy.release()
        self._send({"id": number, **answer})


def _write_all(out: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]
