"""The helper that builds micro-guests: what it makes, when it builds anew, how it fails."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "guests"))

import build

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))

VIRT_BASE = 0xFFFF_FFFF_8000_0000
ENTRY, HYPERCALL_PAGE, NOTE_VIRT_BASE, XEN_VERSION, GUEST_OS, LOADER, FEATURES = 1, 2, 3, 5, 6, 8, 10


def xen_notes(image: bytes) -> dict[int, bytes]:
    """ELF notes named Xen, by type (public/elfnote.h)."""
    header_at, size, count = struct.unpack_from("<Q", image, 32)[0], *struct.unpack_from("<HH", image, 54)
    notes: dict[int, bytes] = {}
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", image, header_at + index * size)
        if kind != 4:  # PT_NOTE
            continue
        at = offset
        while at < offset + length:
            name_size, value_size, note_type = struct.unpack_from("<III", image, at)
            name = image[at + 12 : at + 12 + name_size]
            value_at = at + 12 + (name_size + 3 & ~3)
            if name == b"Xen\0":
                notes[note_type] = image[value_at : value_at + value_size]
            at = value_at + (value_size + 3 & ~3)
    return notes


def number(note: bytes) -> int:
    return int.from_bytes(note, "little")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may edit, and an empty cache."""
    copy = tmp_path / "guests"
    shutil.copytree(build.SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "SOURCES", copy)
    monkeypatch.setattr(build, "LIBRARY", copy / "lib")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    return copy


@pytest.mark.parametrize("name", build.guest_names())
def test_every_guest_compiles_to_a_xen_kernel(name: str) -> None:
    notes = xen_notes(build.build_guest(name).read_bytes())
    assert notes[XEN_VERSION] == b"xen-3.0\0"
    assert notes[LOADER] == b"generic\0"
    assert notes[GUEST_OS] == b"reeve-micro\0"
    assert number(notes[NOTE_VIRT_BASE]) == VIRT_BASE
    assert VIRT_BASE <= number(notes[ENTRY]) < VIRT_BASE + (1 << 20)
    assert FEATURES in notes
    assert HYPERCALL_PAGE not in notes


def test_the_hypercall_page_variant_names_its_page() -> None:
    notes = xen_notes(build.build_guest("hello", USE_HYPERCALL_PAGE=True).read_bytes())
    assert number(notes[HYPERCALL_PAGE]) % 4096 == 0
    assert number(notes[HYPERCALL_PAGE]) > number(notes[ENTRY])


def test_a_guest_without_notes_is_still_an_elf() -> None:
    image = build.build_guest("hello", NO_XEN_NOTES=True).read_bytes()
    assert image[:4] == b"\x7fELF"
    assert xen_notes(image) == {}


def test_a_second_call_compiles_nothing(sources: Path) -> None:
    first = build.build_guest("idle")
    before = first.stat().st_mtime_ns
    assert build.build_guest("idle") == first
    assert first.stat().st_mtime_ns == before
    assert build.build_guest("idle", LATER=False) == first


@pytest.mark.parametrize("edited", ["idle.c", "lib/guest.h", "lib/guest.lds", "lib/start.S"])
def test_an_edited_source_is_built_anew(sources: Path, edited: str) -> None:
    first = build.build_guest("idle")
    with (sources / edited).open("a") as file:
        file.write("\n/* edited */\n")
    assert build.build_guest("idle") != first


def test_symbols_reach_the_source(sources: Path) -> None:
    (sources / "said.c").write_text(
        '#include "guest.h"\nstatic const char word[] __attribute__((used)) = WORD;\nvoid guest_main(void) {}\n'
    )
    assert b"marzipan" in build.build_guest("said", WORD='"marzipan"').read_bytes()
    assert build.build_guest("said", WORD='"a"') != build.build_guest("said", WORD='"b"')


def test_a_source_that_does_not_compile_says_why_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "broken.c").write_text('#include "guest.h"\nvoid guest_main(void) { no_such_thing(); }\n')
    with pytest.raises(build.GuestBuildError, match="no_such_thing"):
        build.build_guest("broken")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".o"]


def test_an_unknown_guest_is_refused_with_the_known_ones() -> None:
    with pytest.raises(build.GuestBuildError, match=r"'nonsense'.*hello"):
        build.build_guest("nonsense")


def test_a_symbol_must_be_one() -> None:
    with pytest.raises(build.GuestBuildError, match="not a preprocessor symbol"):
        build.build_guest("idle", **{"X=1 -o /dev/null": True})


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install the package gcc" in str(build.available())
    with pytest.raises(build.GuestBuildError, match="install the package gcc"):
        build.build_guest("idle")


def test_a_cache_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(build.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"reeve-guests-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(build.GuestBuildError, match="not this user's own"):
        build.build_guest("idle")
