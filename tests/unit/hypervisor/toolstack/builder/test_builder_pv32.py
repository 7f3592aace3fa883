"""Start-of-day memory of 32-bit guests."""

from __future__ import annotations

import mmap
import struct
from typing import Any

import pytest

from hypervisor import abi
from hypervisor.abi.structs import StartInfoCompat
from hypervisor.errors import HostFailure, KernelInvalid, Unsupported
from hypervisor.toolstack.builder import BootState, BuildMemory, build, parse_kernel
from hypervisor.types import Mfn

PAGE = 4096
BASE, SHARED = Mfn(0x12340), Mfn(0x99999)
NX = 1 << 63
PAE_MODE = 9


def pae_kernel(make: Any, pae: bytes | None = b"yes", virt_base: int = 0xC0000000, **notes: int | None) -> bytes:
    """A 32-bit kernel whose text lies at 1 MiB."""
    values = {"virt_base": virt_base, "entry": virt_base + 0x100000, "hypercall_page": virt_base + 0x100000, **notes}
    blob = make.notes(**values) + (make.note(PAE_MODE, pae + b"\0") if pae is not None else b"")
    content = b"\x90" * PAGE
    program = struct.pack("<IIIIIIII", 1, 116, 0, 0x100000, PAGE, PAGE, 5, PAGE)
    program += struct.pack("<IIIIIIII", 4, 116 + PAGE, 0, 0, len(blob), len(blob), 4, 4)
    ident = b"\x7fELF\1\1\1".ljust(16, b"\0")
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 2, 40, 0, 0)
    return bytes(ident + header + program + content + blob)


class Guest32:
    def __init__(self, image: bytes, nr_pages: int = 2048, base: Mfn = BASE, shared: Mfn = SHARED) -> None:
        self.memory = mmap.mmap(-1, nr_pages * PAGE)
        self.base, self.nr_pages = base, nr_pages
        kernel = parse_kernel(image, "k")
        view = memoryview(self.memory)
        self.state = build(BuildMemory(view, base, nr_pages), kernel, b"R" * 5000, "words", shared_info_mfn=shared)

    def entries(self, mfn: int, count: int = 512) -> list[int]:
        return list(struct.unpack_from(f"<{count}Q", self.memory, (mfn - self.base) * PAGE))

    def leaves(self) -> dict[int, int]:
        found = {}
        for l3, upper in enumerate(self.entries(self.state.l4_mfn, 4)):
            for l2, middle in enumerate(self.entries(frame(upper)) if upper else []):
                for l1, leaf in enumerate(self.entries(frame(middle)) if middle else []):
                    if leaf:
                        found[l3 << 30 | l2 << 21 | l1 << 12] = leaf
        return found

    @property
    def info(self) -> StartInfoCompat:
        return StartInfoCompat.from_buffer_copy(self.memory, (self.state.start_info_mfn - self.base) * PAGE)


def frame(entry: int) -> int:
    return (entry & 0x000F_FFFF_FFFF_F000) >> 12


@pytest.fixture(params=[0xC0000000, 0], ids=["high", "low"])
def guest(request: pytest.FixtureRequest, make: Any) -> Guest32:
    return Guest32(pae_kernel(make, virt_base=request.param))


def test_the_mapping_is_linear_and_the_kernels_own(guest: Guest32) -> None:
    state, leaves = guest.state, guest.leaves()
    assert sorted(leaves) == list(range(state.virt_base, state.virt_end, PAGE))
    tables = {BASE + pfn for pfn, _ in state.page_tables}
    for va, entry in leaves.items():
        assert frame(entry) == BASE + (va - state.virt_base) // PAGE
        assert not entry & 4, "no user bit"
        assert bool(entry & 2) == (frame(entry) not in tables)
        assert bool(entry & NX) != (va - state.virt_base == 0x100000)


def test_three_levels_with_a_table_for_the_last_quarter(guest: Guest32) -> None:
    levels = [level for _, level in guest.state.page_tables]
    assert levels[0] == 3 and levels == sorted(levels, reverse=True)
    roots = guest.entries(guest.state.l4_mfn)
    assert roots[3] and not any(roots[4:])
    assert levels.count(2) == (1 if guest.state.virt_base else 4)
    assert guest.state.nr_pt_frames == len(levels) == guest.info.nr_pt_frames


def test_start_info(guest: Guest32) -> None:
    info, state = guest.info, guest.state
    assert bytes(info.magic).rstrip(b"\0") == b"xen-3.0-x86_32p"
    assert (info.nr_pages, info.shared_info) == (guest.nr_pages, SHARED << 12)
    assert (info.store_mfn, info.console.domU.mfn) == (state.store_mfn, state.console_mfn)
    assert bytes(info.cmd_line).rstrip(b"\0") == b"words" and info.mod_len == 5000
    assert state.rsi == state.virt_base + (state.start_info_mfn - BASE) * PAGE
    p2m = struct.unpack_from(f"<{guest.nr_pages}I", guest.memory, info.mfn_list - state.virt_base)
    assert p2m == tuple(range(BASE, BASE + guest.nr_pages))
    assert state.bits == 32 and state.extended_cr3
    assert BootState.from_json(state.to_json()) == state


