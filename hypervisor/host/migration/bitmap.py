"""Bitmaps of pages as `hypervisor.host.mover.Sender.pages` takes them."""

from __future__ import annotations

import errno
import os

from hypervisor.types import PAGE_SIZE


def create(pages: int) -> int:
    """A descriptor with room for both bitmaps, all bits clear."""
    fd = os.memfd_create("reeve-dirty", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * ((pages + 7) // 8))
    return fd


def mark_data(bitmap: int, memory: int, pages: int) -> int:
    """Set the bits of all pages that hold something; holes in a memfd are zeros, as the target's memory is at first.

    :returns: how many.
    """
    bits = bytearray((pages + 7) // 8)
    count = at = 0
    while at < pages:
        try:
            start = os.lseek(memory, at * PAGE_SIZE, os.SEEK_DATA) // PAGE_SIZE
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            break
        at = min(pages, -(-os.lseek(memory, start * PAGE_SIZE, os.SEEK_HOLE) // PAGE_SIZE))
        _set(bits, start, at)
        count += max(0, at - start)
    os.pwrite(bitmap, bits, 0)
    return count


def _set(bits: bytearray, start: int, end: int) -> None:
    while start < end and start % 8:
        bits[start // 8] |= 1 << start % 8
        start += 1
    whole = (end - start) // 8
    if whole > 0:
        bits[start // 8 : start // 8 + whole] = b"\xff" * whole
        start += 8 * whole
    for bit in range(start, end):
        bits[bit // 8] |= 1 << bit % 8
