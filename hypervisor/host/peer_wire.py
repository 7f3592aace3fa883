"""What two domain processes say to each other over a peer link: a `SOCK_SEQPACKET` socket, one datagram a message.

`HEAD` (kind, status, number), then the body of the kind. Requests are answered with kind | `ANSWERS` and their number,
the others are one-way. What is not of this form ends the link. Frames are machine frame numbers of the granter.

==========  =====================================================  ==========================================
request     body                                                   body of the answer (if the status is 0)
==========  =====================================================  ==========================================
PIN         `PIN_BODY`: use a grant, and hold its frame once       `PLACE_BODY`: where the frame is shared
HOLD        `HOLD_BODY`: hold the frame of a use once more         `PLACE_BODY`
PIN_COPY    `COPY_BODY`: use a grant for a copy                    `WINDOW_BODY` and the frame's 4096 bytes
READ        `COPY_BODY`: the frame of such a use again             the frame's 4096 bytes
BIND        `PORTS_BODY`: join a port; the status is an errno      none
one-way
UNPIN       `PIN_BODY`
DROP        `HOLD_BODY`
WRITE       `COPY_BODY`, then pieces: `PIECE` and its bytes
UNPIN_COPY  `COPY_BODY`
SEND        `PORTS_BODY`: an event
CLOSED      `PORTS_BODY`: the sender's end of a channel is closed
==========  =====================================================  ==========================================
"""

from __future__ import annotations

import struct

from hypervisor.types import PAGE_SIZE

PIN, HOLD, PIN_COPY, READ, BIND = range(1, 6)
UNPIN, DROP, WRITE, UNPIN_COPY, SEND, CLOSED = range(16, 22)
ANSWERS = 0x80
MAX_MESSAGE = 32 * 1024

HEAD = struct.Struct("<BxhI")
PIN_BODY = struct.Struct("<IIB3x")  # grant reference, increment, read-only
HOLD_BODY = struct.Struct("<QB7x")  # machine frame, writable
PLACE_BODY = struct.Struct("<QIB3x")  # machine frame, slot, in the writable memory
COPY_BODY = struct.Struct("<IB3x")  # grant reference, read-only
WINDOW_BODY = struct.Struct("<II")  # first byte that may be copied, number of bytes
PORTS_BODY = struct.Struct("<II")  # receiver's port, sender's port
PIECE = struct.Struct("<HH")  # offset, length

_FIXED = {
    PIN: PIN_BODY.size,
    HOLD: HOLD_BODY.size,
    PIN_COPY: COPY_BODY.size,
    READ: COPY_BODY.size,
    BIND: PORTS_BODY.size,
    UNPIN: PIN_BODY.size,
    DROP: HOLD_BODY.size,
    UNPIN_COPY: COPY_BODY.size,
    SEND: PORTS_BODY.size,
    CLOSED: PORTS_BODY.size,
}
_ANSWERED = {
    PIN: PLACE_BODY.size,
    HOLD: PLACE_BODY.size,
    PIN_COPY: WINDOW_BODY.size + PAGE_SIZE,
    READ: PAGE_SIZE,
    BIND: 0,
}


class BadForm(Exception):
    """The other end does not keep to the protocol."""


def parse(data: bytes) -> tuple[int, int, int, bytes]:
    """(kind, status, number, body). :raises BadForm."""
    if len(data) < HEAD.size:
        raise BadForm(f"message of {len(data)} bytes")
    kind, status, number = HEAD.unpack_from(data)
    body = data[HEAD.size :]
    if kind & ANSWERS:
        expected = 0 if status else _ANSWERED.get(kind & ~ANSWERS, -1)
    elif kind == WRITE:
        expected = len(body) if len(body) >= COPY_BODY.size else -1
    else:
        expected = _FIXED.get(kind, -1)
    if len(body) != expected:
        raise BadForm(f"message {kind:#x} with {len(body)} bytes")
    return kind, status, number, body


def pack_pieces(old: bytes, new: bytes) -> bytes:
    """What turns a frame's bytes `old` into `new`."""
    out = bytearray()
    at = 0
    while at < PAGE_SIZE:
        if old[at] == new[at]:
            at += 1
            continue
        end = at + 1
        while end < PAGE_SIZE and old[end] != new[end]:
            end += 1
        out += PIECE.pack(at, end - at) + new[at:end]
        at = end
    return bytes(out)


def unpack_pieces(data: bytes) -> list[tuple[int, bytes]]:
    """(offset, bytes) of each piece, within a frame. :raises BadForm."""
    pieces: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        if at + PIECE.size > len(data):
            raise BadForm("half a piece")
        offset, length = PIECE.unpack_from(data, at)
        at += PIECE.size
        if offset + length > PAGE_SIZE or at + length > len(data):
            raise BadForm(f"a piece of {length} bytes at {offset}")
        pieces.append((offset, data[at : at + length]))
        at += length
    return pieces
