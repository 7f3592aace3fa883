"""Write cpio archives in the "newc" format that Linux unpacks as its initramfs.

Needs no privileges: owners, modes and device nodes are only bytes here. The
same content always gives the same archive.
"""

from __future__ import annotations

import stat

MAX_FILE = 0xFFFFFFFF
"""Largest file the format can hold, bytes."""


class CpioWriter:
    """Collects entries; everything belongs to root and dates from the epoch.

    Parent folders are added where missing. A path that is added twice replaces
    the earlier entry.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes, int, int]] = {}

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """:raises ValueError: longer than `MAX_FILE`, or the path is not usable."""
        if len(data) > MAX_FILE:
            raise ValueError(f"{path} is larger than a cpio archive can hold")
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFCHR | mode, b"", major, minor)

    def to_bytes(self) -> bytes:
        """The archive, ended as the format demands and padded to 512 bytes."""
        parts: list[bytes] = []
        for inode, path in enumerate(sorted(self._entries), 1):
            mode, data, major, minor = self._entries[path]
            parts.append(_entry(path, inode, mode, data, major, minor))
        parts.append(_entry("TRAILER!!!", 0, 0, b"", 0, 0))
        archive = b"".join(parts)
        return archive + bytes(-len(archive) % 512)

    def _add(self, path: str, mode: int, data: bytes = b"", major: int = 0, minor: int = 0) -> None:
        path = path.strip("/")
        names = path.split("/")
        if not path or "\0" in path or any(name in ("", ".", "..") for name in names) or len(path.encode()) > 4000:
            raise ValueError(f"{path!r} is not a path inside an archive")
        for depth in range(1, len(names)):
            parent = "/".join(names[:depth])
            if not stat.S_ISDIR(self._entries.setdefault(parent, (stat.S_IFDIR | 0o755, b"", 0, 0))[0]):
                raise ValueError(f"{parent!r} is not a folder, so {path!r} cannot be in it")
        self._entries[path] = (mode, data, major, minor)


def _entry(path: str, inode: int, mode: int, data: bytes, major: int, minor: int) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
