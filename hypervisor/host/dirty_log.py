"""Which pages of a mapping were written: asynchronous write protection by userfaultfd, looked up with PAGEMAP_SCAN.

The kernel takes the first write to a protected page, lets it through and remembers it, without waking anybody; one
ioctl then tells what was written and protects it again. Both descriptors are made before the sandbox closes; what
they can be asked for afterwards concerns this process's own memory alone. Only writes through this one mapping are
seen: what other processes write is not, and what is given back to the host (a hole punched) is not a write either.

Sources: linux/userfaultfd.h, linux/fs.h (PAGEMAP_SCAN), both Linux 6.7 or newer.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Any

import numpy as np

from hypervisor.types import PAGE_SHIFT

_SYS_USERFAULTFD = 323
_USER_MODE_ONLY = 1
_API = 0xAA
_WP_HUGETLBFS_SHMEM, _WP_UNPOPULATED, _WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_UFFDIO_API = 0xC018_AA3F
UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT = 0xC020_AA00, 0x8010_AA01, 0xC018_AA06
_REGISTER_WP, _WRITEPROTECT_WP = 2, 1

PAGEMAP_SCAN = 0xC060_6610
_SCAN = struct.Struct("<12Q")
_PAGE_IS_WRITTEN = 2
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_REGIONS = 4096
"""Stretches of written pages told by one ioctl."""


class Unavailable(Exception):
    """Why writes cannot be logged here."""


class WriteLog:
    """:raises Unavailable: the kernel has not got it, or does not let this process use it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._uffd = int(libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY))
        if self._uffd < 0:
            raise Unavailable(f"no userfaultfd: {os.strerror(ctypes.get_errno())}")
        features = _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC
        try:
            fcntl.ioctl(self._uffd, _UFFDIO_API, bytearray(struct.pack("<3Q", _API, features, 0)))
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            os.close(self._uffd)
            raise Unavailable(f"no asynchronous write protection: {exc.strerror}") from exc
        self._vector = (ctypes.c_uint64 * (3 * _REGIONS))()
        self._regions: Any = np.ctypeslib.as_array(self._vector).reshape(-1, 3)
        self._start = self._size = 0
        try:
            self._scan_once(0, 0)
        except OSError as exc:
            self.close()
            raise Unavailable(f"no PAGEMAP_SCAN: {exc.strerror}") from exc

    def ioctls(self) -> dict[int, tuple[int, ...]]:
        """What the sandbox must let through, by descriptor."""
        return {
            self._uffd: (UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WRITEPROTECT),
            self._pagemap: (PAGEMAP_SCAN,),
        }

    @property
    def on(self) -> bool:
        return bool(self._size)

    def start(self, address: int, size: int) -> None:
        """Log from now on. :param address, size: of a shared mapping of a memfd, whole pages. :raises OSError."""
        if self._size:
            self.stop()
        fcntl.ioctl(self._uffd, UFFDIO_REGISTER, bytearray(struct.pack("<4Q", address, size, _REGISTER_WP, 0)))
        self._start, self._size = address, size
        try:
            protect = struct.pack("<3Q", address, size, _WRITEPROTECT_WP)
            fcntl.ioctl(self._uffd, UFFDIO_WRITEPROTECT, bytearray(protect))
        except OSError:
            self.stop()
            raise

    def stop(self) -> None:
        """Harmless when repeated."""
        if self._size:
            fcntl.ioctl(self._uffd, UFFDIO_UNREGISTER, bytearray(struct.pack("<2Q", self._start, self._size)))
        self._start = self._size = 0

    def take(self) -> np.ndarray[Any, Any]:
        """Which pages were written since `start` or the last `take`: a bool for each. :raises OSError."""
        pages = self._size >> PAGE_SHIFT
        steps = np.zeros(pages + 1, dtype=np.int8)
        at, end = self._start, self._start + self._size
        while at < end:
            count, at = self._scan_once(at, end)
            found = ((self._regions[:count, :2] - np.uint64(self._start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
            # Stretches do not overlap, but a scan may end and the next begin at the same page.
            np.add.at(steps, found[:, 0], 1)
            np.add.at(steps, found[:, 1], -1)
        written: np.ndarray[Any, Any] = np.cumsum(steps[:pages], dtype=np.int8) != 0
        return written

    def _scan_once(self, start: int, end: int) -> tuple[int, int]:
        """How many stretches were put into the vector, and where the scan ended."""
        vector = ctypes.addressof(self._vector)
        flags = _WP_MATCHING | _CHECK_WPASYNC
        # This very combination of categories takes the kernel's short cut: an entry that is gone counts as written.
        words = (_SCAN.size, flags, start, end, 0, vector, _REGIONS, 0, 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)
        argument = bytearray(_SCAN.pack(*words))
        count = fcntl.ioctl(self._pagemap, PAGEMAP_SCAN, argument)
        return count, _SCAN.unpack(argument)[4]

    def close(self) -> None:
        os.close(self._uffd)
        os.close(self._pagemap)


def packed(pages: np.ndarray[Any, Any]) -> bytes:
    """Bools as a bitmap, the lowest bit of byte 0 first."""
    return np.packbits(pages, bitorder="little").tobytes()
