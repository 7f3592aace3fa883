"""What a step sees while it runs (`agent.api.Context`), and the log fields of the instruction under way."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agent import clock, trace
from agent.api import Host, InstructionError, JsonDict

_instruction: contextvars.ContextVar[str] = contextvars.ContextVar("instruction", default="-")
_domain: contextvars.ContextVar[str] = contextvars.ContextVar("domain", default="-")
_request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="-")

POLL_SECONDS = 0.05
PROGRESS_SECONDS = 1.0
"""Progress is told at most so often."""


def never() -> bool:
    return False


class Interrupted(Exception):
    """The agent is being stopped: the instruction stays in the journal and resumes at the next start."""


class ContextFilter(logging.Filter):
    """Adds ``instruction``, ``domain``, ``request`` (the sender's own id) and ``traceparent`` to every log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.instruction = _instruction.get()
        record.domain = _domain.get()
        record.request = _request.get()
        record.traceparent = trace.current().get(trace.PARENT, "")
        return True


@contextlib.contextmanager
def log_fields(
    instruction: str, domain: str = "-", request: str | None = None, traced: Mapping[str, str] | None = None
) -> Iterator[None]:
    """:param request: None leaves what is set, and so does `traced`, the trace of the instruction."""
    tokens = _instruction.set(instruction), _domain.set(domain or "-")
    asked = None if request is None else _request.set(request or "-")
    entered = None if traced is None else trace.enter(traced)
    try:
        yield
    finally:
        _instruction.reset(tokens[0])
        _domain.reset(tokens[1])
        if asked is not None:
            _request.reset(asked)
        if entered is not None:
            trace.leave(entered)


def current_domain() -> str:
    """Which domain `log_fields` says this is about; "" for none."""
    return _domain.get().removeprefix("-")


@dataclasses.dataclass(slots=True)
class StepContext:
    """:ivar deadline: by `agent.clock.elapsed`, or None: it stays what it is when the time of day is set.

    :ivar cancelled: whether the instruction is to give way; asked at each step, and while one waits.
    :ivar tell: takes ``{"done", "total", "unit"}`` and more while a step is under way.
    """

    host: Host
    instruction: str
    stopping: threading.Event
    deadline: float | None = None
    outputs: dict[str, JsonDict] = dataclasses.field(default_factory=dict)
    tell: Callable[[JsonDict], None] = lambda data: None
    cancelled: Callable[[], bool] = never
    _told: float = 0.0

    def seconds_left(self, at_most: float) -> float:
        left = at_most if self.deadline is None else self.deadline - clock.elapsed()
        return max(0.0, min(at_most, left))

    def poll(self, ready: Callable[[float], Any], at_most: float) -> Any:
        end = time.monotonic() + self.seconds_left(at_most)
        while True:
            left = max(0.0, end - time.monotonic())
            got = ready(min(left, 0.5))
            if got:
                return got
            if left <= 0:
                return None
            self.check_wanted()
            self.pause(POLL_SECONDS)

    def check_wanted(self) -> None:
        """:raises InstructionError: ``instruction.cancelled``."""
        if self.cancelled():
            raise InstructionError("instruction.cancelled", "it was cancelled: send it again if it is wanted after all")

    def progress(self, done: float, total: float, unit: str, **more: Any) -> None:
        now = time.monotonic()
        if done >= total or now >= self._told + PROGRESS_SECONDS:
            self._told = now
            self.tell({**more, "done": done, "total": total, "unit": unit})

    def pause(self, seconds: float) -> None:
        """:raises Interrupted: the agent is being stopped."""
        if self.stopping.wait(seconds):
            raise Interrupted
