"""Asking again what cannot be answered just now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from agent.api import Check
from agent.context import StepContext
from agent.errors import AgentError, JournalError
from hypervisor.errors import ToolstackError

LOG = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0


def patiently(ctx: StepContext, seconds: float, call: Callable[[], Any]) -> Any:
    """`call`, again with growing pauses while it fails retryably or returns `Check.UNKNOWN` (None at the end)."""
    end = time.monotonic() + seconds
    pause = FIRST_PAUSE
    while True:
        try:
            got = call()
            if got is not Check.UNKNOWN:
                return got
        except (ToolstackError, AgentError) as exc:
            if not exc.retryable or isinstance(exc, JournalError) or time.monotonic() >= end:
                raise
            LOG.warning("asking again in %.1f s: %s", pause, exc)
        if time.monotonic() >= end:
            return None
        ctx.pause(pause)
        pause = min(pause * 2, LONGEST_PAUSE)
