"""A domain with a mapped grant table, and ways to call grant_table_op as its guest does."""

from __future__ import annotations

import mmap
import struct
from typing import Any

from pv_rig import PAGE, ROOT_L1, RW, Rig

from hypervisor import abi
from hypervisor.engines.x86 import PTE_NX
from hypervisor.errors import XenError
from hypervisor.grants.peer import GrantError, Window
from hypervisor.hypercalls.grants import grant_table_op
from hypervisor.hypercalls.registry import Continuation

DOMID = 7
ARGUMENT = 40 * PAGE
LIST = 41 * PAGE
TABLE_VA = 60 * PAGE
"""Where the guest maps its first grant frame."""

PERMIT, READONLY = abi.GTF_permit_access, abi.GTF_readonly
READING, WRITING = abi.GTF_reading, abi.GTF_writing
HOST, DEVICE, RO = abi.GNTMAP_host_map, abi.GNTMAP_device_map, abi.GNTMAP_readonly
PTE, APP = abi.GNTMAP_contains_pte, abi.GNTMAP_application_map


class GrantRig(Rig):
    """Frames 20..29 are free for grants; the pages of linear addresses 50*PAGE.. are free to map over."""

    def start(self, version: int = 1) -> GrantRig:
        self.boot()
        self.grants = self.domain.grants
        if version == 2:
            self.grants.set_version(2)
        return self

    # -- the guest's side of its table

    def grant(self, ref: int, index: int, flags: int = PERMIT, domid: int = DOMID, **parts: int) -> int:
        """Write a shared entry for the domain's frame `index`; the reference."""
        return self.grant_mfn(ref, self.mfn(index), flags, domid, **parts)

    def grant_mfn(
        self, ref: int, mfn: int, flags: int = PERMIT, domid: int = DOMID, start: int = 0, length: int = 0
    ) -> int:
        table = self.grants.table
        if table.version == 1:
            at = table.frames[ref // 512] * PAGE + ref % 512 * 8
            self.put(at, struct.pack("<HHI", flags, domid, mfn & 0xFFFF_FFFF))
        else:
            at = table.frames[ref // 256] * PAGE + ref % 256 * 16
            self.put(at, struct.pack("<HHHHQ", flags, domid, start, length, mfn))
        return ref

    def flags(self, ref: int) -> int:
        """What of GTF_reading and GTF_writing the guest sees."""
        table = self.grants.table
        if table.version == 1:
            at = table.frames[ref // 512] * PAGE + ref % 512 * 8
        else:
            at = table.status_frames[ref // 2048] * PAGE + ref % 2048 * 2
        return int(struct.unpack("<H", self.get(at, 2))[0]) & (READING | WRITING)

    # -- calls

    def call(self, command: int, data: bytes, count: int, at: int = ARGUMENT) -> int:
        """The hypercall's result; the argument is written before, and runs on through continuations."""
        self.put(at, data)
        arguments = (command, at, count)
        self.calls = 0
        while True:
            self.calls += 1
            try:
                return grant_table_op(self.domain, *arguments, 0, 0, 0)
            except Continuation as exc:
                arguments = (exc.arguments[0], exc.arguments[1], exc.arguments[2])
            except XenError as exc:
                return -exc.errno

    def map(self, ref: int, flags: int = HOST, host: int = 50 * PAGE, domid: int = DOMID) -> tuple[int, int, int]:
        """(status, handle, dev_bus_addr)."""
        data = struct.pack("<QIIHhIQ", host, flags, ref, domid, 99, 0xAAAA, 0xBBBB)
        assert self.call(abi.GNTTABOP_map_grant_ref, data, 1) == 0
        status, handle, bus = struct.unpack("<hIQ", self.get(ARGUMENT + 18, 14))
        return status, handle, bus

    def unmap(self, handle: int, host: int = 50 * PAGE, bus: int = 0) -> int:
        assert self.call(abi.GNTTABOP_unmap_grant_ref, struct.pack("<QQIhxx", host, bus, handle, 99), 1) == 0
        return self.status(20)

    def replace(self, handle: int, new: int, host: int = 50 * PAGE) -> int:
        assert self.call(abi.GNTTABOP_unmap_and_replace, struct.pack("<QQIhxx", host, new, handle, 99), 1) == 0
        return self.status(20)

    def status(self, offset: int) -> int:
        return int(struct.unpack("<h", self.get(ARGUMENT + offset, 2))[0])

    def copy(self, source: tuple[int, int, int], target: tuple[int, int, int], size: int, grants: int = 0) -> int:
        """:param source: (grant or frame number, domid, offset)."""
        assert self.call(abi.GNTTABOP_copy, copy_item(source, target, size, grants), 1) == 0
        return self.status(36)

    def entry(self, va: int) -> int:
        """The L1 entry of a linear address."""
        return self.word(ROOT_L1, va // PAGE)

    def set_entry(self, va: int, value: int) -> None:
        self.tables.update_l1(ROOT_L1 * 512 + va // PAGE, value)

    def unmap_va(self, va: int) -> None:
        self.set_entry(va, 0)

    def check_after_release(self) -> None:
        self.grants.release()
        assert len(self.grants.own) == 0 and len(self.grants.mapper.maptrack) == 0
        self.check()

    def map_plain(self, va: int, index: int, flags: int = RW) -> None:
        self.set_entry(va, self.pte(index, flags | PTE_NX))


def copy_item(source: tuple[int, int, int], target: tuple[int, int, int], size: int, grants: int) -> bytes:
    one = struct.pack("<QHHxxxx", *source) + struct.pack("<QHHxxxx", *target)
    return one + struct.pack("<HHhxx", size, grants, 99)


class FakePeer:
    """Another domain: its frames are numbered from `BASE` on, its grants are what a test puts into `grants`."""

    BASE = 0x90000

    def __init__(self, domid: int) -> None:
        self._domid = domid
        self.memory = mmap.mmap(-1, 4 * PAGE)
        self.grants: dict[int, Window] = {}
        self.log: list[tuple[Any, ...]] = []
        self.pins = self.copies = 0
        self.holds: dict[tuple[int, bool], int] = {}

    @property
    def domid(self) -> int:
        return self._domid

    def offer(self, ref: int, frame: int, start: int = 0, length: int = PAGE) -> int:
        self.grants[ref] = Window(self.BASE + frame, start, length, self)
        return ref

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        if ref not in self.grants:
            raise GrantError(abi.GNTST_bad_gntref)
        self.pins += increment
        return self.grants[ref].mfn

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        self.pins -= increment

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        if ref not in self.grants:
            raise GrantError(abi.GNTST_bad_gntref)
        self.log.append((ref, mapper, readonly, transitive))
        self.copies += 1
        self.hold(self.grants[ref].mfn, writable=False)
        return self.grants[ref]

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        self.copies -= 1

    def hold(self, mfn: int, *, writable: bool) -> None:
        self.holds[mfn, writable] = self.holds.get((mfn, writable), 0) + 1

    def drop(self, mfn: int, *, writable: bool) -> None:
        self.holds[mfn, writable] -= 1

    def page(self, mfn: int) -> memoryview:
        at = (mfn - self.BASE) * PAGE
        return memoryview(self.memory)[at : at + PAGE]

    @property
    def clean(self) -> bool:
        return not self.pins and not self.copies and not any(self.holds.values())
