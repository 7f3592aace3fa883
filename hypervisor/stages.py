"""Stages of what has to be fast, told to the log, so that `bench/clone.py --where` can say where the time goes."""

from __future__ import annotations

import logging
import time

LOG = logging.getLogger(__name__)


def stage(name: str) -> None:
    """This far it has come: by the monotonic clock, which all processes share, and by this thread's CPU time."""
    if LOG.isEnabledFor(logging.DEBUG):
        LOG.debug("stage %s %.6f %.6f", name, time.monotonic(), time.thread_time())
