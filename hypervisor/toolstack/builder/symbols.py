"""The symbol table that BSD kernels ask for by the Xen note BSD_SYMTAB, behind the loaded image.

::

    size (4 bytes) | ELF header | section headers: none, symbols, strings | symbols | strings

After Xen's libelf (elf_load_bsdsyms): the header is a copy of the file's own that knows only those sections, and
offsets count from it.
"""

from __future__ import annotations

import dataclasses
import struct

from hypervisor.toolstack.builder.elf import ElfImage

_SHT_SYMTAB, _SHT_STRTAB = 2, 3
_SECTIONS_AT = 64  # from the ELF header, whichever class it is
_HEADERS = 4 + 64 + 3 * 64


@dataclasses.dataclass(frozen=True, slots=True)
class _Class:
    """Where the fields of ELF and section headers lie: (offset, format)."""

    align: int
    ehdr: int
    shdr: int
    version: tuple[int, str]
    phoff: tuple[int, str]
    shoff: tuple[int, str]
    counts: int
    """Of six 16-bit fields: e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx."""
    sh_offset: tuple[int, str]
    sh_size: tuple[int, str]
    sh_link: int


_CLASSES = {
    32: _Class(4, 52, 40, (20, "<I"), (28, "<I"), (32, "<I"), 40, (16, "<I"), (20, "<I"), 24),
    64: _Class(8, 64, 64, (20, "<I"), (32, "<Q"), (40, "<Q"), 52, (24, "<Q"), (32, "<Q"), 40),
}


def _get(data: bytes | bytearray | memoryview, field: tuple[int, str]) -> int:
    return int(struct.unpack_from(field[1], data, field[0])[0])


def _put(data: bytearray, field: tuple[int, str], value: int) -> None:
    struct.pack_into(field[1], data, field[0], value)


def symbol_blob(image: ElfImage) -> bytes:
    """What to place behind the image, at a multiple of 4 (32-bit) or 8 bytes; empty when the file has no symbols."""
    kind = _CLASSES[image.bits]
    found = _find(image, kind)
    if found is None:
        return b""
    symbols, strings = found

    def aligned(value: int) -> int:
        return -(-value // kind.align) * kind.align

    header = bytearray(bytes(image.data[: kind.ehdr]).ljust(_SECTIONS_AT, b"\0"))
    _put(header, kind.version, 1)
    _put(header, kind.phoff, 0)
    _put(header, kind.shoff, _SECTIONS_AT)
    struct.pack_into("<6H", header, kind.counts, kind.ehdr, 0, 0, kind.shdr, 3, 0)
    parts = [_content(image, kind, symbols), _content(image, kind, strings)]
    at = aligned(_HEADERS)
    for section, part in zip(found, parts, strict=True):
        _put(section, kind.sh_offset, at - 4)
        at = aligned(at + len(part))
    struct.pack_into("<I", symbols, kind.sh_link, 2)
    size = _get(strings, kind.sh_offset) + len(parts[1])
    blob = struct.pack("<I", size) + header + bytes(kind.shdr) + symbols + strings
    blob = blob.ljust(aligned(_HEADERS), b"\0") + parts[0]
    return bytes(blob.ljust(aligned(len(blob)), b"\0") + parts[1]).ljust(at, b"\0")


def _content(image: ElfImage, kind: _Class, section: bytearray) -> bytes:
    start = _get(section, kind.sh_offset)
    return bytes(image.data[start : start + _get(section, kind.sh_size)])


def _find(image: ElfImage, kind: _Class) -> tuple[bytearray, bytearray] | None:
    """Copies of the section headers of the first symbol table and its strings."""
    table = _get(image.data, kind.shoff)
    count = int(struct.unpack_from("<H", image.data, kind.counts + 8)[0])

    def header(number: int) -> bytearray | None:
        at = table + number * kind.shdr
        if not 0 < number < count or at + kind.shdr > len(image.data):
            return None
        section = bytearray(image.data[at : at + kind.shdr])
        inside = _get(section, kind.sh_offset) + _get(section, kind.sh_size) <= len(image.data)
        return section if inside else None

    for number in range(1, count):
        symbols = header(number)
        if symbols is None or struct.unpack_from("<I", symbols, 4)[0] != _SHT_SYMTAB:
            continue
        strings = header(int(struct.unpack_from("<I", symbols, kind.sh_link)[0]))
        if strings is not None and struct.unpack_from("<I", strings, 4)[0] == _SHT_STRTAB:
            return symbols, strings
    return None
