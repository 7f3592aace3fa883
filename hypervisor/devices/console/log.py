"""A guest's console output on disk: bounded, rotated, readable while it grows."""

from __future__ import annotations

import logging
import os
from pathlib import Path

LOG = logging.getLogger(__name__)

_READ_CHUNK = 1 << 16


class ConsoleLog:
    """Appends to `path`, and moves it to ``path.1`` (``.1`` to ``.2``, ...) when it is full.

    Opened again after a restart it goes on where it was. No fsync: the log
    is to outlive the process, not the machine.

    :ivar written: bytes, by this object. :ivar lost: likewise, what could not be written.
    :param max_bytes: size of one file, bytes, at least 4096.
    :param keep: rotated files kept beside the current one, so at most ``max_bytes * (keep + 1)`` bytes in all.
    :raises OSError: the file cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int = 1 << 20, keep: int = 1) -> None:
        if max_bytes < 4096 or keep < 0:
            raise ValueError(f"a console log of {max_bytes} bytes and {keep} old files: give at least 4096 and 0")
        self.path = path
        self.lost = 0
        self.written = 0
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._open()

    def write(self, data: bytes) -> None:
        """Append. What cannot be written (a full disk) is lost and counted in `lost`; the guest goes on."""
        while data:
            room = self._max_bytes - self._size
            if room <= 0:
                if not self._rotate():
                    self.lost += len(data)
                    return
                continue
            try:
                count = os.write(self._fd, data[:room])
            except OSError as exc:
                if not self.lost:
                    LOG.warning("console log %s: output is being lost: %s", self.path, exc)
                self.lost += len(data)
                return
            self._size += count
            self.written += count
            data = data[count:]

    def tail(self, size: int) -> bytes:
        """The last `size` bytes written, from the rotated files too; fewer when there are no more."""
        parts: list[bytes] = []
        for number in range(self._keep + 1):
            if size <= 0:
                break
            part = _read_end(self._name(number), size)
            parts.append(part)
            size -= len(part)
        return b"".join(reversed(parts))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close, and delete every file."""
        self.close()
        for number in range(self._keep + 1):
            self._name(number).unlink(missing_ok=True)

    def _name(self, number: int) -> Path:
        return self.path if number == 0 else self.path.with_name(f"{self.path.name}.{number}")

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> bool:
        try:
            if self._keep:
                for number in range(self._keep, 0, -1):
                    if self._name(number - 1).exists():
                        os.replace(self._name(number - 1), self._name(number))
            else:
                self.path.unlink(missing_ok=True)
            self.close()
            self._open()
        except OSError as exc:
            LOG.warning("console log %s cannot be rotated, output is being lost: %s", self.path, exc)
            return self._fd >= 0 and self._size < self._max_bytes
        return True


def _read_end(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            return file.read(size)
    except FileNotFoundError:
        return b""
