"""What a front end says of itself in xenstore, checked (public/io/netif.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisor.devices.driver import DeviceBroken

MAX_QUEUES = 8

Read = Callable[[str], str | None]


def read(node: Read, max_queues: int) -> dict[str, Any]:
    """As JSON for the driver: ``queues`` (tx_ref, rx_ref, tx_port, rx_port of each), ``offloads``, ``multicast``.

    :raises DeviceBroken: nodes are missing or make no sense.
    """
    if not _flag(node, "request-rx-copy"):
        raise DeviceBroken("request-rx-copy is not 1: page flipping is not offered")
    if not _flag(node, "feature-rx-notify"):
        raise DeviceBroken("feature-rx-notify is not 1: without it nothing tells of new receive buffers")
    count = _number(node, "multi-queue-num-queues", 1, max_queues, default=1)
    prefixes = [""] if count == 1 else [f"queue-{number}/" for number in range(count)]
    return {
        "queues": [_queue(node, prefix) for prefix in prefixes],
        "offloads": {
            "sg": _flag(node, "feature-sg"),
            "gso4": _flag(node, "feature-gso-tcpv4"),
            "gso6": _flag(node, "feature-gso-tcpv6"),
            "csum4": not _flag(node, "feature-no-csum-offload"),
            "csum6": _flag(node, "feature-ipv6-csum-offload"),
        },
        "multicast": _flag(node, "request-multicast-control"),
    }


def _queue(node: Read, prefix: str) -> dict[str, int]:
    if node(prefix + "event-channel-tx") is not None or node(prefix + "event-channel-rx") is not None:
        tx_port = _number(node, prefix + "event-channel-tx", 1, _PORTS)
        rx_port = _number(node, prefix + "event-channel-rx", 1, _PORTS)
    else:
        tx_port = rx_port = _number(node, prefix + "event-channel", 1, _PORTS)
    return {
        "tx_ref": _number(node, prefix + "tx-ring-ref", 0, 0xFFFF_FFFF),
        "rx_ref": _number(node, prefix + "rx-ring-ref", 0, 0xFFFF_FFFF),
        "tx_port": tx_port,
        "rx_port": rx_port,
    }


_PORTS = (1 << 17) - 1  # EVTCHN_FIFO_NR_CHANNELS


def _flag(node: Read, name: str) -> bool:
    return _number(node, name, 0, 0xFFFF_FFFF, default=0) != 0


def _number(node: Read, name: str, least: int, most: int, default: int | None = None) -> int:
    text = node(name)
    if text is None:
        if default is None:
            raise DeviceBroken(f"the front end's node {name} is missing")
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= most):
        raise DeviceBroken(f"the front end's node {name} is {text[:32]!r}: {least} to {most} would do")
    return int(text)
