"""Kernel files: what is accepted, and the one clear line for what is not."""

from __future__ import annotations

import dataclasses
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.errors import KernelInvalid, KernelNotXen, KernelPvhOnly, Unsupported
from hypervisor.toolstack.builder import elf, load_kernel, parse_kernel
from hypervisor.toolstack.builder.bzimage import unpack_bzimage
from hypervisor.toolstack.builder.kernel import unpack_kernel, usable_virtual
from hypervisor.toolstack.builder.unpack import unpack

COMPRESSIONS = ["none", "gzip", "xz", "lzma", "bzip2", "zstd", "lz4"]
LIMIT = 1 << 20


def test_elf_gives_entry_extent_and_notes(make: Any) -> None:
    kernel = parse_kernel(make.elf(make.notes(init_p2m=0x8000000000, mod_start_pfn=1, suspend_cancel=1)), "k")
    assert kernel.virt_base == make.virt_base
    assert kernel.entry == make.virt_base + 0x100010
    assert (kernel.start, kernel.end) == (0x100000, 0x105000)
    assert kernel.p2m_base == 0x8000000000
    assert kernel.notes.mod_start_pfn and kernel.notes.suspend_cancel
    assert kernel.notes.guest_os == "linux"
    assert kernel.notes.features_supported == 0x11 and kernel.notes.features_required == 1


def test_notes_in_a_section_count_when_no_segment_has_any(make: Any) -> None:
    assert parse_kernel(make.elf(notes_in_section=True), "k").entry == make.virt_base + 0x100010


def test_supported_features_note_adds_to_the_string(make: Any) -> None:
    kernel = parse_kernel(make.elf(make.notes(supported=1 << 15)), "k")
    assert kernel.notes.features_supported == 0x8011


def test_without_virt_base_and_entry_notes_libelf_defaults_hold(make: Any) -> None:
    image = make.elf(make.notes(virt_base=None, entry=None, guest_os="XTF"), entry=0x100004)
    kernel = parse_kernel(image, "k")
    assert (kernel.virt_base, kernel.entry, kernel.hypercall_page) == (0, 0x100004, None)


def test_legacy_guest_string(make: Any) -> None:
    text = b"GUEST_OS=linux,GUEST_VER=2.6,XEN_VER=xen-3.0,VIRT_BASE=0x10000000,HYPERCALL_PAGE=0x101,LOADER=generic,"
    text += b"VIRT_ENTRY=0x10100000,FEATURES=writable_page_tables|!pae_pgdir_above_4gb\0junk"
    segments = [(0x10100000, b"\x90" * 0x2000, 0x2000, 7)]
    kernel = parse_kernel(make.elf(b"", segments, guest_string=text, entry=0x10100000), "k")
    # The string's physical addresses include VIRT_BASE, and its hypercall page is a number relative to it.
    assert (kernel.virt_base, kernel.start, kernel.end) == (0x10000000, 0x100000, 0x102000)
    assert kernel.hypercall_page == 0x10101000
    assert kernel.notes.features_required == 1 << 4


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_bzimage_payloads(make: Any, kind: str) -> None:
    image = make.elf()
    assert unpack_kernel(make.bzimage(make.compress(kind, image)), "k") == image


def test_gzipped_elf(make: Any) -> None:
    assert unpack_kernel(make.compress("gzip", make.elf()), "k") == make.elf()


