"""The native fast path: the plainest traps in C (``fastpath.c``), everything else in Python as without it.

The C code is compiled when the package is built, if a compiler is there, and left out otherwise. It knows iret and the
plainest updates of page tables; it changes registers, `VcpuState`, a stack, the event mask, L1 entries and the frame
table's counts, and nothing before it is certain that all of a step can be done. Its structures are compared with
Python's when it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path
from typing import Any

from hypervisor.cpu.state import VcpuState
from hypervisor.engines.base import NativeView, Translations
from hypervisor.memory.pagetables import PageTables

LOG = logging.getLogger(__name__)

MODES = ("auto", "on", "off")

_U64, _U32, _PTR = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
_OFFSETS = (
    "regs", "eip", "eflags", "cc_src", "cc_op", "df", "hflags", "segs", "cr", "error_code", "is_int", "old_exception",
)  # fmt: skip


class Unavailable(Exception):
    """There is no compiled code, or the engine cannot take it."""


class Tables(ctypes.Structure):
    """``struct tables`` of ``tables.h``."""

    _fields_ = (
        ("own", _PTR),
        ("other", _PTR),
        ("words", _U64),
        ("env", _PTR),
        ("cpu", _PTR),
        ("hflags", _U32),
        ("cr3", _U32),
        ("other_cr3", _U64),
        ("stale", _U32),
        ("lost", _U32),
        ("flush", _PTR),
        ("flush_page", _PTR),
        ("to_host", _PTR),
        ("mark", _PTR),
        ("switches", _U64),
        ("blocks", _U64),
    )


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
        ("stop", _PTR),
        ("raise_exception", _PTR),
        ("python_syscall", _PTR),
        ("python_interrupt", _PTR),
        ("tables", _PTR),
        ("state", _PTR),
        ("windows", _U64),
        ("leaving", _U32),
        *((name, _U32) for name in _OFFSETS),
        ("syscalls", _U64),
        ("irets", _U64),
        ("faults", _U64),
        ("events", _U64),
        ("ports", _U64),
        ("updates", _U64),
        ("kind", _PTR),
        ("executed", _PTR),
        ("count", _PTR),
        ("refs", _PTR),
        ("stamp", _PTR),
        ("frames", _U64),
        ("epoch", _U64),
        ("lazy_nx", _U64),
    )


def _layout() -> tuple[int, ...]:
    """As ``reeve_layout`` of ``fastpath.c``."""
    state: Any = VcpuState
    context: Any = Context
    tables: Any = Tables
    return (
        ctypes.sizeof(Context),
        context.state.offset,
        context.old_exception.offset,
        context.lazy_nx.offset,
        ctypes.sizeof(VcpuState),
        state.iopl.offset,
        state.syscall_masks.offset,
        state.trap_address.offset,
        state.trap_flags.offset,
        ctypes.sizeof(Tables),
        tables.blocks.offset,
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

    :param tables: of the domain; its frame table stays the one it is.
    :param windows: word offset in the memory of the L1 entries of vCPU 0's descriptor windows; `pages` of them each.
    :raises Unavailable: see `library`.
    """

    def __init__(self, tables: PageTables, windows: int, pages: int) -> None:
        code, why = library()
        if code is None:
            raise Unavailable(why)
        memory, frames = tables.memory, tables.frames
        self._memory, self._frames = memory, frames  # keeps the mappings
        self._windows, self._pages = windows, pages
        self._state: VcpuState | None = None
        self.context = Context(size=ctypes.sizeof(Context), memory=memory.address)
        self.context.base, self.context.limit = memory.base_mpa, memory.frames * 4096
        self.context.frames, self.context.lazy_nx = frames.size, tables.lazy_nx
        for name in ("kind", "executed", "count", "refs", "stamp"):
            setattr(self.context, name, getattr(frames, f"{name}_np").ctypes.data)
        self.syscall = ctypes.cast(code.reeve_syscall, _PTR).value or 0
        self.interrupt = ctypes.cast(code.reeve_interrupt, _PTR).value or 0
        self.port_in = ctypes.cast(code.reeve_port_in, _PTR).value or 0
        self.port_out = ctypes.cast(code.reeve_port_out, _PTR).value or 0
        self.data = ctypes.addressof(self.context)
        self.translated = ctypes.cast(code.reeve_translated, _PTR).value or 0
        self._code = ctypes.PyDLL(code._name)  # keeps the interpreter lock: for leaf calls
        self.tables = Tables()
        self.tables_data = ctypes.addressof(self.tables)

    def attach(self, view: NativeView) -> None:
        context = self.context
        context.env, context.read_eflags = view.env, view.read_eflags
        context.stop, context.python_syscall, context.python_interrupt = view.stop, view.syscall, view.interrupt
        context.raise_exception = view.raise_exception
        for name in _OFFSETS:
            setattr(context, name, view.offsets[name])
        translations, tables = view.translations, self.tables
        tables.own, tables.words = translations.at, translations.size // 8
        tables.env, tables.cpu = view.env, translations.cpu
        tables.hflags, tables.cr3 = view.offsets["hflags"], view.offsets["cr"] + 24
        tables.flush, tables.flush_page = translations.flush, translations.flush_page
        tables.to_host, tables.mark = translations.to_host, translations.mark
        self._keep_apart(translations)

    def _keep_apart(self, translations: Translations) -> None:
        tables, size = self.tables, translations.size
        # The engine allocates what a set refers to: its first set goes aside, and it makes another.
        self._other = ctypes.create_string_buffer(size)
        tables.other = ctypes.addressof(self._other)
        leaf = ctypes.PYFUNCTYPE(None, _PTR)
        leaf(translations.flush)(translations.cpu)
        ctypes.memmove(self._other, translations.at, size)
        leaf(translations.init)(translations.cpu)
        self._switch = self._code.reeve_switch
        self._switch.argtypes = [_PTR, _U64, ctypes.c_int]
        self._tag = self._code.reeve_tag
        self._tag.argtypes = [_PTR, ctypes.c_int]
        self._flush_page = self._code.reeve_flush_page
        self._flush_page.argtypes = [_PTR, _U64]
        self.context.tables = self.tables_data

    def switch(self, cr3: int, kernel: bool) -> None:
        """Go to the kernel's tables, or to the program's. The mode of translation goes along."""
        self._switch(self.tables_data, cr3, kernel)

    def flush_page(self, va: int) -> None:
        self._flush_page(self.tables_data, va)

    def forget_other(self, epoch: int) -> None:
        """The set that is not in use is stale; the caller sees to the other one.

        :param epoch: as `flush_epoch` of the engine is from now on.
        """
        self.tables.stale = 1
        self.context.epoch = epoch

    def use(self, number: int, state: VcpuState, *, plain: bool) -> None:
        """That vCPU runs now. :param plain: nothing is on that only Python knows of."""
        self._state = state
        context = self.context
        context.state = ctypes.addressof(state)
        context.windows = self._windows + number * self._pages
        context.on = plain
        self._tag(self.tables_data, state.kernel_mode)

    def leaving(self, on: bool) -> None:
        """The run is being left: from now on no event is delivered."""
        self.context.leaving = on

    def counts(self) -> dict[str, int]:
        """What was done here, by kind."""
        context = self.context
        return {name: getattr(context, name) for name in ("syscalls", "irets", "faults", "events", "ports", "updates")}
