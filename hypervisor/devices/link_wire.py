"""What driver process and domain process say to each other over a guest link.

A `SOCK_SEQPACKET` socket; each message is one datagram. The driver asks, the domain process answers
in order; one request is under way at a time. Either side takes the other for hostile: what
does not have exactly the form below ends the link.

Request: `REQUEST` (op, flags, count, number), then `count` items. Answer: `ANSWER` (op | 0x80, 0, count, number,
status), then `count` items; status 0, GNTST_* (below 0) or an errno (above 0), and no items unless it is 0.

======  ===========================  =========================  ===================================================
op      item                         item of the answer         descriptors
======  ===========================  =========================  ===================================================
HELLO   `HELLO`, one                 `WELCOME`, one             with flag GUARDED one, to the domain process: the
                                                                listener of the filter that guards the mappings
MAP     `MAP`; flag READONLY         `FRAME`: page of the memfd
UNMAP   `SLOT`                       none
COPY    `COPY`                       `STATUS`
BIND    `PORT`, one                  none                       two eventfds: to the driver, to the guest
UNBIND  `PORT`, one                  none
======  ===========================  =========================  ===================================================
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

VERSION = 1
HELLO, MAP, UNMAP, COPY, BIND, UNBIND = range(1, 7)
ANSWERS = 0x80
READONLY = 1  # of MAP
GUARDED = 1  # of HELLO
MAX_ITEMS = 1024
"""Of one message."""
MAX_MESSAGE = 32 * 1024

REQUEST = struct.Struct("<BBHI")
ANSWER = struct.Struct("<BBHIi")

HELLO_ITEM = struct.Struct("<IiiIQ")  # version, memory fd, read-only memory fd, slots, address of the window
WELCOME_ITEM = struct.Struct("<IIQ")  # domid, pages of the memfd, bytes of the buffer
MAP_ITEM = struct.Struct("<II")  # grant reference, slot
FRAME_ITEM = struct.Struct("<I")
SLOT_ITEM = struct.Struct("<I")
COPY_ITEM = struct.Struct("<IHHII")  # grant reference, offset, length, place in the buffer, 1 = to the guest
STATUS_ITEM = struct.Struct("<h")
PORT_ITEM = struct.Struct("<I")

ITEMS = {HELLO: HELLO_ITEM, MAP: MAP_ITEM, UNMAP: SLOT_ITEM, COPY: COPY_ITEM, BIND: PORT_ITEM, UNBIND: PORT_ITEM}
ANSWER_ITEMS = {HELLO: WELCOME_ITEM, MAP: FRAME_ITEM, COPY: STATUS_ITEM}
_SINGLE = frozenset((HELLO, BIND, UNBIND))


class BadForm(Exception):
    """The other end does not keep to the protocol."""


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its descriptors; b"" at the end. :raises BadForm: too long. :raises OSError."""
    # Not socket.recv_fds: it drops the flags, and a descriptor's own flags cannot be set in a sandbox.
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, socket.CMSG_LEN(2 * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in struct.iter_unpack("i", body[: len(body) // 4 * 4])]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise BadForm("message too long, or with too many descriptors")
    return data, fds


def request(op: int, number: int, items: Sequence[tuple[int, ...]], flags: int = 0) -> bytes:
    pack = ITEMS[op].pack
    return REQUEST.pack(op, flags, len(items), number) + b"".join(pack(*item) for item in items)


def parse_request(data: bytes) -> tuple[int, int, int, list[tuple[Any, ...]]]:
    """(op, flags, number, items). :raises BadForm."""
    if len(data) < REQUEST.size:
        raise BadForm(f"request of {len(data)} bytes")
    op, flags, count, number = REQUEST.unpack_from(data)
    item = ITEMS.get(op)
    if item is None or flags & ~1 or (flags and op not in (HELLO, MAP)):
        raise BadForm(f"request {op} with flags {flags:#x}")
    if count > MAX_ITEMS or (op in _SINGLE and count != 1) or len(data) != REQUEST.size + count * item.size:
        raise BadForm(f"request {op} with {count} items in {len(data)} bytes")
    return op, flags, number, list(item.iter_unpack(data[REQUEST.size :]))


def answer(op: int, number: int, status: int, items: Sequence[tuple[int, ...]] = ()) -> bytes:
    head = ANSWER.pack(op | ANSWERS, 0, len(items), number, status)
    if not items:
        return head
    pack = ANSWER_ITEMS[op].pack
    return head + b"".join(pack(*item) for item in items)


def parse_answer(data: bytes, op: int, number: int, count: int) -> tuple[int, list[tuple[Any, ...]]]:
    """(status, items) of the answer to a request with `count` items. :raises BadForm."""
    if len(data) < ANSWER.size:
        raise BadForm(f"answer of {len(data)} bytes")
    to, zero, items, again, status = ANSWER.unpack_from(data)
    item = ANSWER_ITEMS.get(op)
    expected = count if item is not None and not status else 0
    size = expected * item.size if item is not None else 0
    if (to, zero, again, items, len(data)) != (op | ANSWERS, 0, number, expected, ANSWER.size + size):
        raise BadForm(f"answer {to:#x} {again} of {items} items to request {op} {number}")
    return status, list(item.iter_unpack(data[ANSWER.size :])) if item is not None and expected else []
