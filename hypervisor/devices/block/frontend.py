"""What a block front end writes into xenstore, checked; all of it comes from the guest."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from hypervisor.devices.block.ring import LAYOUTS, MAX_RING_ORDER
from hypervisor.devices.driver import DeviceBroken

MAX_QUEUES = 4
NATIVE = "x86_64-abi"
_U32 = 1 << 32

Read = Callable[[str], str | None]


def read_frontend(read: Read, native: str = NATIVE) -> dict[str, Any]:
    """``protocol``, ``persistent`` and ``queues`` (each ``refs`` and ``port``), as JSON.

    :param read: a node's text, None if there is none. :raises DeviceBroken: a node is missing or makes no sense.
    """
    protocol = read("protocol") or native
    if protocol not in LAYOUTS:
        raise DeviceBroken(f"protocol {protocol[:40]!r} is not known")
    order = _number(read, "ring-page-order", MAX_RING_ORDER, default=None)
    if order is None:
        pages = _number(read, "num-ring-pages", 1 << MAX_RING_ORDER, default=1)
        assert pages is not None
        if pages < 1 or pages & (pages - 1):
            raise DeviceBroken(f"num-ring-pages {pages} is no power of two")
        single = pages == 1 and read("ring-ref") is not None
    else:
        pages, single = 1 << order, read("ring-page-order") is None
    count = _number(read, "multi-queue-num-queues", MAX_QUEUES, default=1)
    if not count:
        raise DeviceBroken("multi-queue-num-queues is 0")
    queues: list[dict[str, Any]] = []
    for number in range(count):
        prefix = f"queue-{number}/" if count > 1 else ""
        queues.append(
            {
                "refs": _references(read, prefix, pages, single=single),
                "port": _required(read, f"{prefix}event-channel"),
            }
        )
    refs = [ref for queue in queues for ref in queue["refs"]]
    ports = [queue["port"] for queue in queues]
    if len(set(refs)) != len(refs) or len(set(ports)) != len(ports):
        raise DeviceBroken("a grant or event channel is used for two rings")
    return {
        "protocol": protocol,
        "persistent": read("feature-persistent") == "1",
        "queues": queues,
        # Tells this connection from the next one, which may have the same numbers (`journal.connection_key`).
        "connection": secrets.token_hex(8),
    }


def _references(read: Read, prefix: str, pages: int, *, single: bool) -> list[int]:
    # A front end that knows of larger rings, but uses one page, may name it either way.
    if pages == 1 and (single or read(f"{prefix}ring-ref0") is None):
        return [_required(read, f"{prefix}ring-ref")]
    return [_required(read, f"{prefix}ring-ref{page}") for page in range(pages)]


def _required(read: Read, name: str) -> int:
    value = _number(read, name, _U32 - 1, default=None)
    if value is None:
        raise DeviceBroken(f"the front end has no node {name}")
    return value


def _number(read: Read, name: str, most: int, *, default: int | None) -> int | None:
    text = read(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > most:
        raise DeviceBroken(f"node {name} is {text[:20]!r}: expected a number up to {most}")
    return int(text)
