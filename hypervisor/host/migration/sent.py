"""What has gone over, as a migration's status tells of it."""

from __future__ import annotations

from hypervisor.host.migration.hosting import Hosting
from hypervisor.host.migration.move import Move
from hypervisor.host.mover import PagesSent


class Sent:
    """Counts in `move`, and tells of it."""

    def __init__(self, host: Hosting, move: Move) -> None:
        self._host = host
        self._move = move
        self._before = move.pages_sent, move.bytes_sent

    def round(self, sent: PagesSent) -> None:
        """A round of pages is over."""
        self._set(sent)
        self._before = self._move.pages_sent, self._move.bytes_sent

    def progress(self, sent: PagesSent) -> None:
        """So much of a round has gone over by now."""
        self._set(sent)
        self._host.tell(self._move)

    def disks(self, count: int, left: int) -> None:
        """More bytes of disks, and so many are still to be sent."""
        self._move.bytes_sent += count
        self._before = self._move.pages_sent, self._move.bytes_sent
        self._move.detail = f"disks: {left >> 20} MiB left" if left >> 20 else ""
        self._host.tell(self._move)

    def _set(self, sent: PagesSent) -> None:
        self._move.pages_sent = self._before[0] + sent.pages - sent.unchanged
        self._move.bytes_sent = self._before[1] + sent.bytes
