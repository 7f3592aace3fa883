"""The native fast path: the plainest traps in C (``fastpath.c``), everything else in Python as without it.

The C code is compiled when the package is built, if a compiler is there, and left out otherwise. It knows no types, no
counts and no hypercall but iret; it changes registers, `VcpuState`, a stack and the event mask, and nothing before it
is certain that all of a step can be done. Its structures are compared with Python's when it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path
from typing import Any

from hypervisor.cpu.state import VcpuState
from hypervisor.engines.base import NativeView
from hypervisor.memory.physical import DomainMemory

LOG = logging.getLogger(__name__)

MODES = ("auto", "on", "off")

_U64, _U32, _PTR = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
_OFFSETS = (
    "regs", "eip", "eflags", "cc_src", "cc_op", "df", "hflags", "segs", "cr", "error_code", "is_int", "old_exception",
)  # fmt: skip


class Unavailable(Exception):
    """There is no compiled code, or the engine cannot take it."""


class Context(ctypes.Structure):
    """``struct context`` of ``fastpath.c``."""

    _fields_ = (
        ("size", _U32),
        ("on", _U32),
        ("memory", _PTR),
        ("base", _U64),
        ("limit", _U64),
        ("env", _PTR),
        ("read_eflags", _PTR),
        ("load_cr3", _PTR),
        ("stop", _PTR),
        ("raise_exception", _PTR),
        ("python_syscall", _PTR),
        ("python_interrupt", _PTR),
        ("state", _PTR),
        ("windows", _U64),
        ("leaving", _U32),
        *((name, _U32) for name in _OFFSETS),
        ("syscalls", _U64),
        ("irets", _U64),
        ("faults", _U64),
        ("events", _U64),
        ("ports", _U64),
    )


def _layout() -> tuple[int, ...]:
    """As ``reeve_layout`` of ``fastpath.c``."""
    state: Any = VcpuState
    context: Any = Context
    return (
        ctypes.sizeof(Context),
        context.state.offset,
        context.old_exception.offset,
        context.ports.offset,
        ctypes.sizeof(VcpuState),
        state.iopl.offset,
        state.syscall_masks.offset,
        state.trap_address.offset,
        state.trap_flags.offset,
    )


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, or None and why there is none."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_fastpath{suffix}"
        if not path.exists():
            continue
        try:
            found = ctypes.CDLL(str(path))
            expected = _layout()
            told = tuple((_U32 * len(expected)).in_dll(found, "reeve_layout"))
        except (OSError, ValueError) as exc:
            return None, f"{path.name} cannot be used: {exc}"
        if told != expected:
            return None, f"{path.name} is of another version: install the package again"
        return found, "compiled"
    return None, "it was not compiled: install a C compiler, then the package again"


class FastPath:
    """The C code in the service of one 64-bit domain; a `hypervisor.engines.base.NativeHooks`.

    :param windows: word offset in the memory of the L1 entries of vCPU 0's descriptor windows; `pages` of them each.
    :raises Unavailable: see `library`.
    """

    def __init__(self, memory: DomainMemory, windows: int, pages: int) -> None:
        code, why = library()
        if code is None:
            raise Unavailable(why)
        self._memory = memory  # keeps the mapping
        self._windows, self._pages = windows, pages
        self._state: VcpuState | None = None
        self.context = Context(size=ctypes.sizeof(Context), memory=memory.address)
        self.context.base, self.context.limit = memory.base_mpa, memory.frames * 4096
        self.syscall = ctypes.cast(code.reeve_syscall, _PTR).value or 0
        self.interrupt = ctypes.cast(code.reeve_interrupt, _PTR).value or 0
        self.port_in = ctypes.cast(code.reeve_port_in, _PTR).value or 0
        self.port_out = ctypes.cast(code.reeve_port_out, _PTR).value or 0
        self.data = ctypes.addressof(self.context)

    def attach(self, view: NativeView) -> None:
        context = self.context
        context.env, context.read_eflags, context.load_cr3 = view.env, view.read_eflags, view.load_cr3
        context.stop, context.python_syscall, context.python_interrupt = view.stop, view.syscall, view.interrupt
        context.raise_exception = view.raise_exception
        for name in _OFFSETS:
            setattr(context, name, view.offsets[name])

    def use(self, number: int, state: VcpuState, *, plain: bool) -> None:
        """That vCPU runs now. :param plain: nothing is on that only Python knows of."""
        self._state = state
        context = self.context
        context.state = ctypes.addressof(state)
        context.windows = self._windows + number * self._pages
        context.on = plain

    def leaving(self, on: bool) -> None:
        """The run is being left: from now on no event is delivered."""
        self.context.leaving = on

    def counts(self) -> dict[str, int]:
        """What was done here, by kind."""
        context = self.context
        return {name: getattr(context, name) for name in ("syscalls", "irets", "faults", "events", "ports")}
