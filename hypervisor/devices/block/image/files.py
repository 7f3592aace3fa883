"""Opening what a disk lies in: only in allowed folders, only files and block devices, never guessing a format."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hypervisor.devices.block.image import qcow2
from hypervisor.devices.block.image.locks import Use, acquire
from hypervisor.errors import ImageInUse, ImageInvalid

MAX_CHAIN = 16


@dataclasses.dataclass(slots=True)
class ImageFile:
    """An opened, locked file of an image.

    :ivar identity: the same for every name of it. :ivar format: ``raw`` or ``qcow2``.
    :ivar size: bytes as it lies there.
    """

    path: str
    fd: int
    format: str
    size: int
    identity: tuple[int, int]
    block_device: bool
    header: qcow2.Header | None = None


class Opener:
    """:param folders: files and devices below them may be images; empty: none may."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = [os.path.realpath(folder) for folder in folders]

    def chain(
        self, path: str, image_format: str, *, readonly: bool, shared: bool, direct: bool, lock: bool = True
    ) -> list[ImageFile]:
        """The image and all its backing files, locked.

        :param lock: False: only for a look at them.
        :raises ImageInvalid: missing, another format, outside of the folders, a loop. :raises ImageInUse.
        """
        files: list[ImageFile] = []
        use = Use.of(readonly=readonly, shared=shared)
        try:
            while True:
                file = self.one(path, image_format, use, direct=direct, lock=lock)
                files.append(file)
                if any(other.identity == file.identity for other in files[:-1]):
                    raise ImageInvalid(f"{file.path} is its own backing file: make the image again")
                if file.header is None or not file.header.backing:
                    return files
                if len(files) > MAX_CHAIN:
                    raise ImageInvalid(
                        f"image {files[0].path} has more than {MAX_CHAIN} backing files: qemu-img commit them"
                    )
                path, image_format = _backing(file)
                use = Use.READER
        except BaseException:
            for file in files:
                os.close(file.fd)
            raise

    def identity(self, path: str) -> tuple[int, int]:
        """The same for every name of a file or device. :raises OSError."""
        return _identity(os.stat(path))

    def one(self, path: str, image_format: str, use: Use, *, direct: bool, lock: bool = True) -> ImageFile:
        """:raises ImageInvalid. :raises ImageInUse."""
        real = os.path.realpath(path)
        self._check_folder(path, real)
        writing = use in (Use.WRITER, Use.SHARED_WRITER)
        # Not to hang on a pipe, and not to follow what was put there meanwhile.
        flags = (os.O_RDWR if writing else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            if use is Use.WRITER and stat.S_ISBLK(os.stat(real).st_mode):
                # Nor with what is mounted, and whatever node it is opened by: locks are those of a node.
                flags |= os.O_EXCL
            fd = os.open(real, flags)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise ImageInUse(
                    f"image {path} is in use by the host or by another name: unmount it, or detach it there"
                ) from exc
            raise _cannot_open(path, exc, writing=writing) from exc
        try:
            self._check_folder(path, os.readlink(f"/proc/self/fd/{fd}"))
            return self._opened(fd, path, image_format, use if lock else None, direct=direct)
        except BaseException:
            os.close(fd)
            raise

    def _opened(self, fd: int, path: str, image_format: str, use: Use | None, *, direct: bool) -> ImageFile:
        status = os.fstat(fd)
        block = stat.S_ISBLK(status.st_mode)
        if not block and not stat.S_ISREG(status.st_mode):
            raise ImageInvalid(f"image {path} is neither a file nor a block device: give one")
        if use is not None and not acquire(fd, use):
            raise ImageInUse(
                f"image {path} is in use: detach it there, or give both sides readonly, or both shared if its file "
                "system is made for that"
            )
        size = os.lseek(fd, 0, os.SEEK_END)
        file = ImageFile(os.path.realpath(path), fd, image_format, size, _identity(status), block)
        if image_format == "qcow2":
            file.header = qcow2.read_header(fd, path)
        _set_flags(fd, path, direct=direct)
        return file

    def _check_folder(self, path: str, real: str) -> None:
        if not any(real.startswith(folder.rstrip("/") + "/") for folder in self._folders):
            told = ", ".join(self._folders) or "none"
            lies = "" if path == real else f" (it is {real})"
            raise ImageInvalid(
                f"image {path}{lies} lies outside of the allowed folders ({told}): move it, or set image_folders"
            )


def _identity(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def _backing(file: ImageFile) -> tuple[str, str]:
    assert file.header is not None
    name, backing_format = file.header.backing, file.header.backing_format
    if backing_format not in ("raw", "qcow2"):
        said = f"is {backing_format!r}" if backing_format else "is not stated"
        raise ImageInvalid(
            f"the format of the backing file of {file.path} {said}, and formats are not guessed: "
            "set it with qemu-img rebase -u -F raw|qcow2 -b BACKING IMAGE"
        )
    if ":" in name.split("/", 1)[0]:
        raise ImageInvalid(f"the backing file of {file.path} is {name[:80]!r}, no file of this host")
    return os.path.join(os.path.dirname(file.path), name), backing_format


def _set_flags(fd: int, path: str, *, direct: bool) -> None:
    try:
        flags = os.O_DIRECT if direct else 0
        os.set_blocking(fd, True)
        if flags:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
    except OSError as exc:
        raise ImageInvalid(f"image {path} cannot be used with direct=true here ({exc.strerror}): leave it out") from exc


def _cannot_open(path: str, exc: OSError, *, writing: bool) -> ImageInvalid:
    cure = {
        "FileNotFoundError": "make it first",
        "PermissionError": "let the host process's user " + ("write" if writing else "read") + " it",
        "IsADirectoryError": "give a file in it",
    }.get(type(exc).__name__, "give a file or block device")
    if writing and exc.errno == errno.EROFS:
        cure = "attach it readonly"
    return ImageInvalid(f"image {path} cannot be opened ({exc.strerror}): {cure}")
