"""The Unicorn engine: guest code by dynamic translation, no hardware help needed.

`create()` returns an engine; `selfcheck()` tells whether the fast private path
may be used with the library at hand. This package is the only importer of the
``unicorn`` distribution.
"""

from __future__ import annotations

import functools

from hypervisor.engines.unicorn.engine import UnicornEngine
from hypervisor.engines.unicorn.private import SelfCheck, verify


@functools.cache
def selfcheck() -> SelfCheck:
    """The verdict on the loaded library, made once a process (20 ms)."""
    return verify()


def create(*, use_private: bool = True) -> UnicornEngine:
    """A new engine.

    :param use_private: False forces the public API path (slower), as when the self-check fails.
    """
    layout = selfcheck().layout if use_private else None
    return UnicornEngine(layout)


def create_public() -> UnicornEngine:
    """A new engine on the public API path, for comparison and for a library whose layout is unknown."""
    return create(use_private=False)
