"""Parse ELF headers: segments to load, and the blobs where notes may be.

Both classes are read (32-bit PAE kernels too); nothing here knows Xen. The
file is untrusted: every offset is checked against its length, and the counts
are bounded.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct

from hypervisor.errors import KernelInvalid

MAGIC = b"\x7fELF"
EM_386 = 3
EM_X86_64 = 62
PF_X = 1
MAX_PROGRAM_HEADERS = 512
MAX_SECTIONS = 65535
MAX_EXTENT = 1 << 30
"""Most bytes between the lowest and the highest loaded physical address."""

_PT_LOAD = 1
_PT_NOTE = 4
_SHT_NOTE = 7
_SHF_EXECINSTR = 4
_SHT_NOBITS = 8
_ET_EXEC = 2
_ET_DYN = 3
_EHDR = {1: struct.Struct("<HHIIIIIHHHHHH"), 2: struct.Struct("<HHIQQQIHHHHHH")}
_PHDR = {1: struct.Struct("<IIIIIIII"), 2: struct.Struct("<IIQQQQQQ")}
_SHDR = {1: struct.Struct("<IIIIIIIIII"), 2: struct.Struct("<IIQQQQIIQQ")}


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD program header: `filesz` bytes at `offset` go to `paddr`, zeros follow up to `memsz`."""

    offset: int
    paddr: int
    filesz: int
    memsz: int
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    name: bytes
    type: int
    offset: int
    size: int
    code: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ElfImage:
    """What a loader needs of an ELF file.

    :ivar bits: 32 or 64.
    :ivar segments: loadable ones, by ascending physical address, not overlapping.
    :ivar pstart: lowest physical address loaded, bytes.
    :ivar pend: end of the highest one, bytes.
    """

    data: memoryview
    bits: int
    machine: int
    entry: int
    segments: tuple[Segment, ...]
    note_ranges: tuple[tuple[int, int], ...]
    sections: tuple[Section, ...]

    @property
    def pstart(self) -> int:
        return self.segments[0].paddr

    @property
    def pend(self) -> int:
        return max(s.paddr + s.memsz for s in self.segments)

    def section(self, name: bytes) -> memoryview | None:
        """Content of the first section of that name, or None."""
        for section in self.sections:
            if section.name == name and section.type != _SHT_NOBITS:
                return self.data[section.offset : section.offset + section.size]
        return None

    def code_ranges(self) -> tuple[tuple[int, int], ...]:
        """Physical (start, end) of what may be executed: the code sections, or whole segments without sections."""
        ranges: list[tuple[int, int]] = []
        for segment in self.segments:
            if not segment.flags & PF_X:
                continue
            end = segment.offset + segment.filesz
            inside = [s for s in self.sections if segment.offset <= s.offset and s.offset + s.size <= end and s.size]
            if not any(s.code for s in inside):
                ranges.append((segment.paddr, segment.paddr + segment.memsz))
            for section in inside:
                if section.code:
                    start = segment.paddr + section.offset - segment.offset
                    ranges.append((start, start + section.size))
        return tuple(ranges)

    def note_sections(self) -> list[memoryview]:
        return [self.data[s.offset : s.offset + s.size] for s in self.sections if s.type == _SHT_NOTE]

    def note_segments(self) -> list[memoryview]:
        return [self.data[start : start + size] for start, size in self.note_ranges]


