"""Linear page tables: refused unless allowed, and then never in chains (XSA-240)."""

from __future__ import annotations

import pytest

from hypervisor.errors import XenError
from hypervisor.memory.linear import LinearTables

RO, RW = 0x5, 0x7


def test_refused_unless_allowed() -> None:
    with pytest.raises(XenError):
        LinearTables().take(RO, 1, 2)


def test_a_writable_entry_is_refused() -> None:
    with pytest.raises(XenError):
        LinearTables(True).take(RW, 1, 1)


def test_a_table_may_point_to_itself() -> None:
    tables = LinearTables(True)
    tables.take(RO, 1, 1)
    assert tables.save() == []


@pytest.mark.parametrize("second", [(2, 3), (3, 1)])
def test_no_chains(second: tuple[int, int]) -> None:
    tables = LinearTables(True)
    tables.take(RO, 1, 2)
    with pytest.raises(XenError):
        tables.take(RO, *second)


def test_given_back_the_other_direction_is_free() -> None:
    tables = LinearTables(True)
    tables.take(RO, 1, 2)
    tables.give(1, 2)
    tables.take(RO, 2, 1)
    assert tables.save() == [(1, -1), (2, 1)]


def test_round_trip() -> None:
    tables = LinearTables(True)
    tables.take(RO, 1, 2)
    tables.take(RO, 3, 2)
    other = LinearTables(True)
    other.restore(tables.save())
    assert other.save() == tables.save() == [(1, 1), (2, -2), (3, 1)]
