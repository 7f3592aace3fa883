"""The table from hypercall numbers to handlers.

A handler decodes its arguments, calls a core, encodes the answer. It takes the
`Domain` and the six argument registers as unsigned integers, returns the
result (0 or a positive value) and raises `XenError` for a failure.
"""

from __future__ import annotations

from collections.abc import Callable

from hypervisor.domain import Domain

Handler = Callable[[Domain, int, int, int, int, int, int], int]

TABLE_SIZE = 64


class Continuation(Exception):
    """A long hypercall gives way: call it again with these arguments.

    What was done stays done; the arguments say where to go on.
    """

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.arguments = args


class ContextLoaded(Exception):
    """The hypercall replaced the whole register context (iret): there is no result to store."""


class Registry:
    """Filled once at import; read-only afterwards."""

    def __init__(self) -> None:
        self.table: list[Handler | None] = [None] * TABLE_SIZE

    def hypercall(self, number: int) -> Callable[[Handler], Handler]:
        """Register the decorated function for `number`."""

        def register(handler: Handler) -> Handler:
            if self.table[number] is not None:
                raise ValueError(f"hypercall {number} is registered twice")
            self.table[number] = handler
            return handler

        return register


REGISTRY = Registry()
hypercall = REGISTRY.hypercall
