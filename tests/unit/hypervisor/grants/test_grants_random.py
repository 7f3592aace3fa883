"""Random sequences of grant operations by a guest that changes entries and page tables in between.

After each step the counts equal a recount, and the guest sees exactly the uses there are.
"""

from __future__ import annotations

import contextlib

from grant_rig import APP, DEVICE, HOST, PERMIT, PTE, READING, READONLY, RO, WRITING, GrantRig
from hypothesis import given, settings
from hypothesis import strategies as st
from pv_rig import PAGE, ROOT, ROOT_L1, code_of

from hypervisor import abi
from hypervisor.errors import XenError
from hypervisor.grants.peer import WRITERS
from hypervisor.memory.frames import L1

REFS = (2, 8, 9, 511, 100_000)
FRAMES = (20, 21, ROOT, ROOT_L1, 5, 10_000)
ENTRY_FLAGS = (0, PERMIT, PERMIT | READONLY, PERMIT | abi.GTF_sub_page, abi.GTF_transitive, abi.GTF_accept_transfer)
SLOTS = range(50, 54)

refs, frames = st.sampled_from(REFS), st.sampled_from(FRAMES)
map_flags = st.sets(st.sampled_from((HOST, DEVICE, RO, PTE, APP))).map(sum)
slots = st.sampled_from(SLOTS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), refs, frames, st.sampled_from(ENTRY_FLAGS)),
        st.tuples(st.just("map"), refs, map_flags, slots),
        st.tuples(st.just("unmap"), st.integers(0, 5), slots, st.integers(0, 3)),
        st.tuples(st.just("replace"), st.integers(0, 5), slots, slots),
        st.tuples(st.just("copy"), refs, refs, st.integers(0, 3)),
        st.tuples(st.just("plain"), slots, frames, st.booleans()),
        st.tuples(st.just("pin"), frames, slots, slots),
        st.tuples(st.just("version"), st.integers(1, 2), slots, slots),
        st.tuples(st.just("swap"), refs, refs, slots),
    ),
    max_size=25,
)


def address(flags: int, slot: int, rig: GrantRig) -> int:
    return rig.mpa(ROOT_L1, slot * 8) if flags & PTE else slot * PAGE


def play(rig: GrantRig, step: tuple[object, ...]) -> None:
    kind, a, b, c = step
    assert isinstance(a, int) and isinstance(b, int) and isinstance(c, int)
    if kind == "grant":
        if a < rig.grants.table.entries:
            # A guest that knows the rules leaves the two bits alone; in version 2 they are not in the entry.
            used = rig.flags(a) if rig.grants.table.version == 1 else 0
            rig.grant_mfn(a, rig.mfn(b), c | used)
    elif kind == "map":
        rig.map(a, b, address(b, c, rig))
    elif kind == "unmap":
        host = 0 if c & 1 else b * PAGE
        mapping = dict(rig.grants.mapper.maptrack.items()).get(a)
        if host and mapping and mapping.flags & PTE:
            host = rig.mpa(ROOT_L1, b * 8)
        rig.unmap(a, host, mapping.mfn << 12 if mapping and c & 2 else 0)
    elif kind == "replace":
        rig.replace(a, c * PAGE, b * PAGE)
    elif kind == "copy":
        rig.copy((a, abi.DOMID_SELF, 0), (b, abi.DOMID_SELF, 8), 8, c)
    elif kind == "plain":
        with contextlib.suppress(XenError):
            rig.map_plain(a * PAGE, b) if c else rig.unmap_va(a * PAGE)
    elif kind == "pin" and a < 64:
        if code_of(rig.tables.pin, rig.mfn(a), L1):
            code_of(rig.tables.unpin, rig.mfn(a)) if a in (20, 21) else None
    elif kind == "version":
        code_of(rig.grants.set_version, a)
    elif kind == "swap":
        data = b"".join(n.to_bytes(4, "little") for n in (a, b, 0))
        rig.call(abi.GNTTABOP_swap_grant_ref, data, 1)


def check_uses(rig: GrantRig) -> None:
    rig.check()
    for ref in REFS:
        if ref < rig.grants.table.entries:
            pin = rig.grants.own.pin_of(ref)
            want = (READING if pin else 0) | (WRITING if pin & WRITERS else 0)
            assert rig.flags(ref) == want, f"grant {ref}: {rig.flags(ref)}, used {pin:#x}"


@settings(max_examples=150, deadline=None)
@given(steps)
def test_counts_stay_true(script: list[tuple[object, ...]]) -> None:
    rig = GrantRig(48 + 16).start()
    for frame in (20, 21):
        rig.unmap_va(frame * PAGE)
    for step in script:
        play(rig, step)
        check_uses(rig)
    rig.check_after_release()
    check_uses(rig)
