"""grant_table_op: decoding, batches, continuation, and what is the call's error and what an item's."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

_GRANTS = str(Path(__file__).resolve().parents[1] / "grants")
if _GRANTS not in sys.path:
    sys.path.insert(0, _GRANTS)

from grant_rig import ARGUMENT, DOMID, HOST, LIST, GrantRig, copy_item  # noqa: E402
from pv_rig import PAGE, E  # noqa: E402

from hypervisor import abi  # noqa: E402
from hypervisor.errors import XenError  # noqa: E402
from hypervisor.hypercalls.grants import BUDGET, grant_table_op  # noqa: E402
from hypervisor.hypercalls.registry import Continuation  # noqa: E402
from hypervisor.memory.xenarea import PERDOMAIN_START  # noqa: E402

BATCHES = (
    abi.GNTTABOP_map_grant_ref, abi.GNTTABOP_unmap_grant_ref, abi.GNTTABOP_unmap_and_replace, abi.GNTTABOP_transfer,
    abi.GNTTABOP_copy, abi.GNTTABOP_swap_grant_ref, abi.GNTTABOP_cache_flush,
)  # fmt: skip


@pytest.fixture
def rig() -> GrantRig:
    return GrantRig().start()


@pytest.mark.parametrize("command", [3, 13, 100, 0xFFF])
def test_unknown_operations(rig: GrantRig, command: int) -> None:
    """GNTTABOP_dump_table, 3, is one: Xen 4.17 has it no more."""
    assert rig.call(command, b"", 1) == -E.ENOSYS


@pytest.mark.parametrize("command", [*BATCHES, abi.GNTTABOP_setup_table, abi.GNTTABOP_get_version, 99])
def test_counts_and_commands_that_are_refused(rig: GrantRig, command: int) -> None:
    assert rig.call(command, b"", 1 << 31) == -E.EINVAL
    if command != abi.GNTTABOP_cache_flush:
        assert rig.call(command | 0x1000, b"", 1) == -E.EINVAL


@pytest.mark.parametrize("command", BATCHES)
def test_arrays_that_are_nowhere(rig: GrantRig, command: int) -> None:
    for address in (PERDOMAIN_START, 0xFFFF_8000_0000_0000, 1 << 47):
        for count in (0, 1):
            with pytest.raises(XenError) as info:
                grant_table_op(rig.domain, command, address, count, 0, 0, 0)
            assert info.value.errno == E.EFAULT
    want = -E.EOPNOTSUPP if command == abi.GNTTABOP_transfer else -E.EFAULT
    rig.unmap_va(39 * PAGE)
    assert rig.call(command, b"", 1, 39 * PAGE) == want
    if command != abi.GNTTABOP_transfer:
        assert rig.call(command, b"", 0) == 0


def test_transfer_is_off(rig: GrantRig) -> None:
    data = struct.pack("<QHxxIhxxxxxx", rig.mfn(20), 0, 8, 99)
    before = rig.snapshot()
    assert rig.call(abi.GNTTABOP_transfer, data, 1) == -E.EOPNOTSUPP
    assert rig.status(16) == 99 and rig.snapshot() == before


# -- the table


def setup(rig: GrantRig, frames: int, dom: int = abi.DOMID_SELF, at: int = LIST, count: int = 1) -> tuple[int, int]:
    data = struct.pack("<HxxIhxxxxxxQ", dom, frames, 99, at)
    return rig.call(abi.GNTTABOP_setup_table, data, count), rig.status(8)


@pytest.mark.parametrize("frames", [0, 1, 5, 64])
def test_setup_table(rig: GrantRig, frames: int) -> None:
    assert setup(rig, frames) == (0, 0)
    listed = struct.unpack(f"<{frames}Q", rig.get(LIST, 8 * frames))
    assert listed == tuple(rig.memory.mfn(index) for index in rig.grants.table.frames[:frames])
    assert len(rig.grants.table.frames) == max(frames, 1)
    for index in rig.grants.table.frames:
        rig.map_plain(50 * PAGE, index)
    rig.check()


def test_setup_table_refused(rig: GrantRig) -> None:
    assert setup(rig, 65) == (0, abi.GNTST_general_error)
    assert setup(rig, 0xFFFF_FFFF) == (0, abi.GNTST_general_error)
    assert setup(rig, 1, dom=5) == (0, abi.GNTST_bad_domain)
    assert setup(rig, 1, dom=0) == (0, abi.GNTST_permission_denied)
    assert setup(rig, 1, dom=DOMID) == (0, 0)
    assert setup(rig, 1, count=2)[0] == setup(rig, 1, count=0)[0] == -E.EINVAL
    assert setup(rig, 1, at=PERDOMAIN_START) == (-E.EFAULT, 99)
    rig.unmap_va(39 * PAGE)
    assert setup(rig, 1, at=39 * PAGE) == (0, abi.GNTST_bad_virt_addr)
    assert len(rig.grants.table.frames) == 1


def test_query_size(rig: GrantRig) -> None:
    def query(dom: int, count: int = 1) -> tuple[int, int, int, int]:
        result = rig.call(abi.GNTTABOP_query_size, struct.pack("<HxxIIhxx", dom, 98, 97, 99), count)
        return (result, *struct.unpack("<IIh", rig.get(ARGUMENT + 4, 10)))

    rig.grants.grow(3)
    assert query(abi.DOMID_SELF) == query(DOMID) == (0, 3, 64, 0)
    assert query(5) == (0, 98, 97, abi.GNTST_bad_domain)
    assert query(0) == (0, 98, 97, abi.GNTST_permission_denied)
    assert query(abi.DOMID_SELF, 0)[0] == -E.EINVAL


def test_versions(rig: GrantRig) -> None:
    def get(dom: int) -> tuple[int, int]:
        result = rig.call(abi.GNTTABOP_get_version, struct.pack("<HxxI", dom, 99), 1)
        return result, rig.u32(ARGUMENT + 4)

    assert get(abi.DOMID_SELF) == (0, 1)
    assert rig.call(abi.GNTTABOP_set_version, struct.pack("<I", 2), 77) == 0
    assert get(DOMID) == (0, 2)
    assert get(5) == (-E.ESRCH, 99) and get(0) == (-E.EPERM, 99)
    assert rig.call(abi.GNTTABOP_set_version, struct.pack("<I", 7), 1) == -E.EINVAL and rig.u32(ARGUMENT) == 2


def test_status_frames(rig: GrantRig) -> None:
    def status_frames(frames: int, dom: int = abi.DOMID_SELF, at: int = LIST, count: int = 1) -> tuple[int, int]:
        data = struct.pack("<IHhQ", frames, dom, 99, at)
        return rig.call(abi.GNTTABOP_get_status_frames, data, count), rig.status(6)

    assert status_frames(1) == (0, abi.GNTST_general_error), "version 1 has none"
    assert status_frames(0) == (0, 0)
    rig.grants.set_version(2)
    assert setup(rig, 9) == (0, 0)
    assert status_frames(2) == (0, 0)
    assert struct.unpack("<2Q", rig.get(LIST, 16)) == tuple(rig.memory.mfn(i) for i in rig.grants.table.status_frames)
    assert status_frames(3) == (0, abi.GNTST_general_error)
    assert status_frames(1, dom=5) == (0, abi.GNTST_bad_domain)
    assert status_frames(1, dom=0) == (0, abi.GNTST_permission_denied)
    assert status_frames(1, count=2)[0] == -E.EINVAL
    assert status_frames(1, at=PERDOMAIN_START)[0] == -E.EFAULT
    rig.unmap_va(39 * PAGE)
    assert status_frames(1, at=39 * PAGE) == (0, abi.GNTST_bad_virt_addr)


def test_swap(rig: GrantRig) -> None:
    rig.grant(8, 20)
    data = struct.pack("<IIhxx", 8, 9, 99) + struct.pack("<IIhxx", 8, 512, 99)
    assert rig.call(abi.GNTTABOP_swap_grant_ref, data, 2) == 0
    assert rig.status(8) == 0 and rig.status(20) == abi.GNTST_bad_gntref
    assert rig.grants.table.entry(9).frame == rig.mfn(20)


@pytest.mark.parametrize(
    ("page", "offset", "length", "operation", "want"),
    [
        (20, 0, PAGE, abi.GNTTAB_CACHE_CLEAN, 0),
        (20, 100, 8, abi.GNTTAB_CACHE_CLEAN | abi.GNTTAB_CACHE_INVAL, 0),
        (20, 0, PAGE, abi.GNTTAB_CACHE_INVAL, -E.EOPNOTSUPP),
        (20, PAGE, 0, abi.GNTTAB_CACHE_CLEAN, -E.EINVAL),
        (20, 1, PAGE, abi.GNTTAB_CACHE_CLEAN, -E.EINVAL),
        (20, 0, 65535, abi.GNTTAB_CACHE_CLEAN, -E.EINVAL),
        (20, 0, 8, abi.GNTTAB_CACHE_SOURCE_GREF, -E.EINVAL),
        (20, 0, 8, 4, -E.EINVAL),
        (1 << 40, 0, 0, abi.GNTTAB_CACHE_CLEAN, 0),
        (1 << 40, 0, 8, 0, 0),
        (1 << 40, 0, 8, abi.GNTTAB_CACHE_CLEAN, -E.EINVAL),
        (-0x10000, 0, 8, abi.GNTTAB_CACHE_CLEAN, -E.EINVAL),
    ],
)
def test_cache_flush(rig: GrantRig, page: int, offset: int, length: int, operation: int, want: int) -> None:
    address = (rig.mfn(0) + page) << 12 & (1 << 64) - 1
    assert rig.call(abi.GNTTABOP_cache_flush, struct.pack("<QHHI", address, offset, length, operation), 1) == want


# -- batches


def maps(rig: GrantRig, count: int, flags: int = abi.GNTMAP_device_map | abi.GNTMAP_readonly) -> bytes:
    return b"".join(struct.pack("<QIIHhIQ", 0, flags, 8 + n % 100, DOMID, 99, 0, 0) for n in range(count))


def test_a_long_batch_gives_way_and_goes_on(rig: GrantRig) -> None:
    for ref in range(8, 108):
        rig.grant(ref, 20)
    count = 2 * BUDGET + 3
    at = 30 * PAGE
    assert rig.call(abi.GNTTABOP_map_grant_ref, maps(rig, count), count, at) == 0
    assert rig.calls == 3
    results = [struct.unpack("<hI", rig.get(at + 32 * n + 18, 6)) for n in range(count)]
    assert [status for status, _ in results] == [0] * count and len({handle for _, handle in results}) == count
    rig.check()
    unmaps = b"".join(struct.pack("<QQIhxx", 0, rig.mpa(20), handle, 99) for _, handle in results)
    flushes = rig.engine.flushes
    assert rig.call(abi.GNTTABOP_unmap_grant_ref, unmaps, count, at) == 0
    assert rig.calls == 3 and rig.engine.flushes - flushes == -(-count // 32)
    assert all(struct.unpack("<h", rig.get(at + 24 * n + 20, 2)) == (0,) for n in range(count))
    assert len(rig.grants.own) == 0
    rig.check()


@pytest.mark.parametrize(
    ("command", "item", "done"),
    [
        (abi.GNTTABOP_map_grant_ref, struct.pack("<QIIHhIQ", 0, 1, 8, DOMID, 0, 0, 0), 1),
        (abi.GNTTABOP_unmap_grant_ref, struct.pack("<QQIhxx", 0, 0, 5, 0), 32),
        (abi.GNTTABOP_unmap_and_replace, struct.pack("<QQIhxx", 0, 0, 5, 0), 32),
        (abi.GNTTABOP_copy, copy_item((8, DOMID, 0), (8, DOMID, 0), 1, 3), 1),
        (abi.GNTTABOP_swap_grant_ref, struct.pack("<IIhxx", 8, 9, 0), 1),
        (abi.GNTTABOP_cache_flush, struct.pack("<QHHI", 0, 0, 0, 1), 1),
    ],
)
def test_who_waits_is_let_in_after_some_items(rig: GrantRig, command: int, item: bytes, done: int) -> None:
    """As much is always done before, and the arguments say where to go on, as Xen's continuations do."""
    rig.grant(8, 20)
    rig.put(ARGUMENT - 8 * PAGE, item * 40)
    rig.domain.preempt = True
    with pytest.raises(Continuation) as info:
        grant_table_op(rig.domain, command, ARGUMENT - 8 * PAGE, 40, 0, 0, 0)
    assert info.value.arguments == (command, ARGUMENT - 8 * PAGE + done * len(item), 40 - done)


