"""Core dumps in Xen's dump-core format (``docs/misc/dump-core-format.txt`` of Xen 4.17), as ``xl dump-core`` writes.

It is chosen because ``crash`` reads it, and because it holds the machine frame numbers without which the
page tables of a PV guest mean nothing. gdb wants virtual addresses and program headers;
``tools/core_to_gdb.py`` makes such a file from this one.

Run as a program it writes one dump, so that neither gigabytes nor a slow disk hold up the host process::

    python -m hypervisor.toolstack.coredump MEMORY_FD OUT_FD < header.json
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Any

PAGE_SIZE = 4096

EM_386, EM_X86_64 = 3, 62
ET_CORE = 4
SHT_PROGBITS, SHT_STRTAB, SHT_NOTE = 1, 3, 7

NOTE_NONE, NOTE_HEADER, NOTE_XEN_VERSION, NOTE_FORMAT_VERSION = 0x2000000, 0x2000001, 0x2000002, 0x2000003
"""XEN_ELFNOTE_DUMPCORE_* (public/elfnote.h)."""
MAGIC_PV = 0xF00FEBED
"""XC_CORE_MAGIC."""
FORMAT_VERSION = 1

MAX_PFN = 1 << 40
"""A guest may write what it likes into its entries of the machine-to-physical table."""

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
SHDR = struct.Struct("<IIQQQQIIQQ")
SECTIONS = (".shstrtab", ".note.Xen", ".xen_prstatus", ".xen_shared_info", ".xen_p2m", ".xen_pages")

_XEN_VERSION = struct.Struct("<QQ16s64s16s32s32s1024s64sQQ")
_CHUNK = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class CoreHeader:
    """All but the memory.

    :ivar contexts: ``struct vcpu_guest_context`` of each vCPU, of the guest's word size (`bits`).
    :ivar base_mfn: machine frame at offset 0 of the domain's memory; `pages` how many from there may be the guest's.
    :ivar shared_info, m2p: byte offsets in it: the shared_info page, the M2P entry of `base_mfn`.
    """

    bits: int
    base_mfn: int
    pages: int
    shared_info: int
    m2p: int
    contexts: tuple[bytes, ...]

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "contexts": [base64.b64encode(context).decode() for context in self.contexts]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CoreHeader:
        return cls(**{**data, "contexts": tuple(base64.b64decode(text) for text in data["contexts"])})


def write(header: CoreHeader, memory: int, out: int) -> int:
    """:param memory: descriptor of the domain's memory; `out` of an empty file, positioned at its start.

    :returns: number of pages in the dump. :raises OSError: from either.
    """
    numbers = _read(memory, header.m2p, header.pages * (8 if header.bits == 64 else 4))
    pages = p2m(numbers, header.bits)
    shared_info = _read(memory, header.shared_info, PAGE_SIZE)
    parts = [_names(), _notes(header, len(pages)), b"".join(header.contexts), shared_info]
    parts.append(_p2m_section(pages, header.base_mfn))
    offset = EHDR.size + SHDR.size * (len(SECTIONS) + 1)
    offsets = []
    for part in parts:
        offset = -(-offset // 16) * 16
        offsets.append(offset)
        offset += len(part)
    start = -(-offset // PAGE_SIZE) * PAGE_SIZE
    sizes = [*map(len, parts), len(pages) * PAGE_SIZE]
    _write_at(out, 0, _headers(header.bits, [*offsets, start], sizes))
    for offset, part in zip(offsets, parts, strict=True):
        _write_at(out, offset, part)
    for position, index, count in runs(pages):
        copy_sparse(memory, index * PAGE_SIZE, out, start + position * PAGE_SIZE, count * PAGE_SIZE)
    os.ftruncate(out, start + len(pages) * PAGE_SIZE)
    return len(pages)


def p2m(entries: bytes, bits: int) -> list[tuple[int, int]]:
    """(pfn, index of the frame) of each frame that the guest has, by pfn.

    :param entries: of the M2P, from the domain's first frame on.
    """
    values = array("Q" if bits == 64 else "I", entries)
    most = MAX_PFN if bits == 64 else 0xFFFF_FFFF
    return sorted((pfn, index) for index, pfn in enumerate(values) if pfn < most)


def runs(pages: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(position in the dump, index of the frame, count) of frames that follow each other in both."""
    begin = 0
    for position in range(1, len(pages) + 1):
        if position == len(pages) or pages[position][1] != pages[position - 1][1] + 1:
            yield begin, pages[begin][1], position - begin
            begin = position


