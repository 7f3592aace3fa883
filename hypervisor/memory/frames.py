"""Owner, type and counts of every frame of a domain.

Xen's rule (xen/arch/x86/include/asm/mm.h): a frame has at most one *type* at a
time while anything uses it as that type, so nothing that is a page table or a
descriptor page can be writable for the guest at the same moment.

* ``refs`` counts every use, the domain's ownership included; 0 means the
  frame is not given to the domain (ballooned out, or one of Xen's own).
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
KIND_NAMES = ("none", "l1", "l2", "l3", "l4", "segment descriptors", "writable", "l2 with slots of xen's")


class FrameTable:
    """See the module. Scalar access goes through memoryviews (45 ns), bulk access through numpy."""

    __slots__ = (
        "count",
        "count_np",
        "executed",
        "executed_np",
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
        self.pinned = bytearray(size)
        self.refs_np[:populated] = 1
        self._make_views()

    def _make_views(self) -> None:
        self.kind: Any = self.kind_np.data
        self.count: Any = self.count_np.data
        self.refs: Any = self.refs_np.data
        self.stamp: Any = self.stamp_np.data
        self.executed: Any = self.executed_np.data

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

    def free_frames(self, wanted: int) -> list[int]:
        """Up to `wanted` RAM frames that the domain does not have and nothing maps."""
        return [int(i) for i in np.flatnonzero(self.refs_np[: self.ram] == 0)[:wanted]]

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
            "pinned": zlib.compress(bytes(self.pinned), 1),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> FrameTable:
        table = cls(state["size"], state["ram"], 0)

        def unpack(name: str, dtype: Any) -> np.ndarray[Any, Any]:
            array = np.frombuffer(zlib.decompress(state[name]), dtype=dtype).copy()
            if array.size != table.size:
                raise ValueError(f"frame table: {name} has {array.size} entries, not {table.size}")
            return array

        table.kind_np = unpack("kind", np.uint8)
        table.count_np = unpack("count", np.uint32)
        table.refs_np = unpack("refs", np.uint32)
        table.executed_np = unpack("executed", np.uint8)
        table.pinned = bytearray(zlib.decompress(state["pinned"]))
        table._make_views()
        return table
