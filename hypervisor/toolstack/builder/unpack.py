"""Bounded decompression of kernel payloads.

gzip, xz, lzma and bzip2 come with Python; zstd and lz4 need the libraries
`zstandard` and `lz4`, imported when first needed. The output never grows past
the limit that the caller gives, whatever the input says.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable

from hypervisor.errors import KernelInvalid, Unsupported

_CHUNK = 1 << 20
_MAX_DICTIONARY = 256 << 20  # bytes of decoder memory that a payload may ask for
_LZ4_LEGACY = 0x184C2102
_LZ4_BLOCK = 8 << 20


class _Damaged(Exception):
    """The stream is broken, ends early, or is longer than allowed."""


def compression_of(payload: memoryview | bytes) -> str | None:
    """Name of the format that the first bytes announce, or None."""
    head = bytes(payload[:9])
    for magic, kind in (
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"BZh", "bzip2"),
        (b"\x5d\x00\x00", "lzma"),
        (b"\x89LZO\x00", "lzo"),
    ):
        if head.startswith(magic):
            return kind
    return None


def unpack(payload: memoryview, limit: int, name: str) -> bytes:
    """Decompress `payload`, which ends with its unpacked size as Linux's build appends it (not needed for gzip).

    :param limit: most bytes of output.
    :raises KernelInvalid: unknown format, damaged stream, or more output than `limit`.
    :raises Unsupported: the format needs a library that is not installed.
    """
    kind = compression_of(payload)
    decoder = _DECODERS.get(kind or "")
    if kind is None:
        raise KernelInvalid(f"{name} is damaged: its compressed part has an unknown format; copy or download it again")
    if decoder is None:
        raise Unsupported(
            f"{name} is compressed with {kind}, which is not supported: use a gzip, xz, zstd or lz4 kernel"
        )
    try:
        return decoder(payload, limit)
    except ModuleNotFoundError as exc:
        cure = {"zstd": "zstandard", "lz4": "lz4"}[kind]
        raise Unsupported(
            f"{name} is compressed with {kind} and the Python library {cure} is missing: pip install {cure}"
        ) from exc
    except _Damaged as exc:
        raise KernelInvalid(f"{name} is damaged: its {kind} data {exc}; copy or download it again") from exc


def _gzip(payload: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(31)
    try:
        data = stream.decompress(payload, limit + 1)
    except zlib.error as exc:
        raise _Damaged("is corrupt") from exc
    return _complete(data, stream.eof, limit)


def _pump(stream: lzma.LZMADecompressor | bz2.BZ2Decompressor, payload: memoryview, limit: int) -> bytes:
    out: list[bytes] = []
    total = 0
    feed: memoryview | bytes = payload
    try:
        while not stream.eof and total <= limit:
            piece = stream.decompress(feed, min(16 * _CHUNK, limit + 1 - total))
            feed = b""
            if not piece and not stream.eof:
                break
            out.append(piece)
            total += len(piece)
    except (lzma.LZMAError, OSError, EOFError, ValueError) as exc:
        raise _Damaged("is corrupt") from exc
    return _complete(b"".join(out), stream.eof, limit)


def _xz(payload: memoryview, limit: int) -> bytes:
    return _pump(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_DICTIONARY), payload, limit)


def _lzma(payload: memoryview, limit: int) -> bytes:
    return _pump(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MAX_DICTIONARY), payload, limit)


def _bzip2(payload: memoryview, limit: int) -> bytes:
    return _pump(bz2.BZ2Decompressor(), payload, limit)


def _zstd(payload: memoryview, limit: int) -> bytes:
    import zstandard

    stream = zstandard.ZstdDecompressor(max_window_size=_MAX_DICTIONARY // 2).decompressobj()
    out: list[bytes] = []
    total = at = 0
    try:
        while not stream.eof and total <= limit and at < len(payload):
            # A kilobyte at a time: it can grow to 33 MiB (blocks of one repeated byte), and that has no limit to give.
            piece = stream.decompress(payload[at : at + 1024])
            at += 1024
            out.append(piece)
            total += len(piece)
    except zstandard.ZstdError as exc:
        raise _Damaged("is corrupt") from exc
    left = len(stream.unused_data) + max(len(payload) - at, 0)
    # Often without a checksum, so a cut shows only by where the stream ends: before the 4 bytes of the size.
    return _complete(b"".join(out), (stream.eof and left == 4) or total > limit, limit)


def _lz4(payload: memoryview, limit: int) -> bytes:
    """The legacy frame: a magic, then blocks of at most 8 MiB each behind a 32-bit length."""
    from lz4 import block  # type: ignore[import-untyped]

    out: list[bytes] = []
    total, at = 0, 4
    end = len(payload) - 4  # the uncompressed size follows the last block
    while at + 4 <= end:
        (size,) = struct.unpack_from("<I", payload, at)
        at += 4
        if size == _LZ4_LEGACY:
            continue
        if size == 0 or at + size > end:
            raise _Damaged("ends early")
        try:
            piece = block.decompress(payload[at : at + size], uncompressed_size=_LZ4_BLOCK)
        except block.LZ4BlockError as exc:
            raise _Damaged("is corrupt") from exc
        at += size
        out.append(piece)
        total += len(piece)
        if total > limit:
            break
    return _complete(b"".join(out), at == end or total > limit, limit)


def _complete(data: bytes, ended: bool, limit: int) -> bytes:
    if len(data) > limit:
        raise _Damaged(f"grows past {limit} bytes")
    if not ended:
        raise _Damaged("ends early")
    return data


_DECODERS: dict[str, Callable[[memoryview, int], bytes]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _lzma,
    "bzip2": _bzip2,
    "zstd": _zstd,
    "lz4": _lz4,
}