def _names() -> bytes:
    return b"\0" + b"".join(name.encode() + b"\0" for name in SECTIONS)


def _headers(bits: int, offsets: list[int], sizes: list[int]) -> bytes:
    machine = EM_X86_64 if bits == 64 else EM_386
    ident = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    count = len(SECTIONS) + 1
    data = EHDR.pack(ident, ET_CORE, machine, 1, 0, 0, EHDR.size, 0, EHDR.size, 0, 0, SHDR.size, count, 1)
    data += bytes(SHDR.size)
    kinds = {".shstrtab": SHT_STRTAB, ".note.Xen": SHT_NOTE}
    entries = {".xen_p2m": 16, ".xen_pages": PAGE_SIZE, ".xen_shared_info": PAGE_SIZE}
    for name, offset, size in zip(SECTIONS, offsets, sizes, strict=True):
        at = _names().index(name.encode() + b"\0")
        data += SHDR.pack(at, kinds.get(name, SHT_PROGBITS), 0, 0, offset, size, 0, 0, 16, entries.get(name, 0))
    return data


def _notes(header: CoreHeader, pages: int) -> bytes:
    described = struct.pack("<4Q", MAGIC_PV, len(header.contexts), pages, PAGE_SIZE)
    version = _XEN_VERSION.pack(4, 17, b"", b"python", b"reeve", b"", b"", b"xen-3.0-x86_64", b"", 0, PAGE_SIZE)
    return b"".join(
        (
            _note(NOTE_NONE, b""),
            _note(NOTE_HEADER, described),
            _note(NOTE_XEN_VERSION, version),
            _note(NOTE_FORMAT_VERSION, struct.pack("<Q", FORMAT_VERSION)),
        )
    )


def _note(kind: int, content: bytes) -> bytes:
    return struct.pack("<III4s", 4, len(content), kind, b"Xen\0") + content


def _p2m_section(pages: list[tuple[int, int]], base_mfn: int) -> bytes:
    flat = array("Q", bytes(16 * len(pages)))
    for position, (pfn, index) in enumerate(pages):
        flat[2 * position], flat[2 * position + 1] = pfn, base_mfn + index
    return flat.tobytes()


def _read(descriptor: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(descriptor, min(size, _CHUNK), offset)
        if not part:
            raise OSError(errno.EIO, "the domain's memory ends early")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view[:_CHUNK], offset)
        view = view[done:]
        offset += done


def copy_sparse(source: int, offset: int, target: int, position: int, size: int) -> None:
    """Copy what is there; holes stay holes."""
    end = offset + size
    while offset < end:
        try:
            begin = os.lseek(source, offset, os.SEEK_DATA)
            hole = os.lseek(source, begin, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing more
                return
            raise
        if begin >= end:
            return
        position, offset = position + begin - offset, begin
        os.lseek(target, position, os.SEEK_SET)
        while offset < min(hole, end):
            count = os.sendfile(target, source, offset, min(hole, end) - offset)
            if not count:
                raise OSError(errno.EIO, "the domain's memory ends early")
            offset += count
            position += count


def main(arguments: list[str]) -> int:
    memory, out = map(int, arguments)
    try:
        write(CoreHeader.from_json(json.load(sys.stdin)), memory, out)
        os.fsync(out)
    except OSError as exc:
        sys.stderr.write(exc.strerror or str(exc))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
