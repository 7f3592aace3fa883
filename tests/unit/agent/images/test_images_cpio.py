"""The newc writer and our initramfs, read back by an independent reader."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.images.cpio import CpioWriter
from agent.images.errors import ImageError
from agent.images.initramfs import INIT, READY, build_initramfs


class Entry(NamedTuple):
    name: str
    mode: int
    inode: int
    links: int
    rdev: tuple[int, int]
    data: bytes


def read_newc(archive: bytes) -> Iterator[Entry]:
    at = 0
    while True:
        assert at % 4 == 0 and archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)]
        inode, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid, mtime) == (0, 0, 0)
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at = (at + 110 + name_size + 3) & ~3
        data = archive[at : at + size]
        at = (at + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert not archive[at:].strip(b"\0") and len(archive) % 512 == 0
            return
        yield Entry(name[:-1].decode(), mode, inode, links, (major, minor), data)


def entries(archive: bytes) -> dict[str, Entry]:
    return {entry.name: entry for entry in read_newc(archive)}


def test_kinds_of_entries() -> None:
    writer = CpioWriter()
    writer.file("etc/motd", b"hello", 0o600)
    writer.symlink("bin/sh", "busybox")
    writer.character_device("/dev/console", 5, 1)
    writer.directory("tmp", 0o1777)
    found = entries(writer.to_bytes())
    assert found["etc/motd"].data == b"hello" and found["etc/motd"].mode == stat.S_IFREG | 0o600
    assert found["bin/sh"].data == b"busybox" and stat.S_ISLNK(found["bin/sh"].mode)
    assert found["dev/console"].rdev == (5, 1) and found["dev/console"].mode == stat.S_IFCHR | 0o600
    assert found["tmp"].mode == stat.S_IFDIR | 0o1777
    assert len({entry.inode for entry in found.values()}) == len(found)


def test_parents_are_there_and_come_first() -> None:
    writer = CpioWriter()
    writer.file("a/b/c", b"")
    writer.file("a-b", b"")
    names = [entry.name for entry in read_newc(writer.to_bytes())]
    assert names.index("a") < names.index("a/b") < names.index("a/b/c")


def test_same_content_same_bytes_whatever_the_order() -> None:
    one, two = CpioWriter(), CpioWriter()
    for writer, paths in ((one, ("x", "y/z")), (two, ("y/z", "x"))):
        for path in paths:
            writer.file(path, path.encode())
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize("path", ["", "/", "../x", "a/../b", "a//b", "./a", "nul\0", "x" * 5000])
def test_paths_that_leave_the_archive(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        CpioWriter().file(path, b"")


def test_a_file_is_no_folder() -> None:
    writer = CpioWriter()
    writer.file("a", b"")
    with pytest.raises(ValueError, match="not a folder"):
        writer.file("a/b", b"")


def test_initramfs_has_what_a_boot_needs(tmp_path: Path) -> None:
    program = tmp_path / "prog"
    program.write_bytes(b"\x7fELF...")
    program.chmod(0o700)
    found = entries(build_initramfs(b"BUSYBOX", [(program, "/bin/prog")]))
    assert found["bin/busybox"].data == b"BUSYBOX" and found["bin/busybox"].mode & 0o111
    assert found["init"].data.decode() == INIT and found["init"].mode & 0o100
    assert found["etc/cpu-added"].mode & 0o100
    assert READY in INIT
    assert found["dev/console"].rdev == (5, 1)
    assert found["bin/sh"].data == b"busybox"
    assert found["bin/prog"].data == b"\x7fELF..." and found["bin/prog"].mode & 0o100
    for command in ("poweroff", "reboot"):  # what Linux runs when control/shutdown asks for it
        assert found[f"sbin/{command}"].mode & 0o100
        assert f"{command} -f".encode() in found[f"sbin/{command}"].data
    for folder in ("proc", "sys", "dev", "tmp"):
        assert stat.S_ISDIR(found[folder].mode)


def test_a_file_that_cannot_be_added(tmp_path: Path) -> None:
    for source, target in ((tmp_path / "missing", "x"), (Path(__file__), "../x")):
        with pytest.raises(ImageError, match="cannot be added"):
            build_initramfs(b"", [(source, target)])
