"""Where a domain's machine frames lie.

The host's ledger gives a domain one contiguous extent of machine frames,
unique on the host. Offset in the domain's memfd = ``(mfn - base_mfn) * 4096``:

::

    base_mfn                                       base_mfn + max_pages
    ├── guest RAM: pfn 0 .. max_pages-1 ───────────┼── Xen's frames for this domain ──┤

At boot pfn *p* is mfn ``base_mfn + p``; the guest may exchange frames later.
Xen's frames hold what the hypervisor shares with or maps into this one guest
(shared_info, the per-domain GDT window, its view of the M2P, grant tables).
Only a few of them are touched, so the rest costs no host memory.
"""

from __future__ import annotations

M2P_VIRT_START = 0xFFFF_8000_0000_0000
"""HYPERVISOR_VIRT_START, where 64-bit guests read the machine-to-physical table (public/arch-x86/xen-x86_64.h)."""

FIXED_XEN_FRAMES = 192
"""shared_info, page-table pages, GDT pages and grant frames of one domain (see `hypervisor.memory.xenarea`)."""

FIRST_MFN = 0x10000
"""Machine frames below 256 MiB are never given out: a small number used as a frame is a bug, not a neighbour."""

MAX_MFN = 1 << 27
"""512 GiB of machine address space; the M2P for it fills one 1 GiB of virtual space."""


def xen_frames(max_pages: int) -> int:
    """Number of Xen frames that a domain of at most `max_pages` RAM pages needs."""
    # The domain's slice of the M2P: 8 bytes a frame, one page per 512 frames, one L1 per 512 of those pages.
    # The slice need not start on a page or table boundary, hence one more of each.
    frames = max_pages + FIXED_XEN_FRAMES
    m2p_pages = frames // 512 + 3
    m2p_l1s = m2p_pages // 512 + 3
    return FIXED_XEN_FRAMES + m2p_pages + m2p_l1s


def total_frames(max_pages: int) -> int:
    """RAM and Xen frames together: what the ledger reserves and the memfd holds."""
    return max_pages + xen_frames(max_pages)
