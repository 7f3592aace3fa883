"""What native hooks are told of an engine on its direct path."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

from hypervisor.engines.base import NativeView, Translations
from hypervisor.engines.unicorn.private import Layout


def native_view(library: ctypes.CDLL, cpu: int, env: int, layout: Layout, syscall: Any, interrupt: Any) -> NativeView:
    """:param env: address of the register block. :param syscall, interrupt: the callbacks into Python."""

    def address(function: Any) -> int:
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    return NativeView(
        env=env,
        offsets={name[4:]: at for name, at in dataclasses.asdict(layout).items() if name.startswith("env_")},
        read_eflags=address(library.helper_read_eflags_x86_64),
        stop=address(library.uc_emu_stop),
        raise_exception=address(library.raise_exception_err_x86_64),
        syscall=address(syscall),
        interrupt=address(interrupt),
        translations=Translations(
            at=env - layout.tlb_before_env,
            size=layout.tlb_size,
            cpu=cpu,
            init=address(library.tlb_init_x86_64),
            flush=address(library.tlb_flush_x86_64),
            flush_page=address(library.tlb_flush_page_x86_64),
            to_host=address(library.tlb_vaddr_to_host_x86_64),
            mark=address(library.tlb_reset_dirty_x86_64),
        ),
    )
