"""Owner, type and counts of every frame of a domain.

Xen's rule (xen/arch/x86/include/asm/mm.h): a frame has at most one *type* at a
time while anything uses it as that type, so nothing that is a page table or a
descriptor page can be writable for the guest at the same moment.

* ``refs`` counts every use, the domain's ownership included; 0 means the
  frame is not given to the domain (ballooned out, or one of Xen's own).
* ``holding`` says of a RAM frame whether the domain's ownership is one of
  those uses: a frame that was given back while in use stays the domain's
  until its last use goes (`hypervisor.memory.reservation`).
* ``count`` counts uses as ``kind``.
* ``stamp`` is the TLB flush epoch in which a frame lost its last writable
  mapping: until a flush since, a stale translation may still allow writes.
* ``executed`` remembers that a mapping without NX ever existed, so that
  translated code may exist for the frame.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

NONE, L1, L2, L3, L4, SEGDESC, WRITABLE, L2_XEN = range(8)
FREE, HELD, LEFT, STOLEN = range(4)
"""``holding``: in nobody's hands; the domain's; given back, but with uses left (or not swept up yet); set aside."""
KIND_NAMES = ("none", "l1", "l2", "l3", "l4", "segment descriptors", "writable", "l2 with slots of xen's")


class FrameTable:
    """See the module. Scalar access goes through memoryviews (45 ns), bulk access through numpy."""

    __slots__ = (
        "count",
        "count_np",
        "executed",
        "executed_np",
        "holding",
        "holding_np",
        "kind",
        "kind_np",
        "pinned",
        "ram",
        "refs",
        "refs_np",
        "size",
        "stamp",
        "stamp_np",
    )

    def __init__(self, size: int, ram: int, populated: int) -> None:
        """:param size: all frames; `ram` of them can belong to the guest and the first `populated` do now."""
        self.size = size
        self.ram = ram
        self.kind_np = np.zeros(size, dtype=np.uint8)
        self.count_np = np.zeros(size, dtype=np.uint32)
        self.refs_np = np.zeros(size, dtype=np.uint32)
        self.stamp_np = np.zeros(size, dtype=np.uint64)
        self.executed_np = np.zeros(size, dtype=np.uint8)
        self.holding_np = np.zeros(ram, dtype=np.uint8)
        self.pinned = bytearray(size)
        self.refs_np[:populated] = 1
        self.holding_np[:populated] = HELD
        self._make_views()

    def _make_views(self) -> None:
        self.kind: Any = self.kind_np.data
        self.count: Any = self.count_np.data
        self.refs: Any = self.refs_np.data
        self.stamp: Any = self.stamp_np.data
        self.executed: Any = self.executed_np.data
        self.holding: Any = self.holding_np.data

    def share(self, index: int, *, writable: bool) -> None:
        """Let the guest map one of Xen's frames (shared_info, a grant frame)."""
        self.refs[index] = 1
        if writable:
            self.kind[index] = WRITABLE
            self.count[index] = 1
        else:
            # Held as descriptors by nobody: any type that is not WRITABLE refuses writable mappings.
            self.kind[index] = SEGDESC
            self.count[index] = 1

    def unshare(self, index: int) -> bool:
        """Take it back; False when the guest still maps it."""
        if self.refs[index] != 1:
            return False
        self.refs[index] = self.count[index] = 0
        return True

    def owned(self, index: int) -> bool:
        return 0 <= index < self.size and self.refs[index] != 0

    def pages(self) -> int:
        """RAM frames the domain has now."""
        return int(np.count_nonzero(self.refs_np[: self.ram]))

    def free_frames(self, wanted: int, end: int) -> list[int]:
        """Up to `wanted` RAM frames below `end` that nobody has."""
        return [int(i) for i in np.flatnonzero(self.holding_np[:end] == FREE)[:wanted]]

    def free_blocks(self, wanted: int, end: int, size: int, first: int) -> list[int]:
        """The first frames of up to `wanted` blocks of `size` free frames, at `first` + a multiple of `size`."""
        free = self.holding_np[first:end] == FREE
        blocks = free[: len(free) // size * size].reshape(-1, size).all(axis=1)
        return [first + int(i) * size for i in np.flatnonzero(blocks)[:wanted]]

    def unused(self) -> list[int]:
        """Frames given back whose last use has gone since."""
        return [int(i) for i in np.flatnonzero((self.holding_np == LEFT) & (self.refs_np[: self.ram] == 0))]

    # -- save and restore

    def save(self) -> dict[str, Any]:
        def pack(array: np.ndarray[Any, Any]) -> bytes:
            return zlib.compress(array.tobytes(), 1)

        return {
            "size": self.size,
            "ram": self.ram,
            "kind": pack(self.kind_np),
            "count": pack(self.count_np),
            "refs": pack(self.refs_np),
            "executed": pack(self.executed_np),
            "holding": pack(self.holding_np),
            "pinned": zlib.compress(bytes(self.pinned), 1),
        }

    _RAW = ("kind_np", "count_np", "refs_np", "executed_np", "holding_np")

    def raw(self) -> bytes:
        """All of it but the stamps, as it lies in memory: for a host of the same build."""
        return b"".join([*(getattr(self, name).tobytes() for name in self._RAW), bytes(self.pinned)])

    @property
    def raw_bytes(self) -> int:
        """How long `raw` is."""
        return sum(int(getattr(self, name).nbytes) for name in self._RAW) + self.size

    def load_raw(self, data: bytes) -> None:
        """Become what `raw` gave, in place. :raises ValueError: it is not of a domain of this size, or impossible."""
        arrays = [getattr(self, name) for name in self._RAW]
        if len(data) != self.raw_bytes:
            raise ValueError(f"frame table of {len(data)} bytes, not one of {self.ram} frames and {self.size} in all")
        parts, at = [], 0
        for array in arrays:
            parts.append(np.frombuffer(data, dtype=array.dtype, count=array.size, offset=at))
            at += array.nbytes
        kind, count, refs, executed, holding = parts
        pinned = np.frombuffer(data, dtype=np.uint8, offset=at)
        most = max(int(count.max()), int(refs.max()))
        if kind.max() > L2_XEN or holding.max() > STOLEN or most >= 1 << 31 or max(executed.max(), pinned.max()) > 1:
            raise ValueError("frame table with kinds or counts that there are not")
        for array, part in zip(arrays, parts, strict=True):
            array[:] = part
        self.stamp_np[:] = 0
        self.pinned[:] = pinned.tobytes()

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` gave, in place. :raises ValueError: it is of a domain of another size."""
        saved = FrameTable.restore(state)
        if (saved.size, saved.ram) != (self.size, self.ram):
            raise ValueError(
                f"frame table of {saved.ram} frames and {saved.size} in all, not {self.ram} and {self.size}"
            )
        for name in ("kind_np", "count_np", "refs_np", "executed_np", "holding_np", "stamp_np"):
            getattr(self, name)[:] = getattr(saved, name)
        self.pinned[:] = saved.pinned

    @classmethod
    def restore(cls, state: dict[str, Any]) -> FrameTable:
        table = cls(state["size"], state["ram"], 0)

        def unpack(name: str, dtype: Any, size: int = table.size) -> np.ndarray[Any, Any]:
            array = np.frombuffer(zlib.decompress(state[name]), dtype=dtype).copy()
            if array.size != size:
                raise ValueError(f"frame table: {name} has {array.size} entries, not {size}")
            return array

        table.kind_np = unpack("kind", np.uint8)
        table.count_np = unpack("count", np.uint32)
        table.refs_np = unpack("refs", np.uint32)
        table.executed_np = unpack("executed", np.uint8)
        table.holding_np = unpack("holding", np.uint8, table.ram)
        table.pinned = bytearray(zlib.decompress(state["pinned"]))
        table._make_views()
        return table
