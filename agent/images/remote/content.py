"""What a fetched file holds: whether it is what it was called, and nothing in it reaches out of it or swells.

A format is never guessed. What was declared is compared with what is there, and a disk that was declared raw must
not look like a container, which somebody further on might open as one.
Sources: QEMU's docs/interop/qcow2.txt, Linux's Documentation/arch/x86/boot.rst and the formats' own magic numbers.
"""

from __future__ import annotations

import bz2
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from agent.errors import InstructionError

SECTOR = 512
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">QQQII")
_EXTENSION_END, _EXTENSION_DATA_FILE, _EXTENSION_LUKS = 0, 0x44415441, 0x0537BE77
_DIRTY, _CORRUPT, _EXTERNAL_DATA = 1 << 0, 1 << 1, 1 << 2
_KNOWN_INCOMPATIBLE = _DIRTY | 1 << 3 | 1 << 4  # compression type, extended L2 entries
_MAX_L1 = 32 << 20
"""QEMU's own bound (QCOW_MAX_L1_SIZE), bytes."""
_CONTAINERS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"BZh", "bzip2"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\x03\x04", "zip"),
)
_RAMDISKS = (
    b"070701", b"070702", b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"\x89LZO",
    b"\x5d\x00\x00", b"hsqs",
)  # fmt: skip
_BLOCK = 1 << 20


