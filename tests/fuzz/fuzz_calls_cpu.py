"""Calls about vCPUs, traps, time, and what a guest may ask."""

from __future__ import annotations

import struct

from fuzz_machine import IRET, USER, Call
from fuzz_values import ALL, Values

from hypervisor import abi


class CpuCalls(Values):
    """See the module."""

    def vcpu(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((1, 3, 4, 5, 6, 7, 8, 9, 10, 13, 13, rng.randrange(16)))
        who = rng.choice((0, 0, 0, 1, 1, 2, 31, 32, ALL))
        if command in (abi.VCPUOP_up, abi.VCPUOP_down, abi.VCPUOP_initialise) and (self.calm or rng.randrange(4)):
            who = 1
        data = struct.pack("<2Q", self.number(), rng.randrange(4))
        if command == abi.VCPUOP_register_vcpu_info:
            info = self.base + ((self.fuzz.where["info"] - self.virt_base) >> 12)
            frame, offset = (
                (info, who * 64 & 64)
                if rng.randrange(3)
                else (self.frame() & ALL, rng.choice((0, 64, 4032, 4040, self.number() & 0xFFFF_FFFF)))
            )
            data = struct.pack("<QI4x", frame, offset)
        elif command in (abi.VCPUOP_register_runstate_memory_area, abi.VCPUOP_register_vcpu_time_memory_area):
            area = rng.choice(
                (
                    self.arena_va() + rng.choice((0, 8, 4000, 4090)),
                    rng.choice(self.BAD_POINTERS),
                    self.fuzz.where["edge"] - 8,
                )
            )
            data = struct.pack("<2Q", area & ALL, 0)
        elif command == abi.VCPUOP_set_periodic_timer:
            data = struct.pack("<2Q", self.one_of(0, 1, 999_999, 1_000_000, 5_000_000, (1 << 62) - 1, 1 << 62, ALL), 0)
        if command == abi.VCPUOP_initialise and rng.randrange(2):
            return Call(abi.HYPERVISOR_vcpu_op, (command, who, self._context()))
        return Call(abi.HYPERVISOR_vcpu_op, (command, who, self.pointer(self.fuzz.image(number))), image=data)

    def _context(self) -> int:
        """Write a `struct vcpu_guest_context` for a second vCPU, with a fault in it now and then; its address."""
        rng, where = self.rng, self.fuzz.where
        data = bytearray(abi.SIZEOF_VCPU_GUEST_CONTEXT)

        def put(offset: int, value: int) -> None:
            struct.pack_into("<Q", data, offset, value & ALL)

        put(abi.VCPU_GUEST_CONTEXT_FLAGS, 4 | 1)
        regs = abi.VCPU_GUEST_CONTEXT_USER_REGS
        put(regs + abi.CPU_USER_REGS_RIP, where["spin"])
        put(regs + abi.CPU_USER_REGS_RSP, where["spin_stack"])
        put(regs + abi.CPU_USER_REGS_RFLAGS, 0x202)
        struct.pack_into("<H", data, regs + abi.CPU_USER_REGS_CS, 0xE033)
        struct.pack_into("<H", data, regs + abi.CPU_USER_REGS_SS, 0xE02B)
        put(abi.VCPU_GUEST_CONTEXT_CTRLREG + 24, self.fuzz.boot.l4_mfn << 12)
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            at = rng.randrange(0, len(data) - 8, 8)
            put(at, self.one_of(self.frame(), self.number(), self.frame() << 12))
        big = self.fuzz.big
        self.fuzz.memory[big - self.virt_base : big - self.virt_base + len(data)] = bytes(data)
        return big

    def information(self, number: int) -> Call:
        rng = self.rng
        what = rng.randrange(8)
        if what < 3:
            return self._own(
                number, abi.HYPERVISOR_xen_version, rng.randrange(14), struct.pack("<2I", rng.randrange(3), 0)
            )
        if what == 3:
            return Call(
                abi.HYPERVISOR_console_io,
                (rng.randrange(3), self.count(16), self.pointer(self.fuzz.image(number))),
                image=b"text" * 8,
            )
        if what == 4:
            return self._own(
                number,
                abi.HYPERVISOR_physdev_op,
                rng.choice((4, 5, 6, 7, 8, rng.randrange(32))),
                struct.pack("<2Q", self.number(), 8),
            )
        if what == 5:
            return Call(abi.HYPERVISOR_vm_assist, (rng.randrange(3), rng.choice((0, 1, 2, 3, 4, 5, 32, 63, ALL))))
        if what == 6:
            return Call(
                rng.choice((7, 27, 31, 34, 35, 36, 37, 38, 39, 40, 41, 48, 63, 64, ALL)),
                (self.number(), self.fuzz.image(number)),
            )
        return self._own(number, abi.HYPERVISOR_nmi_op, rng.randrange(3), b"")

    def sched(self, number: int) -> Call:
        rng = self.rng
        command = rng.choice((0, 0, 3, 3, 3, 4, 6, rng.randrange(9) if not self.calm else 0))
        if command in (1, 2) and rng.randrange(16):
            command = 3
        image = self.fuzz.image(number)
        timeout = rng.choice((1, 1, 1, ALL, 1 << 63, rng.getrandbits(50)))
        data = struct.pack("<QI4xQ", self.pointer(image + 64), self.count(2) & 0xFFFF_FFFF, timeout).ljust(64, b"\0")
        data += struct.pack("<2I", self.port(), self.port())
        if command == 4:
            data = struct.pack("<2I", self.domid(), 0)
        if rng.randrange(4) == 0:
            return Call(abi.HYPERVISOR_set_timer_op, (self.number(),))
        return self._own(number, abi.HYPERVISOR_sched_op, command, data)

    def processor(self, number: int) -> Call:
        return self._processor(number, self.rng.randrange(8))

    def _processor(self, number: int, what: int) -> Call:
        rng = self.rng
        image = self.fuzz.image(number)
        address = self.one_of(self.fuzz.where["recover"], rng.choice(self.BAD_POINTERS), self.arena_va())
        if what == 0:
            return Call(abi.HYPERVISOR_set_segment_base, (rng.randrange(5), self.one_of(address, self.number())))
        if what == 1:
            return Call(abi.HYPERVISOR_set_debugreg, (rng.randrange(9), self.one_of(address, self.number(), 0x400)))
        if what == 2:
            return Call(abi.HYPERVISOR_get_debugreg, (self.number(),))
        if what == 3:
            return Call(abi.HYPERVISOR_fpu_taskswitch, (self.number(),))
        if what == 4:
            traps = b"".join(
                struct.pack("<BBH4xQ", rng.randrange(32, 256), rng.randrange(8), 0xE033, self.fuzz.where["recover"])
                for _ in range(3)
            )
            return Call(abi.HYPERVISOR_set_trap_table, (image,), image=traps)
        if what == 5 and not self.calm:
            return self._own(
                number,
                abi.HYPERVISOR_callback_op,
                rng.randrange(3),
                struct.pack("<HHxxxxQ", rng.choice((1, 2, 3, 4, 5, 7, 9)), rng.randrange(3), address),
            )
        if what == 6:
            flags = 0x202 | rng.choice((0, 0, 0x100, 0x400, 0x3000, 0x20000, 0x4000, 0x40000, rng.getrandbits(22)))
            cs = rng.choice((0xE033, 0xE030, 0xE030, 0xE030, 0xE023, 0xE02B, 0, 7, 0xB, rng.getrandbits(16)))
            if cs & 3 == 3 and not self.fuzz.domain.running.state.user_cr3 and rng.randrange(16):
                cs = 0xE030
            ss = rng.choice((0xE02B, 0xE02B, 0, 0xE033, rng.getrandbits(16)))
            frame = struct.pack(
                "<9Q",
                0,
                0,
                0,
                rng.choice((0, 0, 256)),
                self.fuzz.where["recover"] if rng.randrange(4) else address,
                cs,
                flags,
                self.fuzz.iret_stack,
                ss,
            )
            return Call(0, (image,), kind=IRET, image=frame)
        if self.calm or (not self.fuzz.domain.running.state.user_cr3 and rng.randrange(30)):
            return Call(abi.HYPERVISOR_stack_switch, (0xE02B, self.fuzz.trap_stack))
        return Call(0, (address, self.fuzz.iret_stack), kind=USER)
