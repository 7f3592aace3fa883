"""Small kernels made of bytes: ELF files with Xen notes, and bzImages around them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import pytest

VIRT_BASE = 0xFFFFFFFF80000000
NOTE_TYPES = {"entry": 1, "hypercall_page": 2, "virt_base": 3, "paddr_offset": 4, "suspend_cancel": 14}
NOTE_TYPES |= {"init_p2m": 15, "mod_start_pfn": 16, "supported": 17, "phys32_entry": 18}
STRING_TYPES = {"xen_version": 5, "guest_os": 6, "guest_version": 7, "loader": 8, "features": 10}


class KernelMaker:
    """Writes ELF and bzImage files."""

    virt_base = VIRT_BASE

    def note(self, kind: int, desc: bytes, name: bytes = b"Xen\0") -> bytes:
        def pad(data: bytes) -> bytes:
            return data + bytes(-len(data) % 4)

        return struct.pack("<III", len(name), len(desc), kind) + pad(name) + pad(desc)

    def notes(self, **values: int | str | None) -> bytes:
        """Notes of a sound PV kernel, with changes; None leaves one out."""
        wanted: dict[str, int | str | None] = {
            "xen_version": "xen-3.0",
            "guest_os": "linux",
            "guest_version": "2.6",
            "loader": "generic",
            "virt_base": VIRT_BASE,
            "entry": VIRT_BASE + 0x100010,
            "features": "!writable_page_tables|pae_pgdir_above_4gb",
        }
        wanted.update(values)
        out = self.note(1, b"\1\0\0\0", b"GNU\0")
        for key, value in wanted.items():
            if isinstance(value, str):
                out += self.note(STRING_TYPES[key], value.encode() + b"\0")
            elif value is not None:
                out += self.note(NOTE_TYPES[key], value.to_bytes(8, "little"))
        return out

    def elf(
        self,
        notes: bytes | None = None,
        segments: list[tuple[int, bytes, int, int]] | None = None,
        *,
        machine: int = 62,
        entry: int = 0x100000,
        kind: int = 2,
        guest_string: bytes | None = None,
        notes_in_section: bool = False,
    ) -> bytes:
        """A 64-bit ELF; `segments` are (paddr, content, memsz, flags), by default text, data with bss."""
        if segments is None:
            segments = [(0x100000, b"\x90" * 0x1800, 0x1800, 5), (0x102000, b"data" * 100, 0x3000, 6)]
        notes = self.notes() if notes is None else notes
        headers = len(segments) + (1 if notes and not notes_in_section else 0)
        at = 64 + headers * 56
        program, body = b"", b""
        for paddr, content, memsz, flags in segments:
            fields = (1, flags, at + len(body), 0, paddr, len(content), memsz, 4096)
            program += struct.pack("<IIQQQQQQ", *fields)
            body += content
        sections: list[tuple[bytes, int, int, int]] = []
        if notes and not notes_in_section:
            program += struct.pack("<IIQQQQQQ", 4, 4, at + len(body), 0, 0, len(notes), len(notes), 4)
        if notes and notes_in_section:
            sections.append((b".notes", 7, at + len(body), len(notes)))
        body += notes
        if guest_string is not None:
            sections.append((b"__xen_guest", 1, at + len(body), len(guest_string)))
            body += guest_string
        shoff, table, count = 0, b"", 0
        if sections:
            names = b"\0"
            rows = [(0, 0, 0, 0)]
            for section_name, section_kind, offset, size in sections:
                rows.append((len(names), section_kind, offset, size))
                names += section_name + b"\0"
            rows.append((0, 3, at + len(body), len(names)))
            body += names
            shoff, count = at + len(body), len(rows)
            for name_at, section_kind, offset, size in rows:
                table += struct.pack("<IIQQQQIIQQ", name_at, section_kind, 0, 0, offset, size, 0, 0, 1, 0)
        ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
        fields = (kind, machine, 1, entry, 64, shoff, 0, 64, 56, headers, 64, count, max(count - 1, 0))
        return ident + struct.pack("<HHIQQQIHHHHHH", *fields) + program + body + table

    def elf32(self) -> bytes:
        """A 32-bit PAE kernel with Xen notes."""
        notes = self.notes(virt_base=0xC0000000, entry=0xC0100000)
        content = b"\x90" * 64
        program = struct.pack("<IIIIIIII", 1, 116, 0xC0100000, 0x100000, 64, 64, 5, 4096)
        program += struct.pack("<IIIIIIII", 4, 180, 0, 0, len(notes), len(notes), 4, 4)
        ident = b"\x7fELF\1\1\1".ljust(16, b"\0")
        header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 2, 40, 0, 0)
        return ident + header + program + content + notes

    def compress(self, kind: str, data: bytes) -> bytes:
        """As Linux's build does it: every format ends with the unpacked size."""
        size = struct.pack("<I", len(data))
        if kind == "gzip":
            return gzip.compress(data)
        if kind == "xz":
            return lzma.compress(data, check=lzma.CHECK_CRC32) + size
        if kind == "lzma":
            return lzma.compress(data, lzma.FORMAT_ALONE) + size
        if kind == "bzip2":
            return bz2.compress(data) + size
        if kind == "zstd":
            return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data)) + size
        if kind == "lz4":
            block = pytest.importorskip("lz4.block")
            out = struct.pack("<I", 0x184C2102)
            for at in range(0, len(data), 8 << 20):
                packed = block.compress(data[at : at + (8 << 20)], store_size=False)
                out += struct.pack("<I", len(packed)) + bytes(packed)
            return out + size
        return data

    def bzimage(
        self, payload: bytes, *, version: int = 0x20F, setup_sects: int = 1, length: int | None = None
    ) -> bytes:
        offset = 0x40
        head = bytearray((setup_sects + 1) * 512 + offset)
        head[0x1F1] = setup_sects
        struct.pack_into("<H", head, 0x1FE, 0xAA55)
        head[0x202:0x206] = b"HdrS"
        struct.pack_into("<H", head, 0x206, version)
        struct.pack_into("<II", head, 0x248, offset, len(payload) if length is None else length)
        return bytes(head) + payload + b"\0" * 16


@pytest.fixture(scope="session")
def make() -> KernelMaker:
    return KernelMaker()


@pytest.fixture
def cpio_entry() -> Callable[[str, bytes], bytes]:
    """One entry of a newc archive."""

    def entry(name: str, data: bytes = b"") -> bytes:
        encoded = name.encode() + b"\0"
        head = b"070701" + b"".join(
            b"%08X" % value for value in (1, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        )
        out = head + encoded
        out += bytes(-len(out) % 4)
        return out + data + bytes(-len(data) % 4)

    return entry
