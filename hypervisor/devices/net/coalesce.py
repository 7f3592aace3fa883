"""TCP segments of one flow put together to one large frame, as network cards do (LRO) and Linux (GRO).

An emulated guest pays for each frame far more than for its bytes. What comes out, cut again, is what went
in: only segments that differ in nothing but sequence number, IP identification, length, checksums and PSH are put
together, in order, all but the last of one size. IPv4 without options only; the checksums of what goes in are trusted.
"""

from __future__ import annotations

from hypervisor.devices.net import offload
from hypervisor.devices.net.headers import TCP, Layers
from hypervisor.devices.net.message import GSO_TCPV4, MAX_FRAME, NEEDS_CSUM, VALIDATED, Header

_IPV4_PLAIN = b"\x08\x00\x45"
_L4 = 34
_ACK, _PSH = 0x10, 0x08


class Coalescer:
    """At most one frame is held back, until `flush`."""

    def __init__(self) -> None:
        self._frame = bytearray()
        self._key = b""  # empty: nothing can be added
        self._next = 0
        self._start = 0
        self._size = 0

    def add(self, frame: memoryview) -> bytearray | None:
        """Take a frame; a message that is ready, if there is one."""
        parsed = _parse(frame)
        if parsed is None:
            ready = self.flush()
            self._frame = bytearray(frame)
            return ready
        key, sequence, start = parsed
        payload = len(frame) - start
        if (
            key == self._key
            and sequence == self._next
            and payload <= self._size
            and len(self._frame) + payload <= MAX_FRAME
        ):
            self._frame += frame[start:]
            self._frame[_L4 + 13] |= frame[_L4 + 13]
            self._next = (sequence + payload) & 0xFFFF_FFFF
            if payload < self._size or frame[_L4 + 13] & _PSH:
                self._key = b""
            return None
        ready = self.flush()
        self._frame = bytearray(frame)
        self._start, self._size = start, payload
        self._next = (sequence + payload) & 0xFFFF_FFFF
        self._key = b"" if frame[_L4 + 13] & _PSH else key
        return ready

    def flush(self) -> bytearray | None:
        """The message that was held back."""
        frame, self._frame, self._key = self._frame, bytearray(), b""
        if not frame:
            return None
        if not self._size or len(frame) <= self._start + self._size:
            self._size = 0
            return bytearray(VALIDATED) + frame
        total = len(frame) - 14
        frame[16:18] = total.to_bytes(2, "big")
        frame[24:26] = b"\0\0"
        frame[24:26] = offload.fold(offload.total(frame[14:_L4])).to_bytes(2, "big")
        layers = Layers(4, _L4, TCP, len(frame), False)
        frame[_L4 + 16 : _L4 + 18] = offload.pseudo_field(frame, layers).to_bytes(2, "big")
        header = Header(NEEDS_CSUM, GSO_TCPV4, self._start, self._size, _L4, 16)
        self._size = 0
        return bytearray(header.pack()) + frame


def _parse(frame: memoryview) -> tuple[bytes, int, int] | None:
    """What must be equal, the sequence number, and where the payload begins; None: it stays alone."""
    size = len(frame)
    if size < 54 or frame[12:15] != _IPV4_PLAIN or frame[23] != TCP or 14 + (frame[16] << 8 | frame[17]) != size:
        return None
    flags, start = frame[_L4 + 13], _L4 + (frame[_L4 + 12] >> 4) * 4
    if (frame[20] << 8 | frame[21]) & 0x3FFF or flags & ~(_ACK | _PSH) or not flags & _ACK or not 54 <= start < size:
        return None
    key = b"".join(
        (frame[:16], frame[20:24], frame[26:38], frame[42:47], frame[48:50], frame[52:start])
    )  # all but length, identification, sequence number, flags and checksums
    return key, int.from_bytes(frame[38:42], "big"), start
