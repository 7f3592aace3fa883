"""An initial ramdisk, checked: a truncated one would only show as a panic inside the guest.

A Linux initramfs is one or more cpio archives, each plain or compressed, with
zeros between (Documentation/driver-api/early-userspace/buffer-format.rst).
What can be checked without unpacking is: cpio entries are walked, zstd and lz4
blocks too, an xz footer and a bzip2 end mark are looked for; gzip alone must be
unpacked to know. Other guests may be given anything.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable

from hypervisor.errors import RamdiskInvalid
from hypervisor.toolstack.builder.files import read_file
from hypervisor.toolstack.builder.unpack import compression_of

MAX_RAMDISK = 1 << 30
"""Largest ramdisk file, bytes."""
MAX_CHECKED = 1 << 30
"""Most bytes that a gzip check unpacks; what is larger passes unchecked."""
_MAX_ENTRIES = 1 << 20
_NOT_ZERO = re.compile(rb"[^\0]")
_BZIP2_END = 0x177245385090


class _Broken(Exception):
    """What is wrong, as the end of a sentence."""


def load_ramdisk(path: str | os.PathLike[str], *, guest_os: str = "linux") -> bytes:
    """Read a ramdisk and check it.

    :param guest_os: the kernel's GUEST_OS note: the format is only known for Linux.
    :raises RamdiskInvalid: missing, empty, too large, truncated or (Linux) of no known format.
    """
    data = read_file(path, "ramdisk", RamdiskInvalid, MAX_RAMDISK)
    check_ramdisk(data, os.fspath(path), guest_os=guest_os)
    return data


def check_ramdisk(data: bytes, name: str, *, guest_os: str = "linux") -> None:
    """:raises RamdiskInvalid: empty, truncated, damaged, or (Linux) of no known format."""
    if not data:
        raise RamdiskInvalid(f"ramdisk {name} is empty: build it again, or leave the ramdisk out")
    try:
        at = 0
        while (found := _NOT_ZERO.search(data, at)) is not None:
            start = found.start()
            end = _check_part(data, start)
            if end is None:
                if start == 0 and guest_os.startswith("linux") and not _is_filesystem(data):
                    raise RamdiskInvalid(
                        f"ramdisk {name} is no cpio archive, compressed or not: give an initramfs (initrd.img)"
                    )
                return
            at = end
    except (_Broken, struct.error, ValueError, IndexError) as exc:
        what = exc if isinstance(exc, _Broken) else "is damaged"
        raise RamdiskInvalid(f"ramdisk {name} {what}: build or copy it again") from exc


def _check_part(data: bytes, at: int) -> int | None:
    """Check the archive that starts at `at`; its end, or None where that is not known."""
    if data.startswith((b"070701", b"070702"), at):
        return _cpio(data, at)
    kind = compression_of(data[at : at + 16])
    checker = _CHECKERS.get(kind or "")
    return checker(data, at) if checker else None


def _cpio(data: bytes, at: int) -> int | None:
    for _ in range(_MAX_ENTRIES):
        header = data[at : at + 110]
        if len(header) < 110:
            raise _Broken("is truncated: its cpio archive has no end")
        if header[:6] not in (b"070701", b"070702"):
            raise _Broken("is damaged: a cpio entry does not start with its magic")
        size, name_size = int(header[54:62], 16), int(header[94:102], 16)
        name_at = at + 110
        at = (name_at + name_size + 3) & ~3
        if not 0 < name_size <= 4096 or size < 0:
            raise _Broken("is damaged: a cpio entry has no name")
        if data[name_at : name_at + 11] == b"TRAILER!!!\0" and name_size == 11:
            return at
        at = (at + size + 3) & ~3
        if at > len(data):
            raise _Broken("is truncated: a file in its cpio archive ends past the end")
    return None


def _gzip(data: bytes, at: int) -> int | None:
    stream = zlib.decompressobj(31)
    view, total = memoryview(data), 0
    while not stream.eof:
        feed = stream.unconsumed_tail or view[at : at + (1 << 18)]
        if not stream.unconsumed_tail:
            at += len(feed)
        if not feed:
            raise _Broken("is truncated: its gzip data ends early")
        try:
            total += len(stream.decompress(feed, 1 << 20))
        except zlib.error as exc:
            raise _Broken("is damaged: its gzip data is corrupt") from exc
        if total > MAX_CHECKED:
            return None
    return at - len(stream.unused_data)


def _xz(data: bytes, at: int) -> int | None:
    end = len(data)
    while end - 4 > at and data[end - 4 : end] == bytes(4):
        end -= 4
    if end - at < 32 or data[end - 2 : end] != b"YZ":
        raise _Broken("is truncated: its xz data has no end")
    crc, backward = struct.unpack_from("<II", data, end - 12)
    index = end - 12 - (backward + 1) * 4
    if crc != zlib.crc32(data[end - 8 : end - 2]) or index <= at or data[index] != 0:
        raise _Broken("is damaged: the end of its xz data is corrupt")
    return len(data)


def _zstd(data: bytes, at: int) -> int | None:
    """RFC 8878: a frame header, then blocks of which one is the last."""
    descriptor = data[at + 4]
    single = descriptor >> 5 & 1
    content_size = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at += 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + content_size
    last = False
    while not last:
        header = data[at : at + 3]
        if len(header) < 3:
            raise _Broken("is truncated: its zstd data ends early")
        value = int.from_bytes(header, "little")
        last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
        if kind == 3:
            raise _Broken("is damaged: its zstd data is corrupt")
        at += 3 + (1 if kind == 1 else size)
    at += 4 if descriptor & 4 else 0
    if at > len(data):
        raise _Broken("is truncated: its zstd data ends early")
    return at


def _lz4(data: bytes, at: int) -> int | None:
    at += 4
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if size == 0:
            return at
        at += 4
        if data.startswith(b"\x02\x21\x4c\x18", at - 4):
            continue
        at += size
        if at > len(data):
            raise _Broken("is truncated: its lz4 data ends early")
    return len(data)


def _bzip2(data: bytes, at: int) -> int | None:
    # The end mark and a 32-bit checksum close the stream at any bit; zeros may follow.
    tail = int.from_bytes(data[at:].rstrip(b"\0")[-16:] + bytes(6), "big")
    if not any(tail >> bit & 0xFFFFFFFFFFFF == _BZIP2_END for bit in range(32, 128)):
        raise _Broken("is truncated: its bzip2 data has no end")
    return len(data)


def _is_filesystem(data: bytes) -> bool:
    """What Linux mounts as an old-style initrd: ext2, romfs, cramfs, squashfs."""
    head = data[:16]
    return (
        data[1080:1082] == b"\x53\xef"
        or head.startswith((b"-rom1fs-", b"\x45\x3d\xcd\x28", b"\x28\xcd\x3d\x45", b"hsqs"))
        or compression_of(head) is not None
    )


_CHECKERS: dict[str, Callable[[bytes, int], int | None]] = {
    "gzip": _gzip,
    "xz": _xz,
    "zstd": _zstd,
    "lz4": _lz4,
    "bzip2": _bzip2,
}
