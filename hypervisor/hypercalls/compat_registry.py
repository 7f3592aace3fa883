"""The handlers of 32-bit guests' hypercalls that translate, by number, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from hypervisor.domain import Domain
from hypervisor.errors import HypervisorBug
from hypervisor.hypercalls.registry import REGISTRY, Handler
from hypervisor.memory.guest32 import GuestAccess32

COMPAT: dict[int, Handler] = {}


def compat(number: int) -> Callable[[Handler], Handler]:
    """Register the decorated function as what `number` does for 32-bit guests."""

    def register(handler: Handler) -> Handler:
        if number in COMPAT:
            raise ValueError(f"hypercall {number} is registered twice for 32-bit guests")
        COMPAT[number] = handler
        return handler

    return register


def native(number: int) -> Handler:
    """The handler that 64-bit guests use."""
    handler = REGISTRY.table[number]
    if handler is None:
        raise HypervisorBug(f"hypercall {number} has no handler")
    return handler


def guest_of(domain: Domain) -> GuestAccess32:
    return cast(GuestAccess32, domain.guest)
