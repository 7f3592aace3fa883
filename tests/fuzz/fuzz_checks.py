"""What must hold whatever a guest does, found out without the code that is to ensure it."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypervisor.engines import x86
from hypervisor.memory.frames import L1, L4, SEGDESC, WRITABLE

POISON = 0x0000_8F00_0000_0099
"""No entry of a page table and no descriptor may have this value, so that one which has it was written by the guest
itself: present with the cache bits and PSE set; a system descriptor of a type that is not allowed."""

_ADDR = np.uint64(x86.PTE_ADDR)
_P, _RW = np.uint64(x86.PTE_P), np.uint64(x86.PTE_RW)


def reachable_faults(domain: Any) -> list[str]:
    """What a hardware walk from a validated root reaches although it must not."""
    frames = domain.frames
    kind, count = frames.kind_np, frames.count_np
    table = domain.memory.array.reshape(-1, 512)
    at = np.flatnonzero((kind == L4) & (count != 0))
    found: list[str] = []
    for root in at.tolist():
        for slot in range(256, 272):
            if int(table[root, slot]) & ~0x60 != domain.area.slots.get(slot, 0) & ~0x60:
                found.append(f"L4 {root:#x}: Xen's slot {slot} is {int(table[root, slot]):#x}")
    for level in (4, 3, 2, 1):
        entries = table[at]
        if level == 4:
            entries = entries.copy()
            entries[:, 256:272] = 0
        entries = entries[(entries & _P) != 0]
        targets = ((entries & _ADDR) >> np.uint64(12)).astype(np.int64) - domain.config.base_mfn
        inside = (targets >= 0) & (targets < frames.size)
        for entry in entries[~inside].tolist():
            if level > 1 or entry not in domain.tables.foreign:
                found.append(f"an L{level} entry {entry:#x} leads out of the domain")
        entries, targets = entries[inside], targets[inside]
        for entry in entries[frames.refs_np[targets] == 0].tolist():
            found.append(f"an L{level} entry {entry:#x} maps a frame that is not the domain's")
        if level > 1:
            if (entries & np.uint64(x86.PTE_PSE)).any():
                found.append(f"a superpage in an L{level}")
            at = np.unique(targets)
            wrong = at[(kind[at] != level - 1) | (count[at] == 0)]
            found += [f"frame {index:#x} is used as L{level - 1}, but is {kind[index]}" for index in wrong.tolist()]
        else:
            writable = targets[(entries & _RW) != 0]
            wrong = np.unique(writable[(kind[writable] != WRITABLE) | (count[writable] == 0)])
            found += [f"frame {index:#x} of type {kind[index]} is mapped writable" for index in wrong.tolist()]
    return found


def poison_faults(domain: Any) -> list[str]:
    """Typed frames that the guest wrote itself; afterwards there is no poison in any frame."""
    frames = domain.frames
    table = domain.memory.array.reshape(-1, 512)[: frames.ram]
    kind = frames.kind_np[: frames.ram]
    typed = (kind >= L1) & (kind <= SEGDESC) & (frames.count_np[: frames.ram] != 0)
    rows, slots = np.nonzero(table == np.uint64(POISON))
    found = [
        f"the guest wrote slot {slot} of frame {row:#x}, which is of type {kind[row]}"
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True)
        if typed[row]
    ]
    table[rows, slots] = 0
    return found


def faults(domain: Any) -> list[str]:
    return domain.recount() + reachable_faults(domain) + poison_faults(domain)
