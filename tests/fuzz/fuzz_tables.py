"""Random steps that change types, counts or mappings of a domain, for the page-table fuzzer."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable

import fuzz_checks
from fuzz_greedy import ARGUMENTS, CODE, DOMID, FIRST, PAGES, PEER, PEER_BASE, PEER_PAGES, TYPED, TableRig
from pv_rig import BASE, NX, PAGE, RO, ROOT, ROOT_L1, RW

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls import dispatch  # noqa: F401  the families register themselves
from hypervisor.hypercalls.registry import REGISTRY, Continuation
from hypervisor.memory.frames import L1

# Writes to memory at (%rdi) with %rax, and what they need besides: mov, xchg, lock cmpxchg %rcx, lock or, lock and,
# mov of 1, 2 and 4 bytes, stosq, lock cmpxchg16b, lock btr $1, lock bts $1.
STORES = (
    b"\x48\x89\x07", b"\x48\x87\x07", b"\xf0\x48\x0f\xb1\x0f", b"\xf0\x48\x09\x07", b"\xf0\x48\x21\x07",
    b"\x88\x07", b"\x66\x89\x07", b"\x89\x07", b"\x48\xab", b"\xf0\x48\x0f\xc7\x0f",
    b"\xf0\x48\x0f\xba\x37\x01", b"\xf0\x48\x0f\xba\x2f\x01",
)  # fmt: skip


class Steps:
    """Everything that changes types, counts or mappings, one step at a time, by hypercalls and by direct writes."""

    FLAGS = (RW, RW, RO, RO, RO | NX, RW | NX, x86.PTE_P, x86.PTE_P | x86.PTE_RW, RW | 1 << 9, RW | 0x80)
    SLOTS = (0, 0, 1, 1, 2, 3, 8, 12, 255, 256, 260, 272, 511)

    def __init__(self, rig: TableRig, rng: random.Random) -> None:
        self.rig = rig
        self.rng = rng
        self.done: list[str] = []
        self.mapped: dict[int, tuple[int, int]] = {}
        self.makers: tuple[Callable[[], None], ...] = (
            *[self.mmu_update, self.update_va, self.mmuext, self.direct] * 4,
            *[self.fill, self.memory_op, self.grant, self.grant, self.table] * 2,
            *[self.gdt, self.ldt, self.descriptor, self.vcpu_info, self.fifo, self.multicall, self.granter],
        )

    def step(self) -> list[str]:
        """One step, and what is wrong after it."""
        rig = self.rig
        rig.engine.walk_all()
        self.rng.choice(self.makers)()
        # A guest whose own arguments or code are not there any more would go on elsewhere: so does this.
        found = (
            rig.domain.recount() + fuzz_checks.reachable_faults(rig.domain) + rig.engine.faults() + rig.peer_faults()
        )
        return [f"{fault} after {self.done[-12:]}" for fault in found]

    # -- values

    def frame(self) -> int:
        what = self.rng.randrange(24)
        if what == 0 and self.rng.randrange(2):
            domain = self.rig.domain
            shared = (domain.area.shared_info, *domain.grants.table.frames[:2], *domain.grants.table.status_frames[:2])
            return BASE + self.rng.choice(shared)
        if what == 0:
            return BASE + PAGES + self.rng.randrange(rig_size(self.rig) - PAGES)
        if what == 1:
            return self.rng.choice((0, BASE - 1, BASE + rig_size(self.rig), 1 << 27, (1 << 40) - 1))
        return BASE + self.rng.randrange(1 if what == 2 else FIRST, PAGES)

    def entry(self) -> int:
        rng = self.rng
        if rng.randrange(5) == 0:
            return 0
        return self.frame() << 12 | rng.choice(self.FLAGS)

    def slot(self) -> int:
        return self.rng.choice(self.SLOTS)

    def va(self) -> int:
        return self.rng.randrange(FIRST, PAGES) << 12

    # -- calls

    def call(self, number: int, *arguments: int, image: bytes = b"") -> int:
        """A hypercall with its structures in the argument page; its result."""
        rig = self.rig
        rig.put(ARGUMENTS * PAGE, image.ljust(512, b"\0"))
        six = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
        handler = REGISTRY.table[number]
        assert handler is not None
        result = 0
        for _ in range(64):
            try:
                result = handler(rig.domain, *six)
            except XenError as exc:
                result = -exc.errno
            except Continuation as exc:
                six = (*exc.arguments, *six[len(exc.arguments) :])
                continue
            break
        self.done.append(f"hypercall {number} {[hex(a) for a in arguments]} {image.hex()} = {result}")
        return result

    def mmu_update(self) -> None:
        many = self.rng.randrange(1, 4)
        command = self.rng.choice((0, 0, 0, 2, 3, 1))
        image = b"".join(
            struct.pack("<2Q", self.frame() << 12 | self.slot() << 3 | command, self.entry()) for _ in range(many)
        )
        self.call(abi.HYPERVISOR_mmu_update, ARGUMENTS * PAGE, many, 0, abi.DOMID_SELF, image=image)

    def update_va(self) -> None:
        self.call(abi.HYPERVISOR_update_va_mapping, self.va(), self.entry(), self.rng.choice((0, 0, 1, 2)))

    def mmuext(self) -> None:
        rng = self.rng
        command = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 5, 5, 15, 15, 16, 17, 6, 7))
        first = self.frame() if rng.randrange(8) or command != 15 else 0
        if command == abi.MMUEXT_NEW_BASEPTR and rng.randrange(2):
            first = BASE + ROOT
        image = struct.pack("<I4xQQ", command, first, self.frame())
        self.call(abi.HYPERVISOR_mmuext_op, ARGUMENTS * PAGE, 1, 0, abi.DOMID_SELF, image=image)
        if self.rig.engine.regs.cr3 >> 12 != BASE + ROOT:
            # Another root is in force, with no arguments to be read: for this one step.
            self.rig.engine.walk_all()
            try:
                self.rig.domain.new_baseptr(BASE + ROOT)
            except XenError:
                self.done.append("the first root is no root any more")

    def memory_op(self) -> None:
        rng = self.rng
        command = rng.choice(
            (abi.XENMEM_decrease_reservation, abi.XENMEM_populate_physmap, abi.XENMEM_increase_reservation)
        )
        many = rng.randrange(1, 3)
        if rng.randrange(4) == 0:
            self.exchange(many)
            return
        frames = [
            self.frame() if command == abi.XENMEM_decrease_reservation else FIRST + rng.randrange(8)
            for _ in range(many)
        ]
        order = rng.choice((0, 0, 0, 1, 2))
        image = struct.pack("<QQIIHxxxxxx", ARGUMENTS * PAGE + 64, many, order, 0, abi.DOMID_SELF).ljust(64, b"\0")
        image += struct.pack(f"<{many}Q", *frames)
        self.call(abi.HYPERVISOR_memory_op, command, ARGUMENTS * PAGE, image=image)

    def exchange(self, many: int) -> None:
        """Single frames for single frames, or for pairs, or pairs for single ones."""
        given, taken = self.rng.choice(((0, 0), (0, 1), (1, 0)))
        at = ARGUMENTS * PAGE + 128
        counts = many << taken, many << given
        image = struct.pack("<QQIIHxxxxxx", at, counts[0], given, 0, abi.DOMID_SELF)
        image += struct.pack("<QQIIHxxxxxxQ", at + 64, counts[1], taken, 0, abi.DOMID_SELF, 0)
        image = image.ljust(128, b"\0") + struct.pack(f"<{counts[0]}Q", *[self.frame() for _ in range(counts[0])])
        image = image.ljust(192, b"\0") + struct.pack(f"<{counts[1]}Q", *range(FIRST, FIRST + counts[1]))
        self.call(abi.HYPERVISOR_memory_op, abi.XENMEM_exchange, ARGUMENTS * PAGE, image=image)

    def fill(self) -> None:
        """The guest writes a frame that it may write: through any translation, stale ones too."""
        rng, frames = self.rng, self.rig.frames
        index = rng.randrange(FIRST, PAGES)
        if index not in self.rig.engine.writable or not frames.refs[index]:
            return
        assert not (frames.count[index] and frames.kind[index] in TYPED), self.done[-12:]
        if rng.randrange(2):
            self.rig.memory.clear_page(index)
        for _ in range(rng.randrange(3)):
            self.rig.memory.words[index * 512 + self.slot()] = self.entry()
        self.done.append(f"filled {index:#x}")

    def table(self) -> None:
        """A tree as a guest makes one: frames are written, their mappings go, then they are pinned and changed."""
        rng = self.rng
        level = rng.randrange(1, 5)
        parent, child = (rng.randrange(FIRST, PAGES) for _ in range(2))
        self.prepare(child, {})
        pointer = (BASE + child) << 12 | rng.choice(self.FLAGS)
        self.prepare(parent, {self.slot(): pointer} if rng.randrange(4) else {})
        for frame, above in ((child, 1), (parent, 0)):
            if rng.randrange(2):
                image = struct.pack("<I4xQQ", max(0, level - 1 - above), BASE + frame, 0)
                self.call(abi.HYPERVISOR_mmuext_op, ARGUMENTS * PAGE, 1, 0, abi.DOMID_SELF, image=image)
        # To itself, to its child, to another of its level: linear entries among them.
        typed = [n for n in range(FIRST, PAGES) if self.rig.frames.count[n] and self.rig.frames.kind[n] in TYPED]
        for _ in range(rng.randrange(3)):
            target = rng.choice((parent, child, *typed))
            self.update((BASE + parent) << 12 | self.slot() << 3, (BASE + target) << 12 | rng.choice((RO, RO, RW)))

    def prepare(self, index: int, entries: dict[int, int]) -> None:
        """Write a frame, if the guest may, and unmap it."""
        if index in self.rig.engine.writable and self.rig.frames.refs[index]:
            self.rig.fill(index, entries)
        self.set_va(index << 12, 0)
        self.rig.engine.walk_all()

    def set_va(self, va: int, entry: int) -> None:
        self.call(abi.HYPERVISOR_update_va_mapping, va, entry, abi.UVMF_INVLPG)

    def update(self, where: int, entry: int) -> None:
        image = struct.pack("<2Q", where, entry)
        self.call(abi.HYPERVISOR_mmu_update, ARGUMENTS * PAGE, 1, 0, abi.DOMID_SELF, image=image)

    def direct(self) -> None:
        """A write to a page table by the guest's own instruction, as the fault handler sees it."""
        rng, rig = self.rng, self.rig
        code = rng.choice(STORES)
        regs = rig.regs
        va = (
            rng.choice((ROOT_L1, rng.randrange(FIRST, PAGES))) * PAGE
            + self.slot() * 8
            + (rng.randrange(8) if rng.randrange(6) == 0 else 0)
        )
        rig.memory.bytes[CODE * PAGE : CODE * PAGE + len(code)] = code
        regs.rip, regs.cr2 = CODE * PAGE, va
        gpr = regs.gpr
        gpr[x86.RDI], gpr[x86.RAX], gpr[x86.RCX] = va, self.entry(), self.entry()
        if rng.randrange(2):
            gpr[x86.RAX] = rig.memory.words[va >> 3]
        gpr[x86.RBX], gpr[x86.RDX] = self.entry(), rig.memory.words[(va >> 3) + 1 & ~1]
        taken = rig.domain.table_writes.emulate(va)
        self.done.append(f"direct write {code.hex()} at {va:#x} of {gpr[x86.RAX]:#x}, {gpr[x86.RCX]:#x}: {taken}")

    def gdt(self) -> None:
        many = self.rng.randrange(3)
        frames = struct.pack(f"<{many}Q", *[self.frame() for _ in range(many)])
        self.call(abi.HYPERVISOR_set_gdt, ARGUMENTS * PAGE, 512 * many, image=frames)

    def ldt(self) -> None:
        image = struct.pack("<I4xQQ", abi.MMUEXT_SET_LDT, self.va(), self.rng.choice((0, 1, 512, 1024, 1025)))
        self.call(abi.HYPERVISOR_mmuext_op, ARGUMENTS * PAGE, 1, 0, abi.DOMID_SELF, image=image)

    def descriptor(self) -> None:
        good = self.rng.choice((0, 0x00AF_FB00_0000_FFFF, 0x0000_EC00_E033_0000, fuzz_checks.POISON, self.entry()))
        self.call(abi.HYPERVISOR_update_descriptor, self.frame() << 12 | self.slot() << 3, good)

    def vcpu_info(self) -> None:
        if self.rng.randrange(8):
            return
        image = struct.pack("<QI4x", self.frame(), self.rng.choice((0, 64, 4096 - 64, 4096 - 56)))
        self.call(
            abi.HYPERVISOR_vcpu_op, abi.VCPUOP_register_vcpu_info, self.rng.randrange(2), ARGUMENTS * PAGE, image=image
        )

    def fifo(self) -> None:
        if self.rng.randrange(4):
            return
        command = self.rng.choice((abi.EVTCHNOP_init_control, abi.EVTCHNOP_expand_array, abi.EVTCHNOP_reset))
        image = struct.pack("<Q2I", self.frame(), 0, self.rng.randrange(2))
        if command == abi.EVTCHNOP_reset:
            image = struct.pack("<H", abi.DOMID_SELF)
        self.call(abi.HYPERVISOR_event_channel_op, command, ARGUMENTS * PAGE, image=image)

    def grant(self) -> None:
        rng = self.rng
        ref = rng.randrange(8, 12)
        granter = rng.choice((DOMID, PEER))
        if rng.randrange(2):
            self._write_grant(granter, ref)
        host = self.va() if rng.randrange(2) else (BASE + ROOT_L1) << 12 | rng.randrange(FIRST, PAGES) << 3
        what = rng.randrange(10)
        if what < 5:
            self._map_grant(host, granter, ref)
        elif what < 9:
            self._unmap_grant()
        else:
            image = struct.pack("<I", rng.choice((1, 2)))
            self.call(abi.HYPERVISOR_grant_table_op, abi.GNTTABOP_set_version, ARGUMENTS * PAGE, 1, image=image)

    def _write_grant(self, granter: int, ref: int) -> None:
        """An entry of the granter's table, which lets this domain map a frame, or does so no more."""
        domain = self.rig.domain if granter == DOMID else self.rig.peer
        if domain.grants.table.version != 1:
            return
        frame = self.frame() if granter == DOMID else PEER_BASE + self.rng.randrange(PEER_PAGES)
        entry = struct.pack("<HHI", self.rng.choice((1, 1, 5, 0)), DOMID, frame & 0xFFFF_FFFF)
        at = domain.grants.table.frames[0] * PAGE + ref * 8
        domain.memory.bytes[at : at + 8] = entry

    def granter(self) -> None:
        """The granting domain makes a page table of a frame, or ends that."""
        mfn = PEER_BASE + self.rng.randrange(PEER_PAGES)
        tables = self.rig.peer.tables
        with contextlib.suppress(XenError):
            if self.rng.randrange(2):
                tables.pin(mfn, L1)
            else:
                tables.unpin(mfn)
        self.done.append(f"the granter pins or unpins {mfn:#x}")

    def _map_grant(self, host: int, granter: int, ref: int) -> None:
        flags = self.rng.choice((2, 6, 18, 22, 3, 1, 7)) if host < BASE << 12 else self.rng.choice((18, 22))
        image = struct.pack("<QIIHhIQ", host, flags, ref, granter, 0, 0, 0)
        self.call(abi.HYPERVISOR_grant_table_op, abi.GNTTABOP_map_grant_ref, ARGUMENTS * PAGE, 1, image=image)
        _, _, _, _, status, handle, address = struct.unpack("<QIIHhIQ", self.rig.get(ARGUMENTS * PAGE, 32))
        if not status:
            self.mapped[handle] = host, address

    def _unmap_grant(self) -> None:
        rng = self.rng
        handle, (host, address) = rng.choice([*self.mapped.items(), (rng.randrange(6), (self.va(), 0))])
        replace = rng.randrange(4) == 0
        second = self.va() if replace else rng.choice((0, 0, address, self.frame() << 12))
        host = rng.choice((host, host, host, 0, self.va()))
        command = abi.GNTTABOP_unmap_and_replace if replace else abi.GNTTABOP_unmap_grant_ref
        image = struct.pack("<QQIhxx", host, second, handle, 0)
        self.call(abi.HYPERVISOR_grant_table_op, command, ARGUMENTS * PAGE, 1, image=image)

    def multicall(self) -> None:
        entries = b""
        for _ in range(2):
            arguments = (self.va(), self.entry(), 0, 0, 0, 0)
            entries += struct.pack("<8Q", abi.HYPERVISOR_update_va_mapping, 0, *arguments)
        self.call(abi.HYPERVISOR_multicall, ARGUMENTS * PAGE, 2, image=entries)


def rig_size(rig: TableRig) -> int:
    return int(rig.frames.size)
