"""Registers read and written in place, on a verified layout (see `private`)."""

from __future__ import annotations

import ctypes

from hypervisor.engines import x86
from hypervisor.engines.unicorn.private import HF_GUEST, INTERCEPT_CPUID, INTERCEPT_PAUSE, Layout

# Bits of CPUX86State.hflags (QEMU's cached translation state; target/i386/cpu.h of the library).
HF_CPL = 3
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE, HF_TS = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 11
HF_LMA, HF_CS64, HF_OSFXSR = 1 << 14, 1 << 15, 1 << 22
HF_KERNEL = 1 << 26
"""HF_MPX_IU, which means nothing without MPX_EN: the guest's kernel runs (`hypervisor/native/tables.h`)."""

_HF_INHIBIT_IRQ = 1 << 3
_HF_GUESTS = HF_CPL | _HF_INHIBIT_IRQ | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_TS | HF_CS64 | HF_GUEST | HF_KERNEL
"""What of it a guest can change."""

# Arithmetic flags that live in cc_src while cc_op says so.
CC_FLAGS = 0x8D5
CC_OP_EFLAGS = 1

# Cached segment attributes (descriptor bits 40-55 at bits 8-23) of flat segments at DPL 3.
FLAT_CODE64 = 0x00AF_FB00
FLAT_DATA = 0x00CF_F300


