"""A host process that stops itself where a test wants it: at a phase of a migration, as it is written down.

``PHASE what`` in the file ``trap`` of the rig's folder, with what = ``kill`` (SIGKILL) or ``stop`` (SIGSTOP: the test
does something to others, and lets it go on). A trap is met once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hypervisor.host import main
from hypervisor.host.migration import hosting
from hypervisor.host.migration.move import Move

TRAP = Path(os.environ["REEVE_TEST_TRAP"])


def reached(move: Move) -> None:
    try:
        phase, what = TRAP.read_text().split()
    except (OSError, ValueError):
        return
    if phase == move.phase:
        TRAP.unlink()
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


if __name__ == "__main__":
    hosting.reached = reached
    sys.exit(main.main())
