"""What a migration's status counts while pages and disks go over in turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypervisor.host.migration.move import Move
from hypervisor.host.migration.sent import Sent
from hypervisor.host.mover import PagesSent
from hypervisor.toolstack.api import MigrationPhase, MigrationRole


def test_pages_and_disks_are_counted_once() -> None:
    told: list[tuple[int, int, str]] = []

    def tell(move: Any) -> None:
        told.append((move.pages_sent, move.bytes_sent, move.detail))

    move = Move("i", "u", MigrationRole.SOURCE, MigrationPhase.COPYING, "s")
    sent = Sent(SimpleNamespace(tell=tell), move)  # type: ignore[arg-type]
    sent.disks(1000, 5 << 20)
    sent.progress(PagesSent(pages=3, bytes=30))
    sent.progress(PagesSent(pages=7, bytes=70, unchanged=2))
    sent.round(PagesSent(pages=8, bytes=80, unchanged=2))
    sent.disks(500, 100)
    sent.progress(PagesSent(pages=1, bytes=10))
    assert told == [
        (0, 1000, "disks: 5 MiB left"),
        (3, 1030, "disks: 5 MiB left"),
        (5, 1070, "disks: 5 MiB left"),
        (6, 1580, ""),
        (7, 1590, ""),
    ]
