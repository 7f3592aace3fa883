"""A guest kernel, checked: from a file to what the domain builder needs.

Accepts ELF, gzipped ELF and bzImage. What is refused, and how:

* no kernel, or damaged: `KernelInvalid`; a kernel without Xen's notes: `KernelNotXen`;
* a kernel with the PVH entry alone: `KernelPvhOnly`; 32-bit without PAE, or needing a feature we lack: `Unsupported`.
"""

from __future__ import annotations

import dataclasses
import os

from hypervisor import abi
from hypervisor.errors import KernelInvalid, KernelNotXen, KernelPvhOnly, Unsupported
from hypervisor.toolstack.builder import bzimage, elf
from hypervisor.toolstack.builder.files import read_file
from hypervisor.toolstack.builder.notes import XenNotes, find_notes
from hypervisor.toolstack.builder.symbols import symbol_blob
from hypervisor.toolstack.builder.unpack import compression_of, unpack
from hypervisor.types import PAGE_SIZE

MAX_FILE = 512 << 20
"""Largest kernel file read, bytes."""
MAX_UNPACKED = 512 << 20
"""Largest unpacked kernel, bytes."""

_LOW_END = 1 << 47


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A PV kernel ready to be placed in a domain.

    :ivar name: how messages call it (its path).
    :ivar segments: what to load; ``paddr - paddr_offset`` is the offset in the domain's memory.
    :ivar code_ranges: physical (start, end) of what may be executed.
    :ivar virt_base: virtual address of pfn 0 in the initial mapping.
    :ivar start: first byte of the image, as an offset in the domain's memory.
    :ivar end: end of the image, likewise.
    :ivar p2m_base: where the kernel wants its p2m list mapped, or None for inside the initial mapping.
    :ivar bits: 64, or 32 for a PAE kernel.
    :ivar symbols: what the kernel wants of its own symbols, at the end of the image; `symbols_at` says where.
    :ivar extended_cr3: a 32-bit kernel takes a top page table above 4 GiB of machine memory.
    """

    name: str
    data: memoryview = dataclasses.field(repr=False)
    segments: tuple[elf.Segment, ...]
    code_ranges: tuple[tuple[int, int], ...]
    notes: XenNotes
    virt_base: int
    paddr_offset: int
    entry: int
    start: int
    end: int
    p2m_base: int | None
    bits: int = 64
    extended_cr3: bool = False
    symbols: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def symbols_at(self) -> int:
        """Offset of the symbols in the domain's memory."""
        return self.end - len(self.symbols)

    @property
    def hypercall_page(self) -> int | None:
        return self.notes.hypercall_page


def unpack_kernel(data: bytes, name: str, limit: int = MAX_UNPACKED) -> bytes:
    """The ELF image in a kernel file; `data` itself when it is an ELF file already.

    :raises KernelInvalid, Unsupported: see the module.
    """
    view = memoryview(data)
    if bytes(view[:4]) == elf.MAGIC:
        return data
    if bzimage.is_bzimage(view):
        return bzimage.unpack_bzimage(view, limit, name)
    if compression_of(view) == "gzip":
        return unpack(view, limit, name)
    raise KernelInvalid(f"{name} is not a kernel image: give a Linux bzImage (vmlinuz) or an ELF kernel")


def parse_kernel(image: bytes | memoryview, name: str) -> Kernel:
    """Check an ELF image and gather what the builder needs. Reads headers and notes only.

    :raises KernelInvalid, KernelNotXen, KernelPvhOnly, Unsupported: see the module.
    """
    parsed = elf.parse_elf(memoryview(image), name)
    notes = find_notes(parsed, name)
    if notes is None:
        raise KernelNotXen(f"{name} has no Xen notes: give a kernel built with Xen PV support (Linux: CONFIG_XEN_PV)")
    _check_notes(notes, name)
    if parsed.bits == 32 and not notes.pae_mode.startswith("yes") and "bimodal" not in notes.pae_mode:
        raise Unsupported(f"{name} is a 32-bit kernel without PAE: use one built with PAE, or a 64-bit one")
    return _place(parsed, notes, name)


def load_kernel(path: str | os.PathLike[str]) -> Kernel:
    """Read, unpack and check a kernel file. See `KernelCache.load` for the way that unpacks once.

    :raises KernelInvalid, KernelNotXen, KernelPvhOnly, Unsupported: see the module.
    """
    name = os.fspath(path)
    return parse_kernel(unpack_kernel(read_file(path, "kernel", KernelInvalid, MAX_FILE), name), name)