def parse_elf(data: memoryview, name: str) -> ElfImage:
    """Read the headers of an ELF file.

    :param name: how messages call the file.
    :raises KernelInvalid: it is not a sound little-endian x86 ELF executable.
    """
    if len(data) < 64 or data[:4] != MAGIC:
        raise KernelInvalid(f"{name} is not an ELF file: give a Linux bzImage (vmlinuz) or an ELF kernel")
    klass, order = data[4], data[5]
    if klass not in (1, 2) or order != 1:
        raise _damaged(name, "its ELF class or byte order is not x86's")
    header = _EHDR[klass].unpack_from(data, 16)
    e_type, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = header
    if machine not in (EM_386, EM_X86_64) or (machine == EM_X86_64) != (klass == 2):
        raise KernelInvalid(f"{name} is built for another processor (ELF machine {machine}): give an x86-64 kernel")
    if e_type not in (_ET_EXEC, _ET_DYN):
        raise KernelInvalid(f"{name} is an ELF file of type {e_type}, not an executable: give a linked kernel")
    segments, notes = _program_headers(data, name, klass, phoff, phentsize, phnum)
    return ElfImage(
        data=data,
        bits=32 * klass,
        machine=machine,
        entry=entry,
        segments=segments,
        note_ranges=notes,
        sections=_sections(data, klass, shoff, shentsize, shnum, shstrndx),
    )


def _program_headers(
    data: memoryview, name: str, klass: int, phoff: int, phentsize: int, phnum: int
) -> tuple[tuple[Segment, ...], tuple[tuple[int, int], ...]]:
    if not 0 < phnum <= MAX_PROGRAM_HEADERS or phentsize < _PHDR[klass].size:
        raise _damaged(name, f"it has {phnum} program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > len(data):
        raise _damaged(name, "its program headers lie past the end of the file")
    segments: list[Segment] = []
    notes: list[tuple[int, int]] = []
    for index in range(phnum):
        fields = _PHDR[klass].unpack_from(data, phoff + index * phentsize)
        if klass == 2:
            kind, flags, offset, _, paddr, filesz, memsz, _ = fields
        else:
            kind, offset, _, paddr, filesz, memsz, flags, _ = fields
        if kind == _PT_LOAD and flags & 7 and memsz:
            if filesz > memsz or offset + filesz > len(data):
                raise _damaged(name, f"segment {index} reaches past the end of the file")
            segments.append(Segment(offset, paddr, filesz, memsz, flags))
        elif kind == _PT_NOTE and offset:  # some linkers leave the offset of a note segment zero
            if offset + filesz > len(data):
                raise _damaged(name, f"note segment {index} reaches past the end of the file")
            notes.append((offset, filesz))
    return _check_segments(name, segments), tuple(notes)


def _check_segments(name: str, segments: list[Segment]) -> tuple[Segment, ...]:
    if not segments:
        raise _damaged(name, "it has nothing to load")
    segments.sort(key=lambda s: s.paddr)
    for before, after in itertools.pairwise(segments):
        if before.paddr + before.memsz > after.paddr:
            raise _damaged(name, "its segments overlap")
    extent = segments[-1].paddr + segments[-1].memsz - segments[0].paddr
    if extent > MAX_EXTENT:
        raise _damaged(name, f"its segments spread over {extent >> 20} MiB")
    return tuple(segments)


def _sections(
    data: memoryview, klass: int, shoff: int, shentsize: int, shnum: int, shstrndx: int
) -> tuple[Section, ...]:
    """Section headers only help to find notes and code: unusable ones count as none."""
    if not shoff or not 0 < shnum <= MAX_SECTIONS or shentsize < _SHDR[klass].size:
        return ()
    if shoff + shnum * shentsize > len(data) or shstrndx >= shnum:
        return ()
    raw = [_SHDR[klass].unpack_from(data, shoff + i * shentsize) for i in range(shnum)]
    names_at, names_size = raw[shstrndx][4], raw[shstrndx][5]
    if names_at + names_size > len(data):
        return ()
    names = bytes(data[names_at : names_at + min(names_size, 1 << 20)])
    found: list[Section] = []
    for fields in raw:
        name_at, kind, flags, offset, size = fields[0], fields[1], fields[2], fields[4], fields[5]
        if kind == _SHT_NOBITS or offset + size > len(data):
            continue
        end = names.find(b"\0", name_at, name_at + 256)
        found.append(Section(names[name_at:end] if end >= 0 else b"", kind, offset, size, bool(flags & _SHF_EXECINSTR)))
    return tuple(found)


def _damaged(name: str, what: str) -> KernelInvalid:
    return KernelInvalid(f"{name} is damaged: {what}; copy or download it again")
