"""The file format, on a made-up memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from hypervisor.toolstack import coredump
from hypervisor.toolstack.coredump import EHDR, SHDR, CoreHeader

PAGE = 4096
BASE = 0x20000
NOTHING = (1 << 64) - 1


@pytest.fixture
def memory() -> int:
    """Eight frames: 0 to 5 the guest's, 6 shared_info, 7 the M2P. Frames 1 and 4 changed places, 3 was given back."""
    made = os.memfd_create("test")
    os.ftruncate(made, 8 * PAGE)
    for index in (0, 1, 2, 4):  # frame 5 was never touched
        os.pwrite(made, bytes([index + 1]) * PAGE, index * PAGE)
    os.pwrite(made, b"shared", 6 * PAGE)
    os.pwrite(made, struct.pack("<6Q", 0, 4, 2, NOTHING, 1, 5), 7 * PAGE)
    return made


def header(**changes: int) -> CoreHeader:
    values = {"bits": 64, "base_mfn": BASE, "pages": 6, "shared_info": 6 * PAGE, "m2p": 7 * PAGE, **changes}
    return CoreHeader(contexts=(b"\x01" * 5168, b"\x02" * 5168), **values)


def written(what: CoreHeader, memory: int, path: Path) -> dict[str, bytes]:
    with path.open("wb") as file:
        coredump.write(what, memory, file.fileno())
    data = path.read_bytes()
    ehdr = EHDR.unpack_from(data)
    assert (ehdr[0][:5], ehdr[1], ehdr[10], ehdr[11]) == (b"\x7fELF\x02", coredump.ET_CORE, 0, SHDR.size)
    found = [SHDR.unpack_from(data, ehdr[6] + n * SHDR.size) for n in range(ehdr[12])]
    names = data[found[ehdr[13]][4] :]
    return {names[s[0] :].partition(b"\0")[0].decode(): data[s[4] : s[4] + s[5]] for s in found[1:]}


def test_sections(memory: int, tmp_path: Path) -> None:
    found = written(header(), memory, tmp_path / "core")
    assert set(found) == set(coredump.SECTIONS)
    assert list(struct.iter_unpack("<QQ", found[".xen_p2m"])) == [
        *((0, BASE), (1, BASE + 4), (2, BASE + 2), (4, BASE + 1), (5, BASE + 5))
    ]
    assert [found[".xen_pages"][at] for at in range(0, 5 * PAGE, PAGE)] == [1, 5, 3, 2, 0]
    assert len(found[".xen_pages"]) == 5 * PAGE
    assert found[".xen_prstatus"] == b"\x01" * 5168 + b"\x02" * 5168
    assert found[".xen_shared_info"].startswith(b"shared") and len(found[".xen_shared_info"]) == PAGE


def test_notes(memory: int, tmp_path: Path) -> None:
    data = written(header(), memory, tmp_path / "core")[".note.Xen"]
    notes = {}
    while data:
        size, length, kind, name = struct.unpack_from("<III4s", data)
        assert (size, name) == (4, b"Xen\0")
        notes[kind], data = data[16 : 16 + length], data[16 + length :]
    assert list(notes) == [
        *(coredump.NOTE_NONE, coredump.NOTE_HEADER, coredump.NOTE_XEN_VERSION, coredump.NOTE_FORMAT_VERSION)
    ]
    assert struct.unpack("<4Q", notes[coredump.NOTE_HEADER]) == (coredump.MAGIC_PV, 2, 5, PAGE)
    assert notes[coredump.NOTE_FORMAT_VERSION] == struct.pack("<Q", 1)
    assert struct.unpack_from("<QQ", notes[coredump.NOTE_XEN_VERSION]) == (4, 17)
    assert len(notes[coredump.NOTE_XEN_VERSION]) == 1280


def test_what_was_never_touched_takes_no_room(tmp_path: Path) -> None:
    memory = os.memfd_create("test")
    pages = 4096
    os.ftruncate(memory, (pages + 9) * PAGE)
    os.pwrite(memory, struct.pack(f"<{pages}Q", *range(pages)), pages * PAGE)
    os.pwrite(memory, b"x", 17 * PAGE)
    path = tmp_path / "core"
    what = header(pages=pages, m2p=pages * PAGE, shared_info=(pages + 8) * PAGE)
    assert written(what, memory, path)[".xen_pages"][17 * PAGE] == ord("x")
    assert path.stat().st_size > pages * PAGE
    assert path.stat().st_blocks * 512 < 1 << 20


def test_a_32_bit_guest(memory: int, tmp_path: Path) -> None:
    os.pwrite(memory, struct.pack("<6I", 0, 1, 2, 0xFFFF_FFFF, 4, 5), 7 * PAGE)
    found = written(header(bits=32), memory, tmp_path / "core")
    assert [pfn for pfn, _ in struct.iter_unpack("<QQ", found[".xen_p2m"])] == [0, 1, 2, 4, 5]
    assert EHDR.unpack_from((tmp_path / "core").read_bytes())[2] == coredump.EM_386


def test_a_guests_nonsense_in_the_m2p(memory: int, tmp_path: Path) -> None:
    os.pwrite(memory, struct.pack("<6Q", 7, 7, 1 << 40, NOTHING - 1, 0, (1 << 40) - 1), 7 * PAGE)
    found = written(header(), memory, tmp_path / "core")
    assert [pfn for pfn, _ in struct.iter_unpack("<QQ", found[".xen_p2m"])] == [0, 7, 7, (1 << 40) - 1]


def test_memory_that_ends_early(memory: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ends early"):
        written(header(m2p=8 * PAGE), memory, tmp_path / "core")


def test_the_header_crosses_processes() -> None:
    assert CoreHeader.from_json(header().to_json()) == header()


def test_runs() -> None:
    pages = [(0, 5), (1, 6), (2, 7), (3, 1), (9, 2), (10, 4)]
    assert list(coredump.runs(pages)) == [(0, 5, 3), (3, 1, 2), (5, 4, 1)]
    assert list(coredump.runs([])) == []