def _check_notes(notes: XenNotes, name: str) -> None:
    generic = notes.loader.startswith("generic") or notes.guest_os.startswith("linux")
    pv = notes.entry is not None or notes.virt_base is not None or notes.hypercall_page is not None
    if notes.phys32_entry is not None and not (pv and generic):
        raise KernelPvhOnly(
            f"{name} has only a PVH entry, no PV one: use a kernel with Xen PV support (Linux: CONFIG_XEN_PV)"
        )
    if not generic:
        raise KernelNotXen(
            f"{name} is for loader {notes.loader[:32]!r} and system {notes.guest_os[:32]!r}: "
            "Xen loads Linux or the loader 'generic'"
        )
    if notes.guest_os.startswith("linux") and not pv and not notes.legacy:
        # Linux with CONFIG_XEN for full virtualisation alone still carries the descriptive notes.
        raise KernelNotXen(f"{name} has Xen notes but no PV entry: give a kernel built with CONFIG_XEN_PV")
    if not notes.xen_version.startswith("xen-3.0"):
        raise KernelNotXen(f"{name} is for Xen interface {notes.xen_version[:32]!r}: a kernel for 'xen-3.0' is needed")


def _place(parsed: elf.ElfImage, notes: XenNotes, name: str) -> Kernel:
    if notes.paddr_offset is not None and notes.virt_base is None:
        raise KernelInvalid(f"{name} is damaged: Xen note PADDR_OFFSET without VIRT_BASE; copy or download it again")
    virt_base = notes.virt_base or 0
    # The older string interface had physical addresses that include VIRT_BASE.
    offset = notes.paddr_offset if notes.paddr_offset is not None else virt_base if notes.legacy else 0
    start, end = parsed.pstart - offset, parsed.pend - offset
    symbols = symbol_blob(parsed) if notes.bsd_symtab else b""
    if symbols:
        align = parsed.bits // 8
        end = -(-end // align) * align + len(symbols)
    entry = notes.entry if notes.entry is not None else parsed.entry
    if start < 0 or end > elf.MAX_EXTENT or not virt_base + start <= entry <= virt_base + end:
        raise KernelInvalid(
            f"{name} is damaged: its entry or load addresses are out of bounds; copy or download it again"
        )
    bits = parsed.bits
    if virt_base % PAGE_SIZE or not usable_virtual(virt_base, virt_base + end, bits):
        raise KernelInvalid(
            f"{name} is damaged: its VIRT_BASE {virt_base:#x} cannot be mapped; copy or download it again"
        )
    hypercall = notes.hypercall_page
    if hypercall is not None and (hypercall % PAGE_SIZE or not virt_base + start <= hypercall < virt_base + end):
        raise KernelInvalid(f"{name} is damaged: its hypercall page {hypercall:#x} is outside the image; copy it again")
    p2m_base = notes.init_p2m
    if p2m_base is not None and virt_base + start <= p2m_base < virt_base + end:
        raise KernelInvalid(f"{name} is damaged: its p2m list would lie in the image; copy or download it again")
    if p2m_base is not None and (p2m_base >= virt_base or p2m_base % PAGE_SIZE or bits == 32):
        p2m_base = None  # as Xen's domain builder does
    return Kernel(
        name=name,
        data=parsed.data,
        segments=parsed.segments,
        code_ranges=parsed.code_ranges(),
        notes=notes,
        virt_base=virt_base,
        paddr_offset=offset,
        entry=entry,
        start=start,
        end=end,
        p2m_base=p2m_base,
        bits=bits,
        extended_cr3=bits == 32 and notes.extended_cr3,
        symbols=symbols,
    )


def usable_virtual(start: int, end: int, bits: int = 64) -> bool:
    """Whether a PV guest of that many bits may map ``start .. end-1``: canonical, and not Xen's own."""
    if bits == 32:
        return start >= 0 and end <= abi.COMPAT_HYPERVISOR_VIRT_START
    if end <= _LOW_END:
        return start >= 0
    if start < abi.HYPERVISOR_VIRT_START:
        return False
    return end <= 1 << 64 and (start >= abi.HYPERVISOR_VIRT_END or end <= abi.HYPERVISOR_VIRT_START)
