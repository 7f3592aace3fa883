"""Is what the frame table counts what the page tables say? For tests and fuzzers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hypervisor.engines.x86 import PTE_ADDR
from hypervisor.memory.frames import HELD, L1, NONE
from hypervisor.memory.pagetables import PageTables


def recount(tables: PageTables, holds: Iterable[tuple[int, int]]) -> list[str]:
    """Differences between the counts and what the validated tables say; empty when all is well.

    :param holds: (frame, kind) of each use that no table shows: roots, descriptor tables, vcpu_info; NONE: as any.
    """
    frames = tables.frames
    count = np.frombuffer(bytes(frames.pinned), dtype=np.uint8).astype(np.int64)
    # Xen's own frames that the guest may map are held as what they are for as long as they are shared.
    count[frames.ram :] += frames.refs_np[frames.ram :] != 0
    refs = (frames.refs_np != 0).astype(np.int64)
    refs[: frames.ram] = (frames.holding_np == HELD) + count[: frames.ram]
    wrong: list[str] = []
    for index, kind in holds:
        refs[index] += 1
        if kind == NONE:
            continue
        count[index] += 1
        if frames.kind[index] != kind:
            wrong.append(f"frame {index:#x} is {frames.kind[index]}, held as {kind}")
    for index in np.flatnonzero(frames.count_np).tolist():
        kind = frames.kind[index]
        if kind not in tables.TABLES:
            continue
        for slot, entry in tables.present(index, kind):
            target = ((entry & PTE_ADDR) >> 12) - tables.base
            if not 0 <= target < frames.size or not frames.refs[target]:
                if kind != L1 or entry not in tables.foreign:
                    wrong.append(f"L{kind} {index:#x}[{slot}] maps {entry:#x}, which is not the domain's")
                continue
            if target == index and kind > L1:
                continue  # a linear entry to itself takes no reference
            refs[target] += 1
            wanted = tables.wanted(kind, slot, entry)
            if kind > L1 and frames.kind[target] == kind:
                wanted = kind
            if wanted != NONE:
                count[target] += 1
                if frames.kind[target] != wanted:
                    wrong.append(f"L{kind} {index:#x}[{slot}] uses {target:#x} as {wanted}")
    for name, have, want in (("count", frames.count_np, count), ("refs", frames.refs_np, refs)):
        for index in np.flatnonzero(have != want).tolist():
            wrong.append(f"frame {index:#x}: {name} {have[index]}, should be {want[index]}")
    return wrong
