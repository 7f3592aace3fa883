"""Crash points for tests: the agent kills itself at a named boundary.

Inert unless the environment variable ``REEVE_TEST_KILL_AT`` is set when the process starts. It names one
boundary, for example ``create:build:ran``:

* ``consumer:taken``: a message is held and not yet in the journal;
* ``consumer:journalled`` and ``consumer:acked``: around the acknowledgement;
* ``VERB:planned``: the plan is in the journal, no step was begun;
* ``VERB:STEP:begun``, ``VERB:STEP:ran``, ``VERB:STEP:done``: after the journal's begin line, after the step's
  run, after the journal's end line;
* ``VERB:STEP:undoing``, ``VERB:STEP:undone``: before a step's undo and after it, before its journal line;
* ``VERB:finishing`` and ``VERB:finished``: around the transaction that stores the outcome;
* ``publisher:before`` and ``publisher:published``: around the publishing of a reply, before it is marked as sent.
"""

from __future__ import annotations

import os
import signal

_KILL_AT = os.environ.get("REEVE_TEST_KILL_AT", "")


def boundary(name: str) -> None:
    """Die here (SIGKILL) if a test asked for it."""
    if _KILL_AT and name == _KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
