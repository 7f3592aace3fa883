"""Page-table roots, and forgetting what was cached of them."""

from __future__ import annotations

import ctypes
from typing import Any

from hypervisor.engines.base import NativeHooks
from hypervisor.engines.unicorn.library import uc_const, uc_x86

_PTR = ctypes.c_void_p
_CTL_TLB_FLUSH = 1 << 30 | uc_const.UC_CTL_TLB_FLUSH  # public unicorn.h: UC_CTL_WRITE(type, number of arguments)


class Flushing:
    """A part of `hypervisor.engines.unicorn.engine.UnicornEngine`."""

    _native: NativeHooks | None
    _direct: Any
    _uc: Any
    _leaf: ctypes.PyDLL
    _handle: int
    _env: Any
    _cpu: Any
    _f_cr3: Any
    _f_flush: Any
    _f_flush_page: Any
    _epoch: int

    @property
    def flush_epoch(self) -> int:
        return self._epoch

    def _forgotten(self) -> None:
        """All translations of addresses are, or are about to be."""
        self._epoch += 1
        if self._native is not None:
            self._native.forget_other(self._epoch)

    def switch_tables(self, mpa: int, kernel: bool) -> None:
        if self._native is not None:
            self._native.switch(mpa, kernel)
        else:
            self.load_cr3(mpa)

    def load_cr3(self, mpa: int) -> None:
        self._forgotten()
        if self._direct:
            self._f_cr3(self._env, mpa)
        else:
            self._uc.reg_write(uc_x86.UC_X86_REG_CR3, mpa)

    def flush_all(self) -> None:
        self._forgotten()
        if self._direct:
            self._f_flush(self._cpu)
        else:
            self._leaf.uc_ctl(_PTR(self._handle), ctypes.c_int(_CTL_TLB_FLUSH))

    def flush_page(self, va: int) -> None:
        if self._native is not None:
            self._native.flush_page(va)
        elif self._direct:
            self._f_flush_page(self._cpu, va)
        else:
            self.flush_all()
