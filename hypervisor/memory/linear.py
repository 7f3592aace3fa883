"""Linear page tables: a table that points to a table of its own level, read-only.

Old guests map their page tables this way. It is refused unless a host allows
it (Xen's pv-linear-pt), and then under XSA-240's rule: a table either holds such entries or is the target of some,
never both, so no chain can be built whose release would recurse without end.
A table may also point to itself; that takes no reference.
"""

from __future__ import annotations

from hypervisor.abi import errno
from hypervisor.engines.x86 import PTE_RW
from hypervisor.errors import XenError


class LinearTables:
    """Who holds linear entries and who is their target.

    :param allowed: False refuses them all.
    """

    __slots__ = ("_count", "allowed")

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        # Frame index: above 0 the linear entries in it, below 0 those of others that point to it.
        self._count: dict[int, int] = {}

    def take(self, entry: int, owner: int, target: int) -> None:
        """An entry of table `owner` will point to `target` of the same level.

        :raises XenError: EINVAL.
        """
        if not self.allowed or owner < 0:
            raise XenError(errno.EINVAL, "linear page tables are not allowed")
        if entry & PTE_RW:
            raise XenError(errno.EINVAL, "a linear page-table entry may not be writable")
        if owner == target:
            return
        if self._count.get(owner, 0) < 0 or self._count.get(target, 0) > 0:
            raise XenError(errno.EINVAL, "a chain of linear page tables")
        self._add(owner, 1)
        self._add(target, -1)

    def give(self, owner: int, target: int) -> None:
        """Such an entry goes."""
        if owner != target:
            self._add(owner, -1)
            self._add(target, 1)

    def _add(self, index: int, step: int) -> None:
        value = self._count.get(index, 0) + step
        if value:
            self._count[index] = value
        else:
            self._count.pop(index, None)

    def save(self) -> list[tuple[int, int]]:
        return sorted(self._count.items())

    def restore(self, state: list[tuple[int, int]]) -> None:
        self._count = {int(index): int(count) for index, count in state}
