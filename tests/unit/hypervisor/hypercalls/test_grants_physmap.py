"""XENMEM_add_to_physmap, its batch and remove_from_physmap: no PV domain may, as in xen/common/memory.c."""

from __future__ import annotations

import struct

import pytest
from pv_rig import PAGE, E, Rig, code_of

from hypervisor import abi
from hypervisor.hypercalls.memory import memory_op

AT = 40 * PAGE
ADD, BATCH, REMOVE = abi.XENMEM_add_to_physmap, abi.XENMEM_add_to_physmap_batch, abi.XENMEM_remove_from_physmap
SELF, GRANTS = abi.DOMID_SELF, abi.XENMAPSPACE_grant_table


@pytest.mark.parametrize(
    ("command", "dom", "space", "want"),
    [
        (ADD, SELF, GRANTS, E.EACCES),
        (ADD, 7, abi.XENMAPSPACE_shared_info, E.EACCES),
        (ADD, 9, GRANTS, E.ESRCH),
        (ADD, SELF, abi.XENMAPSPACE_gmfn_foreign, E.ENOSYS),
        (BATCH, SELF, GRANTS, E.EACCES),
        (BATCH, SELF, abi.XENMAPSPACE_gmfn_range, E.EOPNOTSUPP),
        (BATCH, 9, GRANTS, E.ESRCH),
        (REMOVE, SELF, 0, E.EACCES),
        (REMOVE, 9, 0, E.ESRCH),
    ],
)
def test_refused(command: int, dom: int, space: int, want: int) -> None:
    rig = Rig().boot()
    head = struct.pack("<HH", dom, space) if command == BATCH else struct.pack("<HxxI", dom, space)
    rig.put(AT, head + bytes(32))
    assert code_of(memory_op, rig.domain, command, AT, 0, 0, 0, 0) == want
    rig.unmap(40)
    assert code_of(memory_op, rig.domain, command, AT, 0, 0, 0, 0) == E.EFAULT
    if command == REMOVE:
        assert code_of(memory_op, rig.domain, command | 1 << 6, AT, 0, 0, 0, 0) == E.EINVAL
    rig.check()
