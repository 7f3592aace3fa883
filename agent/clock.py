"""The clock for how long something takes or is kept.

The host's time of day may be set, forwards and backwards; it is right for what others gave in it (deadlines) and for
what people read, and wrong for everything else.
"""

from __future__ import annotations

import time


def elapsed() -> float:
    """Seconds since some moment; nobody sets it, and it counts while the host sleeps (``CLOCK_BOOTTIME``)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
