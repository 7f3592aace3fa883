"""Responses on their way into a ring, kept where a driver's death does not reach: a file.

A response overwrites the request in its slot before ``rsp_prod`` tells of it. A driver killed between the two
leaves a slot that is neither. So the responses of a batch are written here first; the next driver finds
``rsp_prod`` where the batch began and puts them into the ring again. If it finds ``rsp_prod`` anywhere else, the
batch is history.

A record is one write with a checksum: torn, it counts as not written, and then no slot was touched yet.
The file is no protection against the end of the machine, for that ends the guest as well.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence

from hypervisor.devices.block.ring import BlkRing

RECORD_BYTES = 16384
_HEAD = struct.Struct("<I16sII")  # checksum of the rest, key, index of the first response, how many
_RESPONSE = struct.Struct("<QBxh4x")

_LOST_AT = 4 * RECORD_BYTES
JOURNAL_BYTES = _LOST_AT + 1

Response = tuple[int, int, int]


def note_lost(fd: int, lost: bool) -> None:
    """Write down that writes which the guest was told to be done may be lost: the next flush must fail."""
    os.pwrite(fd, b"L" if lost else b"\0", _LOST_AT)


def is_lost(fd: int) -> bool:
    """What `note_lost` said."""
    return os.pread(fd, 1, _LOST_AT) == b"L"


def ring_text(fd: int) -> str:
    """All records, as text for another host's journal of the same device."""
    return base64.b64encode(zlib.compress(os.pread(fd, _LOST_AT, 0), 1)).decode()


def load_ring(fd: int, text: str) -> None:
    """What `ring_text` gave; what is none is left out, as a record that is torn."""
    with contextlib.suppress(ValueError, zlib.error):
        os.pwrite(fd, zlib.decompressobj().decompress(base64.b64decode(text), _LOST_AT), 0)


def connection_key(*parts: object) -> bytes:
    """16 bytes that tell this connection of this guest from others."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


class Journal:
    """One queue's record.

    :param fd: the device's journal file; not owned.
    :param queue: number of the queue, 0...
    """

    def __init__(self, fd: int, queue: int, key: bytes) -> None:
        self._fd = fd
        self._at = queue * RECORD_BYTES
        self._key = key

    def write(self, first: int, responses: Sequence[Response]) -> None:
        """:param first: index in the ring of the first of them. :raises OSError: the disk is full."""
        pack = _RESPONSE.pack
        body = b"".join([pack(*response) for response in responses])
        rest = struct.pack("<16sII", self._key, first, len(responses)) + body
        data = struct.pack("<I", zlib.crc32(rest)) + rest
        if os.pwrite(self._fd, data, self._at) != len(data):
            raise OSError("the journal of a disk's ring could not be written whole")

    def recover(self, ring: BlkRing) -> bool:
        """Push what the driver before this one had not pushed to the end; whether there was something."""
        data = os.pread(self._fd, RECORD_BYTES, self._at)
        if len(data) < _HEAD.size:
            return False
        checksum, key, first, count = _HEAD.unpack_from(data)
        end = _HEAD.size + count * _RESPONSE.size
        if key != self._key or count > ring.size or end > len(data) or checksum != zlib.crc32(data[4:end]):
            return False
        if first != ring.done or ring.pending() < count:
            return False
        ring.respond(list(_RESPONSE.iter_unpack(data[_HEAD.size : end])))
        return True

    def clear(self) -> None:
        """The connection has ended in order: nothing is to be recovered."""
        os.pwrite(self._fd, bytes(_HEAD.size), self._at)