def inspect(path: Path, image_format: str, *, max_disk: int, max_unpacked: int, name: str) -> int:
    """Size of the disk that a whole file holds; of a kernel or ramdisk, of the file. Bytes.

    :param max_disk: largest disk, `max_unpacked` most that a kernel may unpack to, bytes. :param name: for messages.
    :raises InstructionError: ``image.invalid``: another format, or hostile; ``image.too_large``.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        if image_format == "qcow2":
            return _qcow2(fd, size, max_disk, name)
        if image_format == "raw":
            return _raw(fd, size, max_disk, name)
        if image_format == "kernel":
            return _kernel(fd, size, max_unpacked, name)
        if not os.pread(fd, 8, 0).startswith(_RAMDISKS):
            raise _invalid(name, "is no ramdisk: neither a cpio archive nor a known compression: give another")
        return size
    finally:
        os.close(fd)


def _invalid(name: str, text: str) -> InstructionError:
    return InstructionError("image.invalid", f"{name} {text}")


def _check_disk(size: int, most: int, name: str) -> int:
    if size > most:
        text = f"{name} holds a disk of {size >> 20} MiB, more than {most >> 20}: see [images] max_disk_mib"
        raise InstructionError("image.too_large", text)
    if size == 0 or size % SECTOR:
        raise _invalid(name, f"holds a disk of {size} bytes: a disk has whole sectors of {SECTOR} bytes, at least one")
    return size


def _raw(fd: int, size: int, most: int, name: str) -> int:
    head = os.pread(fd, 4096, 0)
    for offset, magic, what in _CONTAINERS:
        if head[offset : offset + len(magic)] == magic:
            raise _invalid(name, f"was called raw and is {what}: give that format, or unpack and convert it before")
    if os.pread(fd, 8, max(0, size - SECTOR)) == b"conectix":
        raise _invalid(name, "was called raw and is VHD: convert it before")
    return _check_disk(size, most, name)


def _qcow2(fd: int, size: int, most: int, name: str) -> int:
    head = os.pread(fd, 1 << 16, 0)
    if len(head) < 104 or head[:4] != b"QFI\xfb":
        raise _invalid(name, "is no qcow2 image: give its own format")
    _, version, backing, _, bits, disk, crypt, l1_entries, l1_at, table_at, tables, _, _ = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise _invalid(name, f"is qcow2 of version {version}: convert it before")
    if backing:
        raise _invalid(name, "has a backing file, which a fetched image must not: flatten it with qemu-img convert")
    if crypt:
        raise _invalid(name, "is encrypted: convert it before")
    length = 72
    if version == 3:
        incompatible, _, _, _, length = _FEATURES.unpack_from(head, 72)
        _check_features(incompatible, name)
    if not 9 <= bits <= 21 or not 72 <= length <= min(len(head), 1 << bits) or length % 8:
        raise _invalid(name, "has a damaged header: make it again")
    _check_extensions(head, length, 1 << bits, name)
    disk = _check_disk(disk, most, name)
    # What a disk of that size needs, so that a header cannot promise less or more than its tables can.
    entry = 16 if version == 3 and incompatible & 1 << 4 else 8
    needed = -(-disk // ((1 << bits) * ((1 << bits) // entry)))
    cluster = 1 << bits
    fits = l1_at % cluster == 0 and table_at % cluster == 0 and cluster <= table_at and cluster <= l1_at
    if l1_entries < needed or l1_entries * 8 > _MAX_L1 or l1_at + l1_entries * 8 > size:
        fits = False
    if not fits or tables == 0 or table_at + tables * cluster > -(-size // cluster) * cluster:
        raise _invalid(name, "has tables that do not fit into it: it is damaged or cut short")
    return disk


def _check_features(incompatible: int, name: str) -> None:
    if incompatible & _EXTERNAL_DATA:
        raise _invalid(name, "keeps its data in another file, which a fetched image must not: convert it before")
    if incompatible & _CORRUPT:
        raise _invalid(name, "is marked corrupt: repair it with qemu-img check -r all")
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise _invalid(name, f"has unknown incompatible features ({incompatible:#x}): convert it before")


def _check_extensions(head: bytes, at: int, end: int, name: str) -> None:
    while at + 8 <= min(len(head), end):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _EXTENSION_END:
            return
        if kind == _EXTENSION_DATA_FILE:
            raise _invalid(name, "names a file for its data, which a fetched image must not: convert it before")
        if kind == _EXTENSION_LUKS:
            raise _invalid(name, "is encrypted: convert it before")
        if at + 8 + length > end:
            raise _invalid(name, "has a damaged header: make it again")
        at += 8 + -(-length // 8) * 8


def _kernel(fd: int, size: int, most: int, name: str) -> int:
    head = os.pread(fd, 1024, 0)
    if head[:4] == b"\x7fELF":
        return size
    if head[:2] == b"\x1f\x8b":
        _unpack(fd, 0, size, most, name)
        return size
    if len(head) < 0x260 or head[0x202:0x206] != b"HdrS":
        raise _invalid(name, "is no kernel: neither ELF, nor gzip, nor a bzImage: give another")
    start = (head[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", head, 0x248)
    at = start * SECTOR + offset
    if struct.unpack_from("<H", head, 0x206)[0] < 0x208 or length < 8 or at + length > size:
        raise _invalid(name, "is no bzImage that can be unpacked: it is too old, damaged or cut short")
    _unpack(fd, at, length, most, name)
    return size


def _unpack(fd: int, at: int, length: int, most: int, name: str) -> None:
    """Unpack it into nothing, to see how much it becomes."""
    magic = os.pread(fd, 8, at)
    total = 0
    try:
        for piece in _pieces(magic, fd, at, length):
            total += piece
            if total > most:
                raise InstructionError(
                    "image.too_large",
                    f"{name} unpacks to more than {most >> 20} MiB: see [images] max_unpacked_kernel_mib",
                )
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError, EOFError) as exc:
        raise _invalid(name, f"is damaged: it cannot be unpacked ({' '.join(str(exc).split())[:100]})") from exc


def _pieces(magic: bytes, fd: int, at: int, length: int) -> Iterator[int]:
    """Lengths of what comes out, at most `_BLOCK` each."""
    if magic[:2] == b"\x1f\x8b":
        return _bounded(zlib.decompressobj(31), lambda item: bytes(item.unconsumed_tail), fd, at, length)
    if magic[:6] == b"\xfd7zXZ\0" or magic[:3] == b"\x5d\0\0":
        return _bounded(lzma.LZMADecompressor(memlimit=256 << 20), lambda item: b"", fd, at, length)
    if magic[:3] == b"BZh":
        return _bounded(bz2.BZ2Decompressor(), lambda item: b"", fd, at, length)
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        return _zstd(fd, at, length)
    if magic[:4] == b"\x02\x21\x4c\x18":
        return _lz4(fd, at, length)
    if magic[:4] == b"\x7fELF":
        return iter((length,))
    raise ValueError("its compression is not known")


def _read(fd: int, at: int, length: int) -> Iterator[bytes]:
    end = at + length
    while at < end:
        data = os.pread(fd, min(1 << 16, end - at), at)
        if not data:
            return
        yield data
        at += len(data)


def _bounded(item: Any, rest: Callable[[Any], bytes], fd: int, at: int, length: int) -> Iterator[int]:
    """Of zlib, lzma and bz2, whose decompressors all take the most that may come out at once."""
    for data in _read(fd, at, length):
        out = item.decompress(data, _BLOCK)
        yield len(out)
        while not item.eof and (len(out) == _BLOCK or rest(item)):
            out = item.decompress(rest(item), _BLOCK)
            yield len(out)
        if item.eof:
            return
    raise EOFError("it is cut short")


def _zstd(fd: int, at: int, length: int) -> Iterator[int]:
    class Reader:
        def __init__(self) -> None:
            self._data = _read(fd, at, length)

        def read(self, _size: int = -1) -> bytes:
            return next(self._data, b"")

    reader: Any = Reader()
    with zstandard.ZstdDecompressor(max_window_size=1 << 28).stream_reader(reader) as stream:
        while out := stream.read(_BLOCK):
            yield len(out)


def _lz4(fd: int, at: int, length: int) -> Iterator[int]:
    """The legacy frame that kernels use: blocks of at most 8 MiB, counted as if each were full but the last."""
    end = at + length
    at += 4
    blocks = 0
    while at + 4 <= end:
        (packed,) = struct.unpack("<I", os.pread(fd, 4, at))
        if not packed or packed > 9 << 20 or at + 4 + packed > end:
            break  # Linux puts the unpacked size behind the last one
        at += 4 + packed
        blocks += 1
        if blocks > 1:
            yield 8 << 20
    yield 1
