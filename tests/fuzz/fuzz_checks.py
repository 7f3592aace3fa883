"""What must hold whatever a guest does, found out without the code that is to ensure it."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypervisor.engines import x86
from hypervisor.memory.frames import L1, L2, L2_XEN, L3, L4, NONE, WRITABLE
from hypervisor.memory.xenarea32 import FIRST_XEN_L2_SLOT

POISON = 0x0000_8F00_0000_0099
"""No entry of a page table and no descriptor may have this value, so that one which has it was written by the guest
itself: present with the cache bits and PSE set; a system descriptor of a type that is not allowed."""

_ADDR = np.uint64(x86.PTE_ADDR)
_P, _RW = np.uint64(x86.PTE_P), np.uint64(x86.PTE_RW)
_NO_AD = ~np.uint64(x86.PTE_A | x86.PTE_D)


def reachable_faults(domain: Any) -> list[str]:
    """What a hardware walk from a validated root could reach although it must not.

    Each validated table is looked at, for any of them may come under a root without being looked at again.
    """
    narrow = domain.config.bits == 32
    kind, count = domain.frames.kind_np, domain.frames.count_np
    words = domain.memory.array.reshape(-1, 512)
    found = _root_faults32(domain) if narrow else []
    for level in (L3, L2_XEN, L2, L1) if narrow else (L4, L3, L2, L1):
        at = np.flatnonzero((kind == level) & (count != 0))
        table = words[at].copy()
        found += _xen_faults(domain, level, at, table)
        rows, slots = np.nonzero(table & _P)
        entries = table[rows, slots]
        found += _entry_faults(domain, level, slots, entries)
    return found


def _xen_faults(domain: Any, level: int, at: np.ndarray[Any, Any], table: np.ndarray[Any, Any]) -> list[str]:
    """Xen's slots of these tables must be as Xen made them; they are taken out of the copy `table`."""
    narrow = domain.config.bits == 32
    if level == L3 and narrow:
        used = np.flatnonzero(table[:, 4:].any(axis=1))
        return [f"L3 {at[row]:#x} of four entries has more" for row in used.tolist()]
    first, last = (256, 272) if level == L4 else (FIRST_XEN_L2_SLOT, 512)
    if level not in (L4, L2_XEN):
        return []
    found = []
    for slot in range(first, last):
        wrong = np.flatnonzero(table[:, slot] & _NO_AD != np.uint64(domain.area.slots.get(slot, 0)) & _NO_AD)
        found += [f"table {at[row]:#x}: Xen's slot {slot} is {int(table[row, slot]):#x}" for row in wrong.tolist()]
    table[:, first:last] = 0
    return found


def _entry_faults(domain: Any, level: int, slots: np.ndarray[Any, Any], entries: np.ndarray[Any, Any]) -> list[str]:
    """Present entries of the guest's in tables of kind `level`."""
    frames = domain.frames
    kind, count = frames.kind_np, frames.count_np
    found: list[str] = []
    targets = ((entries & _ADDR) >> np.uint64(12)).astype(np.int64) - domain.config.base_mfn
    inside = (targets >= 0) & (targets < frames.size)
    for entry in entries[~inside].tolist():
        if level != L1 or entry not in domain.tables.foreign:
            found.append(f"an L{level} entry {entry:#x} leads out of the domain")
    entries, targets, slots = entries[inside], targets[inside], slots[inside]
    for entry in entries[frames.refs_np[targets] == 0].tolist():
        found.append(f"an L{level} entry {entry:#x} maps a frame that is not the domain's")
    if level == L1:
        writable = targets[(entries & _RW) != 0]
        wrong = np.unique(writable[(kind[writable] != WRITABLE) | (count[writable] == 0)])
        return found + [f"frame {index:#x} of type {kind[index]} is mapped writable" for index in wrong.tolist()]
    if (entries & np.uint64(x86.PTE_PSE)).any():
        found.append(f"a superpage in an L{level}")
    wanted = np.full(targets.shape, L1 if level == L2_XEN else level - 1)
    if level == L3 and domain.config.bits == 32:
        wanted[slots == 3] = L2_XEN
    good = kind[targets] == wanted
    if domain.tables.linear.allowed:
        # What a linear entry shows, it shows read-only, and all that lies below too.
        good |= (kind[targets] == level) & ((entries & _RW) == 0)
    wrong = np.unique(targets[~good | (count[targets] == 0)])
    return found + [f"frame {index:#x} is used by an L{level}, but is {kind[index]}" for index in wrong.tolist()]


def _root_faults32(domain: Any) -> list[str]:
    """The L4 tables that a 32-bit domain's vCPUs run on are Xen's own but for slot 0, which names an L3."""
    found = []
    for vcpu in domain.vcpus:
        mfn = domain.area.guest_root(vcpu.id)
        index = mfn - domain.config.base_mfn
        if mfn and not (0 <= index < domain.frames.ram and domain.frames.kind[index] == L3):
            found.append(f"vCPU {vcpu.id} runs on frame {mfn:#x}, which is no L3")
        at = domain.memory.index(domain.area.root(vcpu.id) >> 12)
        slots = np.flatnonzero(domain.memory.array[at * 512 : at * 512 + 512]).tolist()
        if not {*slots} <= {0, 260}:
            found.append(f"the L4 of vCPU {vcpu.id} has slots {slots}")
    return found


def poison_faults(domain: Any) -> list[str]:
    """Typed frames that the guest wrote itself; afterwards there is no poison in any frame."""
    frames = domain.frames
    table = domain.memory.array.reshape(-1, 512)[: frames.ram]
    kind = frames.kind_np[: frames.ram]
    typed = (kind != NONE) & (kind != WRITABLE) & (frames.count_np[: frames.ram] != 0)
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