@pytest.mark.parametrize("kind", COMPRESSIONS[1:])
def test_truncated_payload_is_damaged(make: Any, kind: str) -> None:
    image = make.elf(segments=[(0x100000, os.urandom(30000), 0x8000, 7)])
    packed = make.compress(kind, image)
    for cut in (len(packed) // 2, len(packed) - 6):
        payload = packed[:cut] + struct.pack("<I", len(image))
        with pytest.raises(KernelInvalid, match="again"):
            unpack_kernel(make.bzimage(payload), "k")


@pytest.mark.parametrize("kind", COMPRESSIONS[1:])
def test_bombs_stop_at_the_limit(make: Any, kind: str) -> None:
    packed = make.compress(kind, bytes(48 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(KernelInvalid):
            unpack_bzimage(memoryview(make.bzimage(packed)), LIMIT, "k")
        with pytest.raises(KernelInvalid, match="grows past"):
            unpack(memoryview(packed), LIMIT, "k")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_lzo_is_named_as_unsupported(make: Any) -> None:
    with pytest.raises(Unsupported, match="lzo"):
        unpack_kernel(make.bzimage(b"\x89LZO\x00\r\n\x1a\n" + b"x" * 40 + struct.pack("<I", 4000)), "k")


@pytest.mark.parametrize(
    ("notes", "error", "text"),
    [
        ({"phys32_entry": 0x100000, "entry": None, "virt_base": None}, KernelPvhOnly, "PVH"),
        ({"loader": "other", "guest_os": "plan9"}, KernelNotXen, "plan9"),
        ({"entry": None, "virt_base": None, "paddr_offset": 0}, KernelNotXen, "CONFIG_XEN_PV"),
        ({"xen_version": "xen-2.0"}, KernelNotXen, "xen-2.0"),
        ({"features": "!dom0"}, Unsupported, "dom0"),
        ({"features": "!auto_translated_physmap"}, Unsupported, "auto_translated_physmap"),
        ({"features": "!from_the_future"}, Unsupported, "from_the_future"),
        ({"entry": 0x1000}, KernelInvalid, "out of bounds"),
        ({"virt_base": 0xFFFF800000000000, "entry": 0xFFFF800000100000}, KernelInvalid, "VIRT_BASE"),
        ({"virt_base": 0x800000000000, "entry": 0x800000100000}, KernelInvalid, "VIRT_BASE"),
        ({"hypercall_page": 0x1000}, KernelInvalid, "hypercall page"),
        ({"virt_base": None, "paddr_offset": 4096, "guest_os": "other"}, KernelInvalid, "PADDR_OFFSET"),
    ],
)
def test_refused_notes(make: Any, notes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        parse_kernel(make.elf(make.notes(**notes)), "vmlinuz")
    assert type(caught.value) is error
    assert "vmlinuz" in str(caught.value) and "\n" not in str(caught.value)


def test_pvh_beside_pv_is_fine(make: Any) -> None:
    assert parse_kernel(make.elf(make.notes(phys32_entry=0x100000)), "k").notes.phys32_entry == 0x100000


def test_no_xen_notes(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make.bzimage(make.compress("gzip", make.elf(make.note(1, b"\1\0\0\0", b"GNU\0")))))
    with pytest.raises(KernelNotXen, match="CONFIG_XEN_PV"):
        load_kernel(path)


def test_32_bit_kernel_is_unsupported(make: Any) -> None:
    with pytest.raises(Unsupported, match="32-bit"):
        parse_kernel(make.elf32(), "k")


def test_other_processor(make: Any) -> None:
    with pytest.raises(KernelInvalid, match="183"):
        parse_kernel(make.elf(machine=183), "k")


def test_relocatable_object_is_no_kernel(make: Any) -> None:
    with pytest.raises(KernelInvalid, match="type 1"):
        parse_kernel(make.elf(kind=1), "k")


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [(0x1000, b"x" * 0x2000, 0x2000, 7), (0x2000, b"y", 1, 7)],
        [(0x1000, b"x" * 16, 8, 7)],
        [(0x1000, b"x", 1, 7), (0x1000 + (1 << 30), b"x", 1, 7)],
        [(0x1000, b"x", 1 << 62, 7)],
    ],
)
def test_unsound_segments(make: Any, segments: list[tuple[int, bytes, int, int]]) -> None:
    with pytest.raises(KernelInvalid):
        parse_kernel(make.elf(segments=segments), "k")


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"#!/bin/sh\n", b"MZ" + b"\0" * 1000])
def test_files_that_are_no_kernel(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(KernelInvalid) as caught:
        load_kernel(path)
    assert caught.value.code == "kernel.invalid" and str(path) in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "fifo", tmp_path / "nul\0"):
        with pytest.raises(KernelInvalid):
            load_kernel(path)


