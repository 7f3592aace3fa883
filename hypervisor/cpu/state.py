"""The Xen side of a vCPU: what the trap path touches, in one C structure.

A native fast path can share `VcpuState`; Python reads the same memory. What
only slow paths need is in `Vcpu`.
"""

from __future__ import annotations

import base64
import ctypes
from typing import Any

_U64, _U32, _U16, _U8 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint16, ctypes.c_uint8


class VcpuState(ctypes.Structure):
    """Addresses are guest virtual unless a name says otherwise; ``*_cr3`` are machine addresses (0: none)."""

    _fields_ = (
        ("kernel_mode", _U64),
        ("kernel_sp", _U64),
        ("kernel_ss", _U64),
        ("kernel_cr3", _U64),
        ("user_cr3", _U64),
        ("gs_base_other", _U64),  # the GS base of the mode that is not running
        ("vcpu_info", _U64),  # byte offset in the domain's memory
        ("event_callback", _U64),
        ("failsafe_callback", _U64),
        ("syscall_callback", _U64),
        ("syscall32_callback", _U64),
        ("sysenter_callback", _U64),
        ("deadline", _U64),  # system time in ns of the one-shot timer, 0: none
        ("iopl", _U32),  # 0..3
        ("event_cs", _U16),
        ("failsafe_cs", _U16),
        ("failsafe_masks", _U8),
        ("syscall_masks", _U8),
        ("syscall32_masks", _U8),
        ("sysenter_masks", _U8),
        ("syscall32_cs", _U16),
        ("sysenter_cs", _U16),
        ("trap_address", _U64 * 256),
        ("trap_cs", _U16 * 256),
        ("trap_flags", _U8 * 256),
    )


class Vcpu:
    """One vCPU.

    :ivar id: 0..31.
    :ivar up: brought up by the guest (vCPU 0 at boot).
    :ivar blocked: waits for an event; ``poll`` lists the ports of SCHEDOP_poll, None when not polling.
    :ivar cpu: saved engine state while another vCPU runs; None for the one loaded.
    :ivar debug_registers: DR0..DR7.
    :ivar periodic_ns: period of the periodic timer, 0: none.
    """

    __slots__ = (
        "blocked",
        "cpu",
        "debug_registers",
        "gdt_entries",
        "gdt_frames",
        "id",
        "initialised",
        "ldt_base",
        "ldt_entries",
        "ldt_frames",
        "periodic_next",
        "periodic_ns",
        "poll",
        "poll_deadline",
        "runstate",
        "runstate_area",
        "runstate_since",
        "runstate_times",
        "state",
        "time_area",
        "timer_pending",
        "up",
        "virq_ports",
    )

    def __init__(self, vcpu_id: int) -> None:
        self.id = vcpu_id
        self.state = VcpuState()
        self.up = False
        self.initialised = False
        self.blocked = False
        self.poll: tuple[int, ...] | None = None
        self.poll_deadline = 0
        self.cpu: bytes | None = None
        self.debug_registers = [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400]
        self.gdt_frames: list[int] = []
        self.gdt_entries = 0
        self.ldt_base = 0
        self.ldt_entries = 0
        self.ldt_frames: list[int] = []
        self.periodic_ns = 0
        self.periodic_next = 0
        self.timer_pending = False
        self.runstate = 3  # offline (public/vcpu.h, RUNSTATE_offline)
        self.runstate_since = 0
        self.runstate_times = [0, 0, 0, 0]
        self.runstate_area = 0
        self.time_area = 0
        self.virq_ports: dict[int, int] = {}

    _SIMPLE = (
        "up",
        "initialised",
        "blocked",
        "poll_deadline",
        "gdt_entries",
        "ldt_base",
        "ldt_entries",
        "periodic_ns",
        "periodic_next",
        "timer_pending",
        "runstate",
        "runstate_since",
        "runstate_area",
        "time_area",
    )

    def save(self) -> dict[str, Any]:
        """JSON form. The engine state of the running vCPU must have been put into `cpu` before."""
        data: dict[str, Any] = {name: getattr(self, name) for name in self._SIMPLE}
        data["id"] = self.id
        data["poll"] = list(self.poll) if self.poll is not None else None
        data["state"] = base64.b64encode(bytes(self.state)).decode()
        data["cpu"] = base64.b64encode(self.cpu).decode() if self.cpu is not None else None
        data["debug_registers"] = list(self.debug_registers)
        data["gdt_frames"] = list(self.gdt_frames)
        data["ldt_frames"] = list(self.ldt_frames)
        data["runstate_times"] = list(self.runstate_times)
        data["virq_ports"] = {str(k): v for k, v in self.virq_ports.items()}
        return data

    @classmethod
    def restore(cls, data: dict[str, Any]) -> Vcpu:
        vcpu = cls(data["id"])
        for name in cls._SIMPLE:
            setattr(vcpu, name, data[name])
        vcpu.poll = tuple(data["poll"]) if data["poll"] is not None else None
        raw = base64.b64decode(data["state"])
        if len(raw) != ctypes.sizeof(VcpuState):
            raise ValueError(f"vCPU state has {len(raw)} bytes, not {ctypes.sizeof(VcpuState)}: another version's")
        vcpu.state = VcpuState.from_buffer_copy(raw)
        vcpu.cpu = base64.b64decode(data["cpu"]) if data["cpu"] is not None else None
        vcpu.debug_registers = list(data["debug_registers"])
        vcpu.gdt_frames = list(data["gdt_frames"])
        vcpu.ldt_frames = list(data["ldt_frames"])
        vcpu.runstate_times = list(data["runstate_times"])
        vcpu.virq_ports = {int(k): v for k, v in data["virq_ports"].items()}
        return vcpu
