"""Make a guest image from Debian's packages, or from given files."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.images import debian
from agent.images.errors import ImageBuildFailed, ImageError
from agent.images.initramfs import build_initramfs
from agent.images.store import MANIFEST, Image, ImageFile, check_name, load_image

DEFAULT_CMDLINE = "console=hvc0 noreplace-smp cryptomgr.notests"
"""Kernel messages and the shell on the Xen console. Without noreplace-smp a kernel with one vCPU patches 8,000 lock
prefixes one by one, each with two page-table switches; the self-tests of its ciphers take another 0.3 s."""
MAX_FILE = 1 << 30
"""Largest kernel, ramdisk or added file, bytes."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Sources:
    kernel: bytes
    ramdisk: bytes | None
    packages: tuple[tuple[str, str], ...]


def build_image(
    dest_dir: str | os.PathLike[str],
    *,
    name: str,
    kernel: str | os.PathLike[str] | None = None,
    ramdisk: str | os.PathLike[str] | None = None,
    cmdline: str | None = None,
    add: Iterable[str | tuple[str | os.PathLike[str], str]] = (),
    kernel_package: str = debian.KERNEL_META_PACKAGE,
    cache_dir: str | os.PathLike[str] | None = None,
    replace: bool = False,
    progress: Progress = lambda text: None,
    apt: debian.Apt | None = None,
) -> Image:
    """Make the image ``dest_dir/name``; it appears whole or not at all.

    What is not given comes from Debian: the kernel from what `kernel_package` depends on, the ramdisk as our own
    busybox initramfs. With a kernel given and no ramdisk, the ramdisk is that initramfs too.

    :param dest_dir: the folder of all images (``<state>/images``); made when missing.
    :param add: what to put into our initramfs: ``"SRC:DEST"`` or (source, path in the guest).
    :param cmdline: kernel command line; None for `DEFAULT_CMDLINE`.
    :param cache_dir: where package downloads are kept; by default ``.cache`` in `dest_dir`.
    :param replace: put the image in the place of one with that name.
    :param progress: called with a line of text for each stage.
    :raises ImageError: the name, a given file or the existing image is in the way.
    :raises ImageBuildFailed: a package cannot be had, or the disk refused. Nothing is left behind but the cache.
    """
    target = Path(dest_dir) / check_name(name)
    cmdline = DEFAULT_CMDLINE if cmdline is None else cmdline
    if len(cmdline.encode()) > 1023 or not cmdline.isprintable():
        raise ImageError("the command line is not usable: give at most 1023 bytes on one line")
    extra = [_parse_add(item) for item in add]
    if ramdisk is not None and extra:
        raise ImageError("files can only be added to Reeve's own ramdisk: leave the ramdisk or the files out")
    if target.exists() and not replace:
        raise ImageError(f"image {name} exists already: remove it, choose another name, or replace it")
    cache = Path(cache_dir) if cache_dir is not None else Path(dest_dir) / ".cache"
    apt = apt or debian.Apt(cache, progress)
    sources = _gather(apt, kernel, ramdisk, extra, kernel_package, progress)
    try:
        return _write(target, name, sources, cmdline, progress)
    except OSError as exc:
        raise ImageBuildFailed(f"image {name} cannot be written to {dest_dir}: {exc.strerror}") from exc


def _gather(
    apt: debian.Apt,
    kernel: str | os.PathLike[str] | None,
    ramdisk: str | os.PathLike[str] | None,
    extra: list[tuple[Path, str]],
    kernel_package: str,
    progress: Progress,
) -> _Sources:
    packages: list[tuple[str, str]] = []
    if kernel is not None:
        kernel_data = _read(kernel, "kernel")
    else:
        package, path = apt.fetch(kernel_package)
        progress(f"unpacking the kernel of {package.name}")
        _, kernel_data = debian.read_member(path, lambda member: member.startswith("./boot/vmlinuz-"))
        packages.append((package.name, package.version))
    if ramdisk is not None:
        return _Sources(kernel_data, _read(ramdisk, "ramdisk"), tuple(packages))
    package, path = apt.fetch(debian.BUSYBOX_PACKAGE)
    _, busybox = debian.read_member(path, lambda member: member in ("./bin/busybox", "./usr/bin/busybox"))
    packages.append((package.name, package.version))
    progress("making the ramdisk")
    return _Sources(kernel_data, build_initramfs(busybox, extra), tuple(packages))


def _write(target: Path, name: str, sources: _Sources, cmdline: str, progress: Progress) -> Image:
    progress(f"writing image {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        work.chmod(0o755)
        image = Image(
            name=name,
            directory=target,
            kernel_file=_store(work, "vmlinuz", sources.kernel),
            ramdisk_file=None if sources.ramdisk is None else _store(work, "initrd.img", sources.ramdisk),
            cmdline=cmdline,
            packages=sources.packages,
            created=round(time.time(), 3),
        )
        _store(work, MANIFEST, (json.dumps(image.to_json(), indent=2) + "\n").encode())
        _put(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_image(target)


def _put(work: Path, target: Path) -> None:
    """Move the finished folder into place; an older image moves aside first and is then removed."""
    try:
        os.rename(work, target)
        return
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        os.rename(target, aside / "old")
        os.rename(work, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _store(folder: Path, name: str, data: bytes) -> ImageFile:
    with (folder / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ImageFile(name, len(data), hashlib.sha256(data).hexdigest())


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not make us wait
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(f"{what} {os.fspath(path)} is not a regular file: give the path of a {what} image")
            data = file.read(MAX_FILE + 1)
    except OSError as exc:
        raise ImageError(f"{what} {os.fspath(path)} cannot be read ({exc.strerror}): check the path") from exc
    if not data or len(data) > MAX_FILE:
        raise ImageError(f"{what} {os.fspath(path)} is {'too large' if data else 'empty'}: give another file")
    return data


def _parse_add(item: str | tuple[str | os.PathLike[str], str]) -> tuple[Path, str]:
    if isinstance(item, str):
        source, colon, target = item.partition(":")
        if not (source and colon and target.strip("/")):
            raise ImageError(f"{item!r} does not say what to add: give SRC:DEST, for example ./prog:/bin/prog")
    else:
        source, target = os.fspath(item[0]), item[1]
    return Path(source), target
