"""Random sequences of grant operations by a guest that changes entries and page tables in between.

After each step the counts equal a recount, and the guest sees exactly the uses there are.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from grant_rig import APP, DEVICE, HOST, PERMIT, PTE, READING, READONLY, RO, WRITING, GrantRig
from pv_rig import PAGE, ROOT_L1, code_of

from hypervisor import abi
from hypervisor.errors import XenError
from hypervisor.grants.maptrack import Mapping
from hypervisor.grants.peer import WRITERS
from hypervisor.memory.frames import L1

REFS = (8, 8, 8, 9, 9, 2, 100_000)
FRAMES = (20, 20, 20, 21, 21, 5, ROOT_L1, 10_000)
ENTRY_FLAGS = (
    PERMIT,
    PERMIT,
    PERMIT,
    0,
    PERMIT | READONLY,
    PERMIT | abi.GTF_sub_page,
    abi.GTF_transitive,
    abi.GTF_accept_transfer,
)
MAP_FLAGS = (HOST, HOST | RO, HOST | PTE, HOST | DEVICE, DEVICE | RO, HOST | RO | PTE | APP, HOST | DEVICE | RO, RO)
SLOTS = range(50, 53)
KINDS = ("grant", "map", "map", "map", "unmap", "unmap", "replace", "copy", "plain", "pin", "version", "swap")

Step = tuple[str, int, int, int]


def steps(chance: random.Random, count: int) -> Iterator[Step]:
    """What the guest does; most grants are good ones, most mappings are found again."""
    pick = chance.choice
    for _ in range(count):
        kind = pick(
            ("grant", "map", "map", "map", "unmap", "unmap", "replace", "copy", "plain", "pin", "version", "swap")
        )
        if kind == "grant":
            yield kind, pick(REFS), pick(FRAMES), pick(ENTRY_FLAGS)
        elif kind == "map":
            yield kind, pick(REFS), pick(MAP_FLAGS), pick(SLOTS)
        elif kind == "copy":
            yield kind, pick(REFS), pick(REFS), chance.randint(1, 3)
        elif kind == "plain":
            yield kind, pick(SLOTS), pick(FRAMES), chance.randint(0, 1)
        elif kind == "pin":
            yield kind, pick(FRAMES), 0, 0
        elif kind == "version":
            yield kind, chance.randint(1, 2), 0, 0
        elif kind == "swap":
            yield kind, pick(REFS), pick(REFS), 0
        else:
            yield kind, chance.randint(0, 9), pick(SLOTS), pick(SLOTS) if kind == "replace" else chance.randint(1, 3)


def nth(rig: GrantRig, number: int) -> tuple[int, Mapping | None]:
    """A handle and its mapping: one in use, if there is any."""
    live = rig.grants.mapper.maptrack.items()
    return live[number % len(live)] if live else (number, None)


def address(flags: int, slot: int, rig: GrantRig) -> int:
    return rig.mpa(ROOT_L1, slot * 8) if flags & PTE else slot * PAGE


def play(rig: GrantRig, step: Step) -> None:
    kind, a, b, c = step
    if kind == "grant":
        if a < rig.grants.table.entries:
            # A guest that knows the rules leaves the two bits alone; in version 2 they are not in the entry.
            used = rig.flags(a) if rig.grants.table.version == 1 else 0
            rig.grant_mfn(a, rig.mfn(b), c | used)
    elif kind == "map":
        rig.map(a, b, address(b, c, rig))
    elif kind == "unmap":
        handle, mapping = nth(rig, a)
        host = address(mapping.flags if mapping else 0, b, rig) if c & 1 else 0
        rig.unmap(handle, host, mapping.mfn << 12 if mapping and c & 2 else 0)
    elif kind == "replace":
        rig.replace(nth(rig, a)[0], c * PAGE, b * PAGE)
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


@pytest.mark.parametrize("seed", range(25))
def test_counts_stay_true(seed: int) -> None:
    rig = GrantRig().start()
    for ref, frame in ((8, 20), (9, 21)):
        rig.unmap_va(frame * PAGE)
        rig.grant(ref, frame)
    for step in steps(random.Random(seed), 150):
        play(rig, step)
        check_uses(rig)
    rig.check_after_release()
    check_uses(rig)