def test_a_fault_after_some_items_leaves_them_done(rig: GrantRig) -> None:
    rig.grant(8, 20)
    rig.unmap_va(33 * PAGE)
    at = 33 * PAGE - 2 * 32
    assert rig.call(abi.GNTTABOP_map_grant_ref, maps(rig, 1) * 2, 3, at) == -E.EFAULT
    assert len(rig.grants.mapper.maptrack) == 2
    handles = [struct.unpack("<I", rig.get(at + 32 * n + 20, 4))[0] for n in range(2)]
    at = 33 * PAGE - 2 * 24
    data = b"".join(struct.pack("<QQIhxx", 0, rig.mpa(20), handle, 99) for handle in handles)
    assert rig.call(abi.GNTTABOP_unmap_grant_ref, data, 3, at) == -E.EFAULT
    assert len(rig.grants.mapper.maptrack) == 0 and len(rig.grants.own) == 0
    rig.check()


def test_one_handle_twice_in_a_batch(rig: GrantRig) -> None:
    rig.grant(8, 20)
    handle = rig.map(8)[1]
    data = struct.pack("<QQIhxx", 50 * PAGE, 0, handle, 99) * 2
    assert rig.call(abi.GNTTABOP_unmap_grant_ref, data, 2) == 0
    assert rig.status(20) == 0 and rig.status(44) == abi.GNTST_bad_handle
    rig.check()


def test_an_argument_in_the_frame_that_is_mapped_over(rig: GrantRig) -> None:
    """The answer cannot be written where the mapping put a read-only page; the mapping stays, as in Xen."""
    rig.grant(8, 20)
    data = struct.pack("<QIIHhIQ", ARGUMENT, HOST | abi.GNTMAP_readonly, 8, DOMID, 99, 0, 0)
    assert rig.call(abi.GNTTABOP_map_grant_ref, data, 1) == -E.EFAULT
    assert len(rig.grants.mapper.maptrack) == 1
    rig.check()
