"""Xen's ELF notes and the older ``__xen_guest`` string (public/elfnote.h, public/features.h).

Rules follow Xen's libelf: notes in PT_NOTE segments, else in SHT_NOTE
sections, else the ``__xen_guest`` section; a later note replaces an earlier
one of its type; the two feature notes add up.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

from hypervisor import abi
from hypervisor.errors import KernelInvalid, Unsupported
from hypervisor.toolstack.builder.elf import ElfImage

MAX_NOTES = 4096
"""Notes looked at in one file; a sound kernel has about twenty."""

_NUMBERS = {
    abi.XEN_ELFNOTE_ENTRY: "entry",
    abi.XEN_ELFNOTE_HYPERCALL_PAGE: "hypercall_page",
    abi.XEN_ELFNOTE_VIRT_BASE: "virt_base",
    abi.XEN_ELFNOTE_PADDR_OFFSET: "paddr_offset",
    abi.XEN_ELFNOTE_HV_START_LOW: "hv_start_low",
    abi.XEN_ELFNOTE_SUSPEND_CANCEL: "suspend_cancel",
    abi.XEN_ELFNOTE_INIT_P2M: "init_p2m",
    abi.XEN_ELFNOTE_MOD_START_PFN: "mod_start_pfn",
    abi.XEN_ELFNOTE_SUPPORTED_FEATURES: "features_supported",
    abi.XEN_ELFNOTE_PHYS32_ENTRY: "phys32_entry",
}
_STRINGS = {
    abi.XEN_ELFNOTE_XEN_VERSION: "xen_version",
    abi.XEN_ELFNOTE_GUEST_OS: "guest_os",
    abi.XEN_ELFNOTE_GUEST_VERSION: "guest_version",
    abi.XEN_ELFNOTE_LOADER: "loader",
    abi.XEN_ELFNOTE_PAE_MODE: "pae_mode",
    abi.XEN_ELFNOTE_FEATURES: "features",
    abi.XEN_ELFNOTE_BSD_SYMTAB: "bsd_symtab",
}
_LEGACY_STRINGS = {
    "LOADER": "loader",
    "GUEST_OS": "guest_os",
    "GUEST_VER": "guest_version",
    "XEN_VER": "xen_version",
    "PAE": "pae_mode",
    "FEATURES": "features",
}
_LEGACY_NUMBERS = {
    "VIRT_BASE": "virt_base",
    "VIRT_ENTRY": "entry",
    "ELF_PADDR_OFFSET": "paddr_offset",
    "HYPERCALL_PAGE": "hypercall_page",
}

FEATURE_BITS = {
    "writable_page_tables": abi.XENFEAT_writable_page_tables,
    "writable_descriptor_tables": abi.XENFEAT_writable_descriptor_tables,
    "auto_translated_physmap": abi.XENFEAT_auto_translated_physmap,
    "supervisor_mode_kernel": abi.XENFEAT_supervisor_mode_kernel,
    "pae_pgdir_above_4gb": abi.XENFEAT_pae_pgdir_above_4gb,
    "hvm_callback_vector": abi.XENFEAT_hvm_callback_vector,
    "dom0": abi.XENFEAT_dom0,
}
"""Names that may stand in a features string (libelf's table) and their bit numbers."""

OFFERED_FEATURES = frozenset({"writable_page_tables", "pae_pgdir_above_4gb"})
"""What a kernel may *require* of us: all else belongs to dom0 or to another kind of guest."""


@dataclasses.dataclass(frozen=True, slots=True)
class XenNotes:
    """The notes of one kernel; None where a note is absent.

    :ivar features_supported: bit mask of both feature notes, bit numbers of public/features.h.
    :ivar features_required: bit mask of the names marked ``!``.
    :ivar legacy: they come from a ``__xen_guest`` string.
    """

    guest_os: str = ""
    guest_version: str = ""
    xen_version: str = ""
    loader: str = ""
    pae_mode: str = ""
    virt_base: int | None = None
    entry: int | None = None
    hypercall_page: int | None = None
    paddr_offset: int | None = None
    hv_start_low: int | None = None
    init_p2m: int | None = None
    mod_start_pfn: bool = False
    suspend_cancel: bool = False
    bsd_symtab: bool = False
    phys32_entry: int | None = None
    features_supported: int = 0
    features_required: int = 0
    legacy: bool = False

    @property
    def extended_cr3(self) -> bool:
        """A 32-bit kernel takes a CR3 that names a frame above 4 GiB.

        The rule is libelf's: a plain "yes" says so in a note, not in a ``__xen_guest`` string.
        """
        known = self.pae_mode in ("yes[extended-cr3]", "bimodal") or "bimodal" in self.pae_mode
        return known or (self.pae_mode == "yes" and not self.legacy)


def find_notes(elf: ElfImage, name: str) -> XenNotes | None:
    """The Xen notes of an ELF file, or None when it has none.

    :raises KernelInvalid: a note is malformed.
    :raises Unsupported: a feature is required that this hypervisor does not have.
    """
    for blobs in (elf.note_segments(), elf.note_sections()):
        fields = _parse_note_blobs(blobs, name)
        if fields:
            return _finish(fields, name, legacy=False)
    guest = elf.section(b"__xen_guest")
    if guest is None:
        return None
    return _finish(_parse_guest_string(bytes(guest[:4096]), name), name, legacy=True)


def _parse_note_blobs(blobs: list[memoryview], name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    count = 0
    for blob in blobs:
        at = 0
        while at + 12 <= len(blob):
            count += 1
            if count > MAX_NOTES:
                raise KernelInvalid(f"{name} is damaged: more than {MAX_NOTES} ELF notes; copy or download it again")
            namesz, descsz, kind = struct.unpack_from("<III", blob, at)
            desc_at = at + 12 + ((namesz + 3) & ~3)
            # GRUB's 32-bit image gives its last string a size beyond the end; libelf reads strings up to their NUL.
            whole = desc_at + descsz <= len(blob) or (kind in _STRINGS and b"\0" in bytes(blob[desc_at:]))
            if not whole:
                raise KernelInvalid(f"{name} is damaged: an ELF note reaches past its segment; copy it again")
            if bytes(blob[at + 12 : at + 12 + min(namesz, 5)]) == b"Xen\0":
                # Marks that a Xen note was seen even if its type means nothing to us.
                fields.setdefault("features", "")
                _take_note(fields, kind, bytes(blob[desc_at : desc_at + descsz]), name)
            at = desc_at + ((descsz + 3) & ~3)
    return fields


def _take_note(fields: dict[str, Any], kind: int, desc: bytes, name: str) -> None:
    if kind in _NUMBERS:
        if len(desc) not in (1, 2, 4, 8):
            raise KernelInvalid(
                f"{name} is damaged: Xen note {kind} holds {len(desc)} bytes, not a number; copy it again"
            )
        fields[_NUMBERS[kind]] = int.from_bytes(desc, "little")
    elif kind in _STRINGS:
        fields[_STRINGS[kind]] = desc.split(b"\0", 1)[0][:1024].decode("latin-1")


def _parse_guest_string(blob: bytes, name: str) -> dict[str, Any]:
    """``KEY=value,KEY=value`` up to a NUL; HYPERCALL_PAGE is a page number relative to VIRT_BASE."""
    fields: dict[str, Any] = {"features": ""}
    for item in blob.split(b"\0", 1)[0].decode("latin-1").split(","):
        key, _, value = item.partition("=")
        if key in _LEGACY_STRINGS:
            fields[_LEGACY_STRINGS[key]] = value
        elif key in _LEGACY_NUMBERS:
            try:
                fields[_LEGACY_NUMBERS[key]] = int(value[:32], 0)
            except ValueError:
                raise KernelInvalid(
                    f"{name} is damaged: __xen_guest says {key}={value[:32]!r}; copy it again"
                ) from None
        elif key == "BSD_SYMTAB":
            fields["bsd_symtab"] = "yes"
    if "hypercall_page" in fields:
        fields["hypercall_page"] = (fields["hypercall_page"] << 12) + fields.get("virt_base", 0)
    return fields


def _finish(fields: dict[str, Any], name: str, *, legacy: bool) -> XenNotes:
    supported, required = _parse_features(fields.pop("features"), name)
    fields["features_supported"] = supported | fields.get("features_supported", 0) & 0xFFFFFFFF
    for flag in ("mod_start_pfn", "suspend_cancel"):
        fields[flag] = bool(fields.get(flag, 0))
    fields["bsd_symtab"] = fields.get("bsd_symtab") == "yes"
    return XenNotes(features_required=required, legacy=legacy, **fields)


def _parse_features(text: str, name: str) -> tuple[int, int]:
    supported = required = 0
    for item in text.split("|"):
        feature = item.removeprefix("!")
        bit = FEATURE_BITS.get(feature)
        if item.startswith("!") and feature not in OFFERED_FEATURES:
            raise Unsupported(
                f"{name} requires the Xen feature {feature[:40]!r}, which guests do not have here: use a domU kernel"
            )
        if bit is None:
            continue
        supported |= 1 << bit
        if item.startswith("!"):
            required |= 1 << bit
    return supported, required
