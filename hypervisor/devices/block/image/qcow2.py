"""The header of a qcow2 image: what must be known before a daemon is let near it.

Source: QEMU's docs/interop/qcow2.txt. The data are the affair of QEMU's daemon.
"""

from __future__ import annotations

import dataclasses
import os
import struct

from hypervisor.errors import ImageInvalid

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQI")
_FEATURES = struct.Struct(">QQQII")
_HEADER_READ = 65536
_BACKING_FORMAT = 0xE2792ACA
_CORRUPT, _EXTERNAL_DATA = 1 << 1, 1 << 2
_KNOWN_INCOMPATIBLE = 1 << 0 | 1 << 3 | 1 << 4  # dirty, compression type, extended L2
MAX_NAME = 1023


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """:ivar size: of the disk, bytes. :ivar backing: its name as written there, "" for none."""

    size: int
    backing: str
    backing_format: str


def read_header(fd: int, path: str) -> Header:
    """:raises ImageInvalid: no qcow2 image, or one that refers to more than backing files."""
    data = os.pread(fd, _HEADER_READ, 0)
    if len(data) < 72 or data[:4] != MAGIC:
        raise ImageInvalid(f"image {path} is no qcow2 image: give format raw, or convert it with qemu-img convert")
    _, version, name_at, name_length, _, size, crypt = _HEADER.unpack_from(data)
    if version not in (2, 3):
        raise ImageInvalid(f"image {path} is qcow2 of version {version}: convert it with qemu-img convert")
    if crypt:
        raise ImageInvalid(f"image {path} is encrypted, which is not supported: convert it with qemu-img convert")
    length = 72
    if version == 3:
        incompatible, _, _, _, length = _FEATURES.unpack_from(data, 72)
        if incompatible & _CORRUPT:
            raise ImageInvalid(f"image {path} is marked corrupt: repair it with qemu-img check -r all")
        if incompatible & _EXTERNAL_DATA:
            raise ImageInvalid(f"image {path} keeps its data in another file, which is not supported: convert it")
        if incompatible & ~(_KNOWN_INCOMPATIBLE | _CORRUPT | _EXTERNAL_DATA):
            raise ImageInvalid(f"image {path} uses features of a newer QEMU: convert it with qemu-img convert")
    if size == 0:
        raise ImageInvalid(f"image {path} is an empty disk: make it larger with qemu-img resize")
    backing, backing_format = "", ""
    if name_at:
        if name_length > MAX_NAME or not length <= name_at <= len(data) - name_length:
            raise ImageInvalid(f"image {path} has a damaged header: check it with qemu-img check")
        backing = os.fsdecode(data[name_at : name_at + name_length])
        backing_format = _extension(data[:name_at], length)
        if not backing or "\0" in backing:
            raise ImageInvalid(f"image {path} has a damaged header: check it with qemu-img check")
    return Header(size, backing, backing_format)


def _extension(data: bytes, at: int) -> str:
    """The backing format, "" if it is not told."""
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, at)
        at += 8
        if kind == 0 or at + length > len(data):
            break
        if kind == _BACKING_FORMAT:
            return data[at : at + length].decode("ascii", "replace")
        at += -(-length // 8) * 8
    return ""