class DirectRegisters:
    """`hypervisor.engines.base.Registers` over the library's own memory."""

    __slots__ = (
        "_byte",
        "_cc_op",
        "_cc_src",
        "_cr",
        "_df",
        "_eflags",
        "_eip",
        "_env",
        "_error",
        "_hflags",
        "_i",
        "_intercept",
        "_is_int",
        "_layout",
        "_old_exception",
        "_q",
        "_read_eflags",
        "_seg_i",
        "_seg_q",
        "gpr",
    )

    def __init__(self, env: int, layout: Layout, library: ctypes.PyDLL) -> None:
        self._layout = layout
        self._env = env
        raw = (ctypes.c_uint8 * layout.env_size).from_address(env)
        self._byte = memoryview(raw).cast("B")
        self._q = self._byte.cast("Q")
        self._i = self._byte.cast("I")
        self.gpr = self._q[layout.env_regs // 8 : layout.env_regs // 8 + 16]
        self._eip = layout.env_eip // 8
        self._eflags = layout.env_eflags // 8
        self._cc_src = layout.env_cc_src // 8
        self._cc_op = layout.env_cc_op // 4
        self._df = layout.env_df // 4
        self._hflags = layout.env_hflags // 4
        self._cr = layout.env_cr // 8
        self._error = layout.env_error_code // 4
        self._is_int = layout.env_is_int // 4
        self._old_exception = layout.env_old_exception // 4
        self._intercept = layout.env_intercept // 8
        self._seg_q = [(layout.env_segs + 24 * i + 8) // 8 for i in range(10)]
        self._seg_i = [(layout.env_segs + 24 * i) // 4 for i in range(10)]
        self._read_eflags = library.helper_read_eflags_x86_64
        self._read_eflags.restype = ctypes.c_uint64
        self._read_eflags.argtypes = [ctypes.c_void_p]

    # -- control registers and flags

    @property
    def rip(self) -> int:
        return self._q[self._eip]

    @rip.setter
    def rip(self, value: int) -> None:
        self._q[self._eip] = value

    @property
    def rflags(self) -> int:
        return int(self._read_eflags(self._env)) & 0xFFFF_FFFF

    @rflags.setter
    def rflags(self, value: int) -> None:
        i, q = self._i, self._q
        q[self._cc_src] = value & CC_FLAGS
        i[self._cc_op] = CC_OP_EFLAGS
        i[self._df] = 0xFFFF_FFFF if value & x86.FLAG_DF else 1
        q[self._eflags] = (value & ~(CC_FLAGS | x86.FLAG_DF)) | 2

    def clear_flags(self, mask: int) -> None:
        """Clear system flags (none of the arithmetic ones nor DF) without computing the rest."""
        self._q[self._eflags] &= ~mask

    @property
    def single_step(self) -> bool:
        """RFLAGS.TF, without computing the rest."""
        return bool(self._q[self._eflags] & x86.FLAG_TF)

    @property
    def cr2(self) -> int:
        return self._q[self._cr + 2]

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._q[self._cr + 2] = value

    @property
    def cr3(self) -> int:
        return self._q[self._cr + 3]

    @property
    def task_switched(self) -> bool:
        return bool(self._q[self._cr] & x86.CR0_TS)

    @task_switched.setter
    def task_switched(self, on: bool) -> None:
        if on:
            self._q[self._cr] |= x86.CR0_TS
            self._i[self._hflags] |= HF_TS
        else:
            self._q[self._cr] &= ~x86.CR0_TS
            self._i[self._hflags] &= ~HF_TS

    @property
    def long_mode_code(self) -> bool:
        return bool(self._i[self._hflags] & HF_CS64)

    # -- exceptions

    def take_exception(self) -> tuple[int, bool]:
        """(error code, software) of the exception just raised; rearms double-fault detection.

        The library never resets ``old_exception``, so that a second #PF would look like one during the delivery
        of the first.
        """
        i = self._i
        i[self._old_exception] = 0xFFFF_FFFF
        software = i[self._is_int] != 0
        i[self._is_int] = 0
        return i[self._error], software

    def watch_instructions(self) -> None:
        """Have `cpuid` told. Looking at intercepts is part of how code is translated: it stays on, lest all code be
        translated twice.
        """
        self._i[self._hflags] |= HF_GUEST
        self._q[self._intercept] |= INTERCEPT_CPUID

    def intercept_pause(self, on: bool) -> None:
        self._q[self._intercept] = INTERCEPT_CPUID | (INTERCEPT_PAUSE if on else 0)

    # -- segments

    def selector(self, index: int) -> int:
        return self._i[self._seg_i[index]] & 0xFFFF

    def set_selector(self, index: int, value: int) -> None:
        self._i[self._seg_i[index]] = value

    @property
    def cs(self) -> int:
        return self._i[self._seg_i[x86.CS]] & 0xFFFF

    @cs.setter
    def cs(self, value: int) -> None:
        self._i[self._seg_i[x86.CS]] = value

    @property
    def ss(self) -> int:
        return self._i[self._seg_i[x86.SS]] & 0xFFFF

    @ss.setter
    def ss(self, value: int) -> None:
        self._i[self._seg_i[x86.SS]] = value

    @property
    def ds(self) -> int:
        return self.selector(x86.DS)

    @ds.setter
    def ds(self, value: int) -> None:
        self.set_selector(x86.DS, value)

    @property
    def es(self) -> int:
        return self.selector(x86.ES)

    @es.setter
    def es(self, value: int) -> None:
        self.set_selector(x86.ES, value)

    @property
    def fs(self) -> int:
        return self.selector(x86.FS)

    @fs.setter
    def fs(self, value: int) -> None:
        self.set_selector(x86.FS, value)

    @property
    def gs(self) -> int:
        return self.selector(x86.GS)

    @gs.setter
    def gs(self, value: int) -> None:
        self.set_selector(x86.GS, value)

    @property
    def fs_base(self) -> int:
        return self._q[self._seg_q[x86.FS]]

    @fs_base.setter
    def fs_base(self, value: int) -> None:
        self._q[self._seg_q[x86.FS]] = value

    @property
    def gs_base(self) -> int:
        return self._q[self._seg_q[x86.GS]]

    @gs_base.setter
    def gs_base(self, value: int) -> None:
        self._q[self._seg_q[x86.GS]] = value

    def segment_base(self, index: int) -> int:
        """Base of the segment that register `index` (ES .. GS) names."""
        return self._q[self._seg_q[index]]

    def set_hidden(self, index: int, selector: int, base: int, limit: int, attributes: int) -> None:
        """Index 0-5 segment registers, 6 LDT, 7 TR, 8 GDT, 9 IDT."""
        word = self._seg_i[index]
        self._i[word] = selector
        self._q[self._seg_q[index]] = base
        self._i[word + 4] = limit
        self._i[word + 5] = attributes

    def load_flat64(self, cs: int, ss: int) -> None:
        self.set_hidden(x86.CS, cs, 0, 0xFFFF_FFFF, FLAT_CODE64)
        self.set_hidden(x86.SS, ss, 0, 0xFFFF_FFFF, FLAT_DATA)
        i, h = self._i, self._hflags
        i[h] = (i[h] & ~HF_ADDSEG) | HF_CS64 | HF_CS32 | HF_SS32 | HF_CPL

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        if descriptor == 0:
            self.set_hidden(index, selector, 0, 0xFFFF_FFFF if index == x86.SS else 0, FLAT_DATA)
        else:
            attributes = (descriptor >> 32) & 0xFF_FF00
            self.set_hidden(index, selector, x86.desc_base(descriptor), x86.desc_limit(descriptor), attributes)
        self._refresh_mode()

    def _refresh_mode(self) -> None:
        """Recompute the translation mode from the hidden CS, SS, DS, ES, as cpu_x86_load_seg_cache does."""
        i, q = self._i, self._q
        code = i[self._seg_i[x86.CS] + 5]
        stack = i[self._seg_i[x86.SS] + 5]
        hflags = i[self._hflags] & ~(HF_ADDSEG | HF_CS64 | HF_CS32 | HF_SS32)
        if code & (x86.DESC_L >> 32):
            hflags |= HF_CS64 | HF_CS32 | HF_SS32
        else:
            if code & (x86.DESC_DB >> 32):
                hflags |= HF_CS32
            if stack & (x86.DESC_DB >> 32):
                hflags |= HF_SS32
            if q[self._seg_q[x86.DS]] | q[self._seg_q[x86.ES]] | q[self._seg_q[x86.SS]]:
                hflags |= HF_ADDSEG
        # As in the library the privilege level is that of the stack segment's descriptor.
        i[self._hflags] = (hflags & ~HF_CPL) | (stack >> 13) & 3

    # -- whole state

    def save(self) -> bytes:
        return bytes(self._byte)

    def set_mode(self, flags: int) -> None:
        """Translate as under the flags of a block; what no guest can change of them stays."""
        self._i[self._hflags] = self._i[self._hflags] & ~_HF_GUESTS | flags & _HF_GUESTS

    def checked(self, state: bytes) -> bytes:
        """What `save` gave on another host, safe to `restore` here.

        Beside the registers lie things that the library trusts: pointers of its own, the top of the FPU's stack as an
        index, the mode of translation with its privilege. They become what they are here, or stay in range.

        :raises ValueError: it is not of this build, or of a mode that no PV guest runs in.
        """
        layout = self._layout
        if len(state) != layout.env_size:
            raise ValueError(f"registers of {len(state)} bytes, not {layout.env_size}: another build's")
        data = bytearray(state)
        words, own = memoryview(data).cast("I"), self._i
        mode = words[self._hflags] & _HF_GUESTS
        if mode & HF_CPL not in (1, 3):
            raise ValueError(f"registers of privilege level {mode & HF_CPL}")
        words[self._hflags] = own[self._hflags] & ~_HF_GUESTS | mode
        words[self._hflags + 1] = own[self._hflags + 1]
        words[layout.env_fpstt // 4] &= 7
        for at, size in ((layout.env_breakpoints, 32), (layout.env_cr + 32, 12)):  # CR4, A20
            data[at : at + size] = self._byte[at : at + size]
        task_switched = words[self._cr * 2] & x86.CR0_TS
        words[self._cr * 2] = own[self._cr * 2] & ~x86.CR0_TS | task_switched
        return bytes(data)

    def restore(self, state: bytes) -> None:
        self._byte[:] = state
        self.watch_instructions()
