"""The domain process's ops of a migration, on a guest that only notes what it is asked."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hypervisor.errors import HostFailure, MigrationFailed, Unsupported, WrongState
from hypervisor.host import moving
from hypervisor.host.moving import MigrationPart
from hypervisor.host.writable_pages import WritablePages

PAGES = 40


class Guest:
    """A `hypervisor.host.runtime.Moving`."""

    address, pages = 0x1000, PAGES

    def __init__(self) -> None:
        self.frozen = self.incoming = False
        self.punched: collections.deque[tuple[int, int]] | None = None
        self.obstacle = ""
        self.taken: list[bytes] = []
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1

    def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def host_pages(self) -> set[int]:
        return {3, 4}

    def facts(self) -> dict[str, Any]:
        return {"bits": 64}

    def obstacles(self) -> str:
        return self.obstacle

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def give(self, *, early: bool = False, served: bool = False) -> bytes:
        return b"early" if early else b"served" if served else b"x" * 300_000

    def take(self, data: bytes, marks: int | None = None) -> None:
        self.taken.append(data)


class Log:
    """A `hypervisor.host.dirty_log.WriteLog`."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.range = (0, 0)

    def start(self, address: int, size: int) -> None:
        self.range = (address, size)

    def stop(self) -> None:
        self.range = (0, 0)

    def take(self) -> Any:
        found = np.zeros(PAGES, dtype=bool)
        found[list(self.written)] = True
        self.written = set()
        return found


class Neighbours:
    reason = ""

    def entangled(self) -> str:
        return self.reason


class Rig:
    def __init__(self, *, log: bool = True) -> None:
        self.guest, self.log, self.neighbours = Guest(), Log() if log else None, Neighbours()
        self.writable = WritablePages()
        self.part = MigrationPart(self.guest, self.log, self.writable, self.neighbours)  # type: ignore[arg-type]
        self.bitmap = os.memfd_create("bitmap")

    def ask(self, op: str, *fds: int, **fields: Any) -> dict[str, Any]:
        return self.part.answer({"op": f"migration_{op}", **fields}, [os.dup(fd) for fd in fds])

    def bits(self) -> tuple[list[int], list[int]]:
        """Pages of the two bitmaps."""
        size = (PAGES + 7) // 8
        data = os.pread(self.bitmap, 4 * size, 0)
        assert len(data) == 2 * size
        found = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little").reshape(2, -1)
        return tuple([int(i) for i in np.flatnonzero(part)] for part in found)  # type: ignore[return-value]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    os.close(made.bitmap)


def test_writes_of_all_kinds_are_told(rig: Rig) -> None:
    assert rig.ask("facts") | {"seconds": 0} == {
        "facts": {"bits": 64}, "pages": PAGES, "log": "write-protection", "seconds": 0,
    }  # fmt: skip
    rig.writable.mapped(10)
    assert rig.ask("log", rig.bitmap, on=True)["pages"] == PAGES
    assert rig.log is not None and rig.log.range == (0x1000, PAGES * 4096)
    rig.log.written = {1, 2}
    assert rig.guest.punched is not None
    rig.guest.punched.append((20, 3))
    rig.writable.mapped(11)
    rig.writable.unmapped(11)
    told = rig.ask("dirty")
    assert rig.bits() == ([1, 2, 3, 4, 10, 11, 20, 21, 22], [3, 4, 10, 11])
    assert (told["pages"], told["shared"]) == (9, 4) and told["seconds"] >= 0
    rig.ask("dirty")
    assert rig.bits() == ([3, 4, 10], [3, 4, 10])
    rig.writable.unmapped(10)
    rig.ask("dirty")
    assert rig.bits()[0] == [3, 4, 10]
    rig.ask("dirty")
    assert rig.bits()[0] == [3, 4]


def test_without_the_kernels_help_every_page_is_compared(rig: Rig) -> None:
    other = Rig(log=False)
    assert other.ask("log", other.bitmap, on=True)["log"] == "comparison"
    told = other.ask("dirty")
    assert told["pages"] == told["shared"] == PAGES and other.bits() == ([*range(PAGES)], [*range(PAGES)])
    os.close(other.bitmap)


def test_the_log_ends_and_leaves_nothing(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rig.ask("log", rig.bitmap, on=True)
    rig.ask("log", rig.bitmap, on=True)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert rig.part.state() == {"frozen": False, "incoming": False, "logged": True}
    rig.ask("log", on=False)
    rig.ask("log", on=False)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert rig.guest.punched is None and rig.log is not None and rig.log.range == (0, 0)
    with pytest.raises(WrongState, match="migration_log"):
        rig.ask("dirty")
    rig.writable.mapped(1)
    rig.writable.unmapped(1)  # nobody collects that any more
    assert rig.writable.take() == set()


@pytest.mark.parametrize("op", ["log", "export"])
def test_a_domain_that_shares_with_others_stays(rig: Rig, op: str) -> None:
    rig.guest.freeze()
    rig.neighbours.reason = "it and domain 9 share frames"
    with pytest.raises(WrongState, match="domain 9"):
        rig.ask(op, rig.bitmap, on=True)
    rig.neighbours.reason, rig.guest.obstacle = "", "event channel 5"
    with pytest.raises(WrongState, match="event channel 5"):
        rig.ask(op, rig.bitmap, on=True)


def test_a_mapping_that_was_replaced_is_told_as_what_it_is(rig: Rig) -> None:
    rig.ask("log", rig.bitmap, on=True)
    assert rig.log is not None

    def refuse() -> None:
        raise PermissionError(1, "not permitted")

    rig.log.take = refuse  # type: ignore[method-assign]
    with pytest.raises(WrongState, match="shared memory"):
        rig.ask("dirty")


def test_the_state_goes_out_and_in(rig: Rig) -> None:
    rig.ask("log", rig.bitmap, on=True)
    rig.guest.punched = collections.deque([(7, 1)])
    assert rig.ask("freeze", on=True, dirty=True)["pages"] == 3 and rig.bits()[0] == [3, 4, 7]
    assert rig.guest.frozen
    assert rig.ask("export", rig.bitmap)["bytes"] == 300_000
    rig.ask("import", rig.bitmap)
    assert rig.guest.taken == [b"x" * 300_000]
    os.ftruncate(rig.bitmap, 0)
    assert rig.ask("export", rig.bitmap, served=True)["bytes"] == len(b"served")
    assert os.pread(rig.bitmap, 100, 0) == b"served"
    rig.ask("freeze", on=False)
    assert not rig.guest.frozen
    rig.guest.incoming = True
    with pytest.raises(WrongState):
        rig.ask("freeze", on=True)


def test_what_is_asked_wrongly(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("log", "export", "import"):
        with pytest.raises(HostFailure):
            rig.ask(op, on=True)
    monkeypatch.setattr(moving, "MAX_STATE", 100)
    os.ftruncate(rig.bitmap, 200)
    with pytest.raises(MigrationFailed, match="more than"):
        rig.ask("import", rig.bitmap)
    with pytest.raises(Unsupported):
        moving.answer(None, {"op": "migration_facts"}, [])
