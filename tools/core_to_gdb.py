"""Make a core file for gdb from a core dump of a 64-bit guest.

::

    python tools/core_to_gdb.py DUMP NEW_FILE
    gdb VMLINUX NEW_FILE

A dump (``hypervisor/toolstack/coredump.py``) has machine frames; gdb wants virtual addresses. So the page tables of
each vCPU are walked as its processor would, and what they map of the guest's own memory becomes loadable segments.
Where they differ on an address, the first vCPU's count, and those of a kernel before those of its programs.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from hypervisor.abi import structs
from hypervisor.toolstack.coredump import EHDR, EM_X86_64, ET_CORE, PAGE_SIZE, SHDR, copy_sparse

PHDR = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE = 1, 4
NT_PRSTATUS = 1
PRSTATUS_SIZE, REGISTERS_AT = 336, 112
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", ""),
    *("rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""user_regs_struct of Linux; the one without a name is orig_rax."""

MAX_ALIASES = 16
"""Addresses of one page, beyond which they are left out: Linux (espfix) maps some 65536 times."""

PRESENT, LARGE = 1, 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000


class BadDump(Exception):
    pass


class Dump:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        header = EHDR.unpack(self._file.read(EHDR.size))
        if header[0][:5] != b"\x7fELF\x02" or header[1] != ET_CORE or header[2] != EM_X86_64:
            raise BadDump(f"{path} is no core dump of a 64-bit guest")
        self._sections = self._read_sections(header[6], header[12], header[13])
        try:
            size = len(bytes(structs.VcpuGuestContext()))
            contexts = self._section(".xen_prstatus")
            self.contexts = [
                structs.VcpuGuestContext.from_buffer_copy(contexts, at) for at in range(0, len(contexts), size)
            ]
            pairs = struct.iter_unpack("<QQ", self._section(".xen_p2m"))
            self.positions = {mfn: position for position, (_pfn, mfn) in enumerate(pairs)}
            self.pages_at, self.pages_size = self._sections[".xen_pages"]
        except KeyError as exc:
            raise BadDump(f"{path} has no section {exc}: it is no dump in Xen's format") from exc

    def page(self, mfn: int) -> tuple[int, ...]:
        self._file.seek(self.pages_at + self.positions[mfn] * PAGE_SIZE)
        return struct.unpack("<512Q", self._file.read(PAGE_SIZE))

    def fileno(self) -> int:
        return self._file.fileno()

    def _read_sections(self, offset: int, count: int, names: int) -> dict[str, tuple[int, int]]:
        self._file.seek(offset)
        found = [SHDR.unpack(self._file.read(SHDR.size)) for _ in range(count)]
        self._file.seek(found[names][4])
        strings = self._file.read(found[names][5])
        return {strings[s[0] :].partition(b"\0")[0].decode("ascii", "replace"): (s[4], s[5]) for s in found}

    def _section(self, name: str) -> bytes:
        offset, size = self._sections[name]
        self._file.seek(offset)
        return self._file.read(size)


def mapped(dump: Dump, root: int) -> Iterator[tuple[int, int]]:
    """(virtual address, position in the dump) of each page that a page table maps."""
    stack = [(root, 4, 0)]
    while stack:
        mfn, level, base = stack.pop()
        if mfn not in dump.positions:
            continue
        for slot, entry in enumerate(dump.page(mfn)):
            frame = (entry & ADDRESS) >> 12
            if not entry & PRESENT or (level > 1 and entry & LARGE):  # PV guests have no large pages
                continue
            address = base | slot << (12 + 9 * (level - 1))
            if level == 4 and slot >= 256:
                address |= 0xFFFF << 48
            if level > 1:
                stack.append((frame, level - 1, address))
            elif frame in dump.positions:
                yield address, dump.positions[frame]


def segments(dump: Dump) -> list[tuple[int, int, int]]:
    """(virtual address, position in the dump, pages), by address."""
    pages: dict[int, int] = {}
    roots = dict.fromkeys(c.ctrlreg[3] for c in dump.contexts) | dict.fromkeys(c.ctrlreg[1] for c in dump.contexts)
    for root in roots:
        if root:
            for address, position in mapped(dump, root >> 12):
                pages.setdefault(address, position)
    found: list[tuple[int, int, int]] = []
    aliases: dict[int, int] = {}
    for address, position in sorted(pages.items()):
        aliases[position] = aliases.get(position, 0) + 1
        if aliases[position] > MAX_ALIASES:
            continue
        if found and found[-1][:2] == (address - found[-1][2] * PAGE_SIZE, position - found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((address, position, 1))
    return found


def prstatus(context: structs.VcpuGuestContext, number: int) -> bytes:
    values = []
    for name in REGISTERS:
        if name == "fs_base":
            values.append(context.fs_base)
        elif name == "gs_base":
            values.append(context.gs_base_kernel if context.flags & 4 else context.gs_base_user)
        else:
            values.append(getattr(context.user_regs, name) & (1 << 64) - 1 if name else (1 << 64) - 1)
    data = bytearray(PRSTATUS_SIZE)
    struct.pack_into("<I", data, 32, number + 1)  # pr_pid: gdb's number of a thread
    struct.pack_into("<27Q", data, REGISTERS_AT, *values)
    return struct.pack("<III8s", 5, len(data), NT_PRSTATUS, b"CORE\0") + bytes(data)


def convert(source: Path, target: Path) -> int:
    """:returns: number of segments. :raises BadDump, OSError."""
    dump = Dump(source)
    notes = b"".join(prstatus(context, number) for number, context in enumerate(dump.contexts))
    found = segments(dump)
    if len(found) >= 0xFFFF:
        raise BadDump(f"{len(found)} separate mappings: more than an ELF file can name")
    notes_at = EHDR.size + PHDR.size * (len(found) + 1)
    start = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    headers = [PHDR.pack(PT_NOTE, 4, notes_at, 0, 0, len(notes), 0, 4)]
    for address, position, count in found:
        size = count * PAGE_SIZE
        headers.append(PHDR.pack(PT_LOAD, 7, start + position * PAGE_SIZE, address, 0, size, size, PAGE_SIZE))
    ident = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    ehdr = EHDR.pack(ident, ET_CORE, EM_X86_64, 1, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, len(headers), 0, 0, 0)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(ehdr + b"".join(headers) + notes)
        out.flush()
        copy_sparse(dump.fileno(), dump.pages_at, descriptor, start, dump.pages_size)
        os.ftruncate(descriptor, start + dump.pages_size)
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("new_file", type=Path)
    args = parser.parse_args()
    try:
        count = convert(args.dump, args.new_file)
    except (BadDump, OSError, struct.error) as exc:
        sys.stderr.write(f"core_to_gdb: {exc}\n")
        return 1
    sys.stdout.write(f"{args.new_file}: {count} segments\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