def test_hypercall_page(guest: Guest32) -> None:
    page = guest.memory[0x100000:0x101000]
    assert page[:32] == b"\xb8\0\0\0\0\xcd\x82\xc3".ljust(32, b"\xcc")
    iret = page[32 * abi.HYPERVISOR_iret :][:32]
    assert iret == b"\x50\xb8\x17\0\0\0\xcd\x82".ljust(32, b"\xcc")


@pytest.mark.parametrize("pae", [None, b"no", b""])
def test_without_pae_there_is_no_way(make: Any, pae: bytes | None) -> None:
    with pytest.raises(Unsupported, match="without PAE"):
        parse_kernel(pae_kernel(make, pae), "k")


@pytest.mark.parametrize(("pae", "extended"), [(b"yes", True), (b"yes[extended-cr3]", True), (b"bimodal", True)])
def test_pae_modes(make: Any, pae: bytes, extended: bool) -> None:
    kernel = parse_kernel(pae_kernel(make, pae), "k")
    assert kernel.bits == 32 and kernel.extended_cr3 is extended


@pytest.mark.parametrize("base", [0xF5700000, 0xF5800000, 0x1_0000_0000])
def test_addresses_that_are_xens(make: Any, base: int) -> None:
    with pytest.raises(KernelInvalid, match="cannot be mapped"):
        Guest32(pae_kernel(make, virt_base=base, entry=base + 0x100000))


def test_frames_above_4_gib_are_refused(make: Any) -> None:
    image = pae_kernel(make)
    Guest32(image, base=Mfn(0xFF000), shared=Mfn(0xFFFFF))
    with pytest.raises(HostFailure, match="below 4 GiB"):
        Guest32(image, base=Mfn(0xFF000), shared=Mfn(0x100000))


def test_a_string_note_may_claim_more_than_there_is(make: Any) -> None:
    """GRUB's 32-bit image ends with such a note."""
    image = bytearray(pae_kernel(make))
    at = image.rindex(struct.pack("<III", 4, 4, PAE_MODE))
    struct.pack_into("<I", image, at + 4, 12)
    assert parse_kernel(bytes(image), "k").bits == 32
    image[-1:] = b"x"
    with pytest.raises(KernelInvalid, match="reaches past"):
        parse_kernel(bytes(image), "k")


# -- the symbols of BSD kernels

SYMBOLS, STRINGS = bytes(range(16)) * 3, b"\0main\0"


def with_symbols(make: Any, link: int = 2, size: int = len(SYMBOLS)) -> bytes:
    image = bytearray(pae_kernel(make, None))
    note = make.note(PAE_MODE, b"yes\0") + make.note(11, b"yes\0")  # BSD_SYMTAB
    at = struct.unpack_from("<I", image, 52 + 32 + 4)[0]
    image += note
    struct.pack_into("<II", image, 52 + 32 + 16, len(image) - at, len(image) - at)
    symbols_at = len(image)
    image += SYMBOLS + STRINGS
    table = len(image)
    image += bytes(40)
    image += struct.pack("<10I", 1, 2, 0, 0, symbols_at, size, link, 0, 4, 16)
    image += struct.pack("<10I", 2, 3, 0, 0, symbols_at + len(SYMBOLS), len(STRINGS), 0, 0, 1, 0)
    struct.pack_into("<I", image, 32, table)
    struct.pack_into("<HHH", image, 46, 40, 3, 0)
    return bytes(image)


def test_symbols_lie_behind_the_image_as_an_elf_file_of_their_own(make: Any) -> None:
    guest = Guest32(with_symbols(make))
    at = 0x100000 + PAGE
    size = struct.unpack_from("<I", guest.memory, at)[0]
    found = parse_sections(guest.memory[at + 4 : at + 4 + size])
    assert found == [b"", SYMBOLS, STRINGS]
    assert guest.info.mfn_list >= guest.state.virt_base + at + 4 + size


def parse_sections(data: bytes) -> list[bytes]:
    assert data[:7] == b"\x7fELF\1\1\1"
    table, count = struct.unpack_from("<I", data, 32)[0], struct.unpack_from("<H", data, 48)[0]
    assert not any(data[52:table]), "nothing of the builder's memory between the headers"
    rows = [struct.unpack_from("<10I", data, table + 40 * n) for n in range(count)]
    assert [row[1] for row in rows] == [0, 2, 3] and rows[1][6] == 2
    return [data[row[4] : row[4] + row[5]] for row in rows]


@pytest.mark.parametrize(("link", "size"), [(1, len(SYMBOLS)), (0, len(SYMBOLS)), (9, len(SYMBOLS)), (2, 1 << 31)])
def test_a_damaged_symbol_table_is_left_out(make: Any, link: int, size: int) -> None:
    assert parse_kernel(with_symbols(make, link, size), "k").symbols == b""
    assert parse_kernel(with_symbols(make), "k").symbols
