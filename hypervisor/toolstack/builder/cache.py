"""Unpacked kernels, kept by content: unpacking one takes a second or two, reading it back some hundredths.

A directory holds ``<sha256 of the file>.kernel`` (a header with the size and
checksum of the unpacked image, then the image) and ``<hash>.stat``, which says
what file state has which content, so that an unchanged file is not even read.
Entries appear by rename, so several processes and threads may share a
directory; a lock keeps them from unpacking the same kernel at once. The cache
never makes a load fail: what cannot be read back or written is unpacked anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hypervisor.errors import KernelInvalid
from hypervisor.toolstack.builder import elf
from hypervisor.toolstack.builder.files import read_file
from hypervisor.toolstack.builder.kernel import MAX_FILE, MAX_UNPACKED, Kernel, parse_kernel, unpack_kernel

LOG = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 1 << 30
_HEADER = struct.Struct("<8sQ32s")
_MAGIC = b"REEVEKN1"
_MAX_STAT_FILES = 256
_STALE_SECONDS = 3600


class KernelCache:
    """Loads kernels, unpacking each content once. Its whole state is the directory.

    :param directory: made when missing, mode 0700.
    :param max_bytes: most bytes kept; the longest unused go first.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._directory = Path(directory)
        self._max_bytes = max_bytes

    def load(self, path: str | os.PathLike[str]) -> Kernel:
        """The kernel in a file, unpacked and checked.

        :raises KernelInvalid, KernelNotXen, KernelPvhOnly, Unsupported: as `load_kernel`.
        """
        name = os.fspath(path)
        state = _file_state(name)
        image = self._by_state(state)
        if image is None:
            data = read_file(path, "kernel", KernelInvalid, MAX_FILE)
            if data[:4] == elf.MAGIC:
                return parse_kernel(data, name)
            image = self._by_content(data, name, state if state == _file_state(name) else None)
        return parse_kernel(image, name)

    def _by_state(self, state: str | None) -> memoryview | None:
        if state is None:
            return None
        try:
            digest = (self._directory / f"{state}.stat").read_text("ascii")
        except (OSError, ValueError):
            return None
        return self._read(digest) if len(digest) == 64 and digest.isalnum() else None

    def _by_content(self, data: bytes, name: str, state: str | None) -> memoryview:
        digest = hashlib.sha256(data).hexdigest()
        image = self._read(digest)
        if image is None:
            with self._lock():
                image = self._read(digest)  # another process may have been at it
                if image is None:
                    image = memoryview(unpack_kernel(data, name))
                    self._store(f"{digest}.kernel", _header(image), image)
                    self._prune()
        if state is not None:
            self._store(f"{state}.stat", digest.encode())
        return image

    def _read(self, digest: str) -> memoryview | None:
        """The unpacked image of that content; None when absent or damaged (then it is removed)."""
        path = self._directory / f"{digest}.kernel"
        try:
            if path.stat().st_size > MAX_UNPACKED + _HEADER.size:
                raise ValueError("too large")
            data = memoryview(path.read_bytes())
            image = data[_HEADER.size :]
            if bytes(data[: _HEADER.size]) != _header(image):
                raise ValueError("checksum differs")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            LOG.warning("cached kernel %s is not usable (%s): it is unpacked again", path, exc)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return image

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        fd = -1
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as exc:
            LOG.warning("kernel cache %s cannot be locked (%s): going on without", self._directory, exc)
        try:
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def _store(self, name: str, *parts: bytes | memoryview) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self._directory, prefix="tmp-", delete=False) as file:
                try:
                    for part in parts:
                        file.write(part)
                    file.flush()
                    os.replace(file.name, self._directory / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as exc:
            LOG.warning("kernel cache %s cannot be written (%s): going on without", self._directory, exc)

    def _prune(self) -> None:
        """Keep within the bounds; what was used last goes last. Called under the lock."""
        kernels: list[tuple[float, int, Path]] = []
        stats: list[tuple[float, int, Path]] = []
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    info = path.stat()
                    row = (info.st_mtime, info.st_size, path)
                    if path.suffix == ".kernel":
                        kernels.append(row)
                    elif path.suffix == ".stat":
                        stats.append(row)
                    elif path.name.startswith("tmp-") and info.st_mtime < time.time() - _STALE_SECONDS:
                        path.unlink()
            total = 0
            for _, size, path in sorted(kernels, reverse=True):
                total += size
                if total > self._max_bytes:
                    path.unlink(missing_ok=True)
            for _, _, path in sorted(stats, reverse=True)[_MAX_STAT_FILES:]:
                path.unlink(missing_ok=True)


def _header(image: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, len(image), hashlib.sha256(image).digest())


def _file_state(name: str) -> str | None:
    """A key for the file as it is now; None when it cannot be looked at."""
    try:
        info = os.stat(name)
    except (OSError, ValueError):
        return None
    # The change time too: it cannot be set back, so content swapped under an old modification time is noticed.
    key = f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]
