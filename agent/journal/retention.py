"""How long outcomes and refused messages are kept, whatever happens to the host's time of day.

The journal has times of day, since it outlives the host. So what a clock that was set forwards makes old is moved along
with it, and what one that was set backwards has left in the future counts as of now: kept too long rather than not
long enough, because an outcome that is forgotten is an instruction that could be carried out twice.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

LOG = logging.getLogger(__name__)

JUMP_SECONDS = 5.0
"""A clock that is set by less is left to itself; adjusting it slowly never comes near in the time between two looks."""


class Retention:
    """:param now: the time of day. :param elapsed: a clock that nobody sets."""

    def __init__(self, now: Callable[[], float], elapsed: Callable[[], float]) -> None:
        self._now = now
        self._elapsed = elapsed
        self._seen: tuple[float, float] | None = None

    def sweep(self, write: Callable[[Callable[[sqlite3.Connection], int]], int]) -> int:
        """Drop the outcomes whose time has passed; how many. :param write: the journal's, one transaction."""
        now, elapsed = self._now(), self._elapsed()
        first = self._seen is None
        seen = self._seen or (now, elapsed)
        expected = seen[0] + elapsed - seen[1]
        jump = now - expected
        if abs(jump) > JUMP_SECONDS:
            LOG.warning("the clock was set by %+.0f s: outcomes and refused messages are kept as if it was not", jump)

        def operation(db: sqlite3.Connection) -> int:
            if jump > JUMP_SECONDS:
                _later(db, jump, expected)
            elif first or jump < -JUMP_SECONDS:
                _from_the_future(db, now)
            return db.execute("DELETE FROM instructions WHERE expires < ?", (now,)).rowcount

        count = write(operation)
        self._seen = now, elapsed
        return count


def _later(db: sqlite3.Connection, seconds: float, before: float) -> None:
    """What was finished or refused by then was so that much later."""
    db.execute(
        "UPDATE instructions SET finished = finished + ?, expires = expires + ? WHERE finished <= ?",
        (seconds, seconds, before),
    )
    db.execute("UPDATE quarantine SET received = received + ? WHERE received <= ?", (seconds, before))


def _from_the_future(db: sqlite3.Connection, now: float) -> None:
    db.execute(
        "UPDATE instructions SET expires = expires - finished + ?, finished = ? WHERE finished > ?", (now, now, now)
    )
    db.execute("UPDATE quarantine SET received = ? WHERE received > ?", (now, now))
