"""A domain on an engine whose TLB forgets nothing.

`GreedyEngine` behaves as the worst processor that is allowed: right before anything may change, every translation
that a walk from the root in force yields is cached, and it stays until the whole TLB is flushed.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from pv_rig import PAGE, FakeEngine, Peers, Rig
from pv_rig32 import FakeEngine32, Rig32

from hypervisor import abi
from hypervisor.domain import Domain, MachineConfig
from hypervisor.engines import x86
from hypervisor.hypercalls import dispatch  # noqa: F401  the families register themselves
from hypervisor.memory import layout
from hypervisor.memory.frames import L1, L2, L2_XEN, L3, L4, LEFT, NONE, SEGDESC, WRITABLE
from hypervisor.memory.recount import recount
from hypervisor.memory.xenarea32 import FIRST_XEN_L2_SLOT

PAGES = 28
ARGUMENTS = 6
"""Page with the arguments of hypercalls; it stays writable."""
CODE = 7
FIRST = 8
DOMID = 7
PEER, PEER_BASE, PEER_PAGES = 8, 0x40000, 8
"""A second domain, which grants."""
TYPED = frozenset((L1, L2, L3, L4, SEGDESC, L2_XEN))
_ADDR, _P, _RW = np.uint64(x86.PTE_ADDR), np.uint64(x86.PTE_P), np.uint64(x86.PTE_RW)


class GreedyEngine(FakeEngine):
    """:ivar writable: frames that a cached translation may write; `readable` those it may read."""

    def __init__(self) -> None:
        super().__init__()
        self.domain: Any = None
        self.writable: set[int] = set()
        self.readable: set[int] = set()
        self.peer: Any = None
        self.foreign: set[tuple[int, bool]] = set()
        self.waiting: set[int] = set()

    def load_cr3(self, mpa: int) -> None:
        super().load_cr3(mpa)
        self._forget()

    def flush_all(self) -> None:
        super().flush_all()
        self._forget()

    def _forget(self) -> None:
        self.writable.clear()
        self.readable.clear()
        self.foreign.clear()
        self.waiting.clear()

    def walk_all(self) -> None:
        """Cache everything that the tables in force map."""
        domain = self.domain
        table, base, kind = domain.memory.array.reshape(-1, 512), domain.config.base_mfn, domain.frames.kind_np
        narrow = domain.config.bits == 32
        root = domain.area.guest_root(domain.running.id) if narrow else self.regs.cr3 >> 12
        at, allows = np.array([root - base]), np.array([True])
        for level in (3, 2, 1) if narrow else (4, 3, 2, 1):
            entries = table[at].copy()
            # What is Xen's in a table, at whatever level a linear entry shows it, is no business of this check.
            entries[kind[at] == L4, 256:272] = 0
            entries[kind[at] == L2_XEN, FIRST_XEN_L2_SLOT:] = 0
            if narrow and level == 3:
                entries[:, 4:] = 0
            rows, slots = np.nonzero(entries & _P)
            entries = entries[rows, slots]
            writes = allows[rows] & ((entries & _RW) != 0)
            targets = ((entries & _ADDR) >> np.uint64(12)).astype(np.int64) - base
            inside = (targets >= 0) & (targets < domain.frames.size)
            for entry, write in zip(entries[~inside].tolist(), writes[~inside].tolist(), strict=True):
                self.foreign.add(((entry & x86.PTE_ADDR) >> 12, write))
            targets, writes = targets[inside], writes[inside]
            if level > 1:
                both = np.unique(targets * 2 + writes)
                at, allows = both >> 1, (both & 1) != 0
            else:
                self.readable.update(targets.tolist())
                self.writable.update(targets[writes].tolist())

    def faults(self) -> list[str]:
        """Frames that a stale translation reaches although it must not."""
        frames = self.domain.frames
        found: list[str] = []
        for index in self.readable:
            if index < frames.ram and frames.holding[index] == LEFT and not frames.refs[index]:
                # Given back, with its contents as they were: it must not become anybody's before a flush.
                self.waiting.add(index)
            elif index in self.waiting or not frames.refs[index]:
                found.append(f"a stale translation reads frame {index:#x}, given back")
        for index in self.writable:
            if frames.count[index] and frames.kind[index] in TYPED:
                found.append(f"a stale translation writes frame {index:#x} of type {frames.kind[index]}")
        frames = self.peer.frames
        for mfn, writable in self.foreign:
            index = mfn - PEER_BASE
            if not 0 <= index < PEER_PAGES or frames.refs[index] < 2:
                found.append(f"a stale translation reaches the granter's frame {index:#x} after the grant")
            elif writable and (frames.kind[index] != WRITABLE or not frames.count[index]):
                found.append(f"a stale translation writes the granter's frame {index:#x} of type {frames.kind[index]}")
        return found


class GreedyEngine32(GreedyEngine, FakeEngine32):
    """The same for a 32-bit domain."""


class _Greedy:
    """What both rigs do once they are made."""

    def become_greedy(self, kind: type[GreedyEngine]) -> None:
        rig: Any = self
        # The domain holds its engine in many places: it becomes a greedy one where it is.
        fresh = kind()
        rig.engine.__class__ = kind
        rig.engine.__dict__.update({k: v for k, v in fresh.__dict__.items() if k not in rig.engine.__dict__})
        rig.engine.domain = rig.domain
        rig.boot()
        rig.peer = rig.engine.peer = self._make_peer()
        rig.domain.vm_assist |= 1 << abi.VMASST_TYPE_writable_pagetables

    def _make_peer(self) -> Domain:
        rig: Any = self
        config = MachineConfig(
            "00000000-0000-0000-0000-000000000002", "peer", PEER, PEER_BASE, PEER_PAGES, PEER_PAGES, tsc_khz=2_000_000
        )
        mapping = mmap.mmap(-1, layout.total_frames(PEER_PAGES) * PAGE)
        peer = Domain(config, mapping, FakeEngine(), Peers(), lambda _number, _port: None)
        rig.domain.grants.find_peer = lambda domid: peer.grants.own if domid == PEER else None
        peer.grants.find_peer = lambda domid: rig.domain.grants.own if domid == DOMID else None
        return peer

    def peer_faults(self) -> list[str]:
        """The granter's counts, with what the grantee's mappings make of them."""
        rig: Any = self
        holds: list[tuple[int, int]] = []
        for (mfn, writable), (_, count) in rig.domain.tables.foreign._uses.items():
            holds += [(mfn - PEER_BASE, WRITABLE if writable else NONE)] * count
        for _, mapping in rig.domain.grants.mapper.maptrack.items():
            if mapping.domid == PEER and mapping.flags & abi.GNTMAP_device_map:
                readonly = mapping.flags & abi.GNTMAP_readonly
                holds.append((mapping.mfn - PEER_BASE, NONE if readonly else WRITABLE))
        return [f"granter: {fault}" for fault in recount(rig.peer.tables, holds)]


class TableRig(_Greedy, Rig):
    """A booted domain with few pages: random choices meet.

    :param linear: linear page tables are allowed.
    """

    def __init__(self, *, linear: bool = False) -> None:
        super().__init__(pages=PAGES, vcpus=2)
        self.domain.tables.linear.allowed = linear
        self.become_greedy(GreedyEngine)


class TableRig32(_Greedy, Rig32):
    """The same with a 32-bit domain; `linear` is allowed, and must change nothing."""

    def __init__(self, *, linear: bool = False) -> None:
        super().__init__(pages=PAGES, vcpus=2)
        self.domain.tables.linear.allowed = linear
        self.become_greedy(GreedyEngine32)