def test_old_boot_protocol_and_short_payload(make: Any) -> None:
    with pytest.raises(KernelInvalid, match=r"2\.07"):
        unpack_kernel(make.bzimage(b"x" * 100, version=0x207), "k")
    with pytest.raises(KernelInvalid, match="truncated"):
        unpack_kernel(make.bzimage(b"x" * 100, length=1 << 31), "k")


def test_usable_virtual() -> None:
    assert usable_virtual(0, 1 << 47)
    assert not usable_virtual(0, (1 << 47) + 1)
    assert not usable_virtual(0x900000000000, 0x900000001000)
    assert not usable_virtual(0xFFFF800000000000, 0xFFFF800000001000)
    assert usable_virtual(0xFFFF880000000000, 1 << 64)
    assert not usable_virtual(0xFFFF880000000000, (1 << 64) + 1)


def _check_contained(data: bytes) -> None:
    """Whatever the bytes: a kernel, or one of the errors that name the file."""
    try:
        kernel = parse_kernel(unpack_kernel(data, "k", LIMIT), "k")
    except (KernelInvalid, Unsupported) as exc:
        assert str(exc).startswith("k ")
    else:
        assert 0 <= kernel.start <= kernel.end <= 1 << 30


FUZZ = settings(
    max_examples=150, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZ
@given(data=st.binary(max_size=600))
def test_random_bytes(data: bytes) -> None:
    for prefix in (b"", b"\x7fELF\2\1\1", b"\x1f\x8b\x08"):
        _check_contained(prefix + data)


@FUZZ
@given(cut=st.integers(0, 20000), kind=st.sampled_from(["elf", "bz-none", "bz-gzip"]))
def test_truncations(make: Any, cut: int, kind: str) -> None:
    image = make.elf()
    data = image if kind == "elf" else make.bzimage(make.compress(kind[3:], image))
    _check_contained(data[: cut % (len(data) + 1)])


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8), kind=st.integers(0, 6))
def test_changed_bytes(make: Any, flips: list[tuple[int, int]], kind: int) -> None:
    image = bytearray(make.elf(guest_string=b"VIRT_BASE=0\0"))
    header = 64 + 3 * 56
    notes_at = image.index(b"GNU\0") - 12
    for where, value in flips:  # headers and notes, where the structure is
        image[where % header if where & 1 else notes_at + where % (len(image) - notes_at)] = value
    data = bytearray(make.bzimage(make.compress(COMPRESSIONS[kind], bytes(image)))) if kind else image
    if kind:
        for where, value in flips:
            data[0x1F0 + where % (len(data) - 0x1F0)] = value
    _check_contained(bytes(data))


def test_many_notes_are_bounded(make: Any) -> None:
    notes = make.notes() + make.note(1, b"", b"X\0\0\0") * 5000
    with pytest.raises(KernelInvalid, match="4096"):
        parse_kernel(make.elf(notes), "k")


def test_code_is_what_sections_say_and_else_the_segment() -> None:
    segments = (
        elf.Segment(0x1000, 0x100000, 0x3000, 0x5000, elf.PF_X),
        elf.Segment(0x4000, 0x200000, 0x1000, 0x1000, 6),
    )
    text = elf.Section(b".text", 1, 0x1000, 0x800, True)
    data = elf.Section(b".data", 1, 0x2000, 0x1000, False)
    image = elf.ElfImage(memoryview(b""), 64, 62, 0, segments, (), ())
    assert image.code_ranges() == ((0x100000, 0x105000),)
    assert dataclasses.replace(image, sections=(data,)).code_ranges() == ((0x100000, 0x105000),)
    assert dataclasses.replace(image, sections=(data, text)).code_ranges() == ((0x100000, 0x100800),)
