"""Which image on the target a disk becomes: what the source tells of it, what the target decides, makes and removes.

A disk is *shared* when the target proves to see the very file: the same machine, device and inode, or a path below a
folder of which the operator has said that it is the same storage on all hosts, with the same size. Equal names alone
prove nothing. Every other disk is *local* and copied into a new file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from hypervisor.devices.block.image import overlay
from hypervisor.devices.block.image.files import MAX_CHAIN
from hypervisor.devices.block.image.qcow2 import read_header
from hypervisor.errors import HostFailure, ImageInvalid, MigrationRefused

MAX_PATH = 4096
MAX_SIZE = 1 << 44
FORMATS = ("raw", "qcow2")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CHUNK = 1 << 20
_NOTHING = bytes(_CHUNK)
_DIGESTS: dict[tuple[int, ...], bytes] = {}
_MAX_DIGESTS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class FileFacts:
    """A file of an image.

    :ivar path: with all links followed. :ivar size: bytes of the file. :ivar inode, device: on the machine `boot`.
    """

    path: str
    format: str
    size: int
    device: int
    inode: int
    boot: str

    def is_here(self, shared: Sequence[str | Path]) -> bool:
        """Whether this host has the very same file at this path.

        :param shared: folders that are the same on all hosts.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        identity = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        if (self.boot, self.device, self.inode) == (boot_id(), identity, status.st_ino):
            return True
        real = os.path.realpath(self.path)
        return _size(self.path) == self.size and real == self.path and any(_is_below(real, folder) for folder in shared)

    @classmethod
    def of(cls, path: str, image_format: str) -> Self:
        """:raises ImageInvalid: it cannot be looked at."""
        real = os.path.realpath(path)
        try:
            status = os.stat(real)
            device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
            return cls(real, image_format, _size(real), device, status.st_ino, boot_id())
        except OSError as exc:
            raise ImageInvalid(f"image {path} cannot be looked at: {exc.strerror}") from exc

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """:raises MigrationRefused: it makes no sense."""
        try:
            facts = cls(**data)
            good = (
                _is_path(facts.path)
                and facts.format in FORMATS
                and isinstance(facts.boot, str)
                and all(type(number) is int and 0 <= number < 1 << 64 for number in (facts.device, facts.inode))
                and type(facts.size) is int
                and 0 <= facts.size <= 2 * MAX_SIZE
            )
        except TypeError:
            good = False
        if not good:
            raise MigrationRefused("the source describes an image in a way that makes no sense: install one release")
        return facts


@dataclasses.dataclass(frozen=True, slots=True)
class DiskOffer:
    """What a source tells of a disk.

    :ivar size: of the disk as the guest sees it, bytes. :ivar stored: what its own file takes on its host's disk.
    :ivar files: the image, then its backing files.
    """

    id: str
    size: int
    stored: int
    files: tuple[FileFacts, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises MigrationRefused: it makes no sense."""
        try:
            files = tuple(FileFacts.from_json(item) for item in data["files"])
            offer = cls(data["id"], data["size"], data["stored"], files)
            numbers = all(type(number) is int and 0 <= number <= MAX_SIZE for number in (offer.size, offer.stored))
            good = isinstance(offer.id, str) and numbers and offer.size > 0 and 0 < len(files) <= MAX_CHAIN + 1
        except (KeyError, TypeError):
            good = False
        if not good:
            raise MigrationRefused("the source describes a disk in a way that makes no sense: install one release")
        return offer


@dataclasses.dataclass(frozen=True, slots=True)
class DiskAnswer:
    """What a target can do with a disk.

    :ivar shared: it sees the very same image. :ivar path: where a copy would lie; "": none can, and `refusal` says why.
    :ivar top: all backing files are here, so the image itself is all that must be copied; else `missing` says more.
    :ivar compare: their contents must be compared before that.
    """

    id: str
    shared: bool = False
    path: str = ""
    refusal: str = ""
    top: bool = False
    compare: bool = False
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises MigrationRefused: it makes no sense."""
        try:
            answer = cls(**data)
            good = all(
                type(getattr(answer, field.name)) is type(field.default) for field in dataclasses.fields(cls)[1:]
            )
        except TypeError:
            good = False
        if not good:
            raise MigrationRefused("the target answers for a disk in a way that makes no sense: install one release")
        return answer


class Copy(enum.Enum):
    """How much of a disk is copied."""

    NOTHING = "nothing"
    TOP = "top"
    WHOLE = "whole"


@dataclasses.dataclass(frozen=True, slots=True)
class DiskPlan:
    """An image to be made on the target.

    :ivar top: it lies on the backing files that are there already, which are `backing`.
    """

    id: str
    path: str
    format: str
    size: int
    top: bool
    backing: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, offer: DiskOffer, answer: DiskAnswer, *, top: bool) -> Self:
        backing = tuple((file.path, file.format) for file in offer.files[1:])
        return cls(offer.id, answer.path, offer.files[0].format, offer.size, top, backing)

    def create(self) -> None:
        """Make the image, empty; waits for the disk. :raises ImageInvalid, HostFailure: nothing was made."""
        if self.format == "raw":
            _create_raw(self.path, self.size)
        elif self.top:
            overlay.create(self.path, *self.backing[0], self.size)
        else:
            overlay.create_empty(self.path, self.size)


def describe(ident: str, path: str, image_format: str, size: int) -> DiskOffer:
    """A disk of this host that is in use; reads the headers of its files. :raises ImageInvalid."""
    files = [FileFacts.of(path, image_format)]
    stored = min(os.stat(files[0].path).st_blocks * 512 or files[0].size, MAX_SIZE)
    while files[-1].format == "qcow2" and len(files) <= MAX_CHAIN:
        top = files[-1].path
        fd = os.open(top, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            header = read_header(fd, top)
        finally:
            os.close(fd)
        if not header.backing:
            break
        files.append(FileFacts.of(os.path.join(os.path.dirname(top), header.backing), header.backing_format))
    return DiskOffer(ident, size, stored, tuple(files))


def survey(offer: DiskOffer, folders: Sequence[str | Path], shared: Sequence[str | Path]) -> DiskAnswer:
    """What this host can do with a disk; looks at files.

    :param folders: below which images of this host lie. :param shared: folders that are the same on all hosts.
    """
    image, backing = offer.files[0], offer.files[1:]
    found = _is_allowed(image.path, folders) and image.is_here(shared)
    try:
        path, refusal = _place(offer, folders), ""
    except MigrationRefused as exc:
        path, refusal = "", exc.message
    missing = ""
    for file in backing:
        if not _is_allowed(file.path, folders) or _size(file.path) != file.size:
            missing = f"backing file {file.path} ({file.size} bytes) is not on the target"
    top = bool(backing) and not missing
    compare = top and not all(file.is_here(shared) for file in backing)
    return DiskAnswer(offer.id, found, path, refusal, top, compare, missing)


def choose(offer: DiskOffer, answer: DiskAnswer, *, flatten: bool, copy: bool) -> Copy:
    """What a source does with a disk.

    :param flatten: copy what lies in backing files, too, into an image without any. :param copy: also a shared disk.
    :raises MigrationRefused: neither fits, and why.
    """
    if answer.shared and not copy:
        return Copy.NOTHING
    if not answer.path:
        raise MigrationRefused(answer.refusal)
    if flatten or len(offer.files) == 1:
        return Copy.WHOLE
    if not answer.top:
        raise MigrationRefused(f"disk {offer.id}: its {answer.missing}: copy it there, or let the disk be flattened")
    return Copy.TOP


def remove(path: str) -> None:
    """Remove an image that was made here and is of no use; harmless when there is none."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)


def digest(files: Sequence[tuple[str, str]]) -> str:
    """Of the contents of files, wherever they have holes; waits for disks. :raises ImageInvalid: one cannot be read."""
    total = hashlib.blake2b(digest_size=32)
    for path, image_format in files:
        total.update(image_format.encode().ljust(8) + _digest(path))
    return total.hexdigest()


def boot_id() -> str:
    """Tells this machine, since it was started, from all others; "" if it cannot be known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


# -- inside


def _is_path(path: object) -> bool:
    return isinstance(path, str) and path.startswith("/") and "\0" not in path and len(path) < MAX_PATH


def _is_below(path: str, folder: str | Path) -> bool:
    return path.startswith(os.path.realpath(folder).rstrip("/") + "/")


def _is_allowed(path: str, folders: Sequence[str | Path]) -> bool:
    real = os.path.realpath(path)
    return any(_is_below(real, folder) for folder in folders)


def _size(path: str) -> int:
    """Bytes of a file or block device, -1 if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return -1
    finally:
        os.close(fd)


def _place(offer: DiskOffer, folders: Sequence[str | Path]) -> str:
    """The same path if images may lie there, else the first of the folders."""
    wanted = offer.files[0].path
    parent = os.path.realpath(os.path.dirname(wanted))
    path = os.path.join(parent, os.path.basename(wanted))
    usable = [str(folder) for folder in folders if not os.path.realpath(folder).startswith("/dev")]
    if not _is_allowed(path, usable) or not os.path.isdir(parent):
        if not usable:
            raise MigrationRefused(f"disk {offer.id}: the target has no folder for images: set image_folders")
        try:
            os.makedirs(usable[0], mode=0o700, exist_ok=True)
        except OSError as exc:
            raise MigrationRefused(
                f"disk {offer.id}: {usable[0]} on the target cannot be made: {exc.strerror}"
            ) from exc
        path = os.path.join(os.path.realpath(usable[0]), os.path.basename(wanted))
    if os.path.lexists(path):
        raise MigrationRefused(f"disk {offer.id}: there is an image {path} on the target already: remove or rename it")
    room = os.statvfs(os.path.dirname(path))
    free, needed = room.f_bavail * room.f_frsize, min(offer.stored, offer.size)
    if needed > free:
        raise MigrationRefused(
            f"disk {offer.id} takes {needed >> 20} MiB, and {os.path.dirname(path)} on the target has "
            f"{free >> 20} MiB: make room"
        )
    return path


def _create_raw(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise ImageInvalid(f"image {path} exists already: remove it or choose another name") from None
    except OSError as exc:
        raise HostFailure(f"image {path} cannot be made ({exc.strerror}): correct the folder's rights") from exc
    try:
        os.ftruncate(fd, size)
    except OSError as exc:
        os.unlink(path)
        cure = "choose a file system for such files" if exc.errno == errno.EFBIG else "make room"
        raise HostFailure(f"image {path} of {size} bytes cannot be made ({exc.strerror}): {cure}") from exc
    finally:
        os.close(fd)


def _digest(path: str) -> bytes:
    """Kept for as long as the file is not changed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if key not in _DIGESTS:
                if len(_DIGESTS) >= _MAX_DIGESTS:
                    _DIGESTS.clear()
                found = _content(fd)
                if stat.S_ISBLK(status.st_mode):
                    return found
                _DIGESTS[key] = found
            return _DIGESTS[key]
        finally:
            os.close(fd)
    except OSError as exc:
        raise ImageInvalid(f"image {path} cannot be read: {exc.strerror}") from exc


def _content(fd: int) -> bytes:
    """Chunks of zeroes are left out, whether they are holes or not; size and places are not."""
    size = os.lseek(fd, 0, os.SEEK_END)
    total = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=32)
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // _CHUNK * _CHUNK
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                break
            if exc.errno != errno.EINVAL:  # a block device, which does not tell
                raise
        data = os.pread(fd, _CHUNK, at)
        if not data:
            break
        if data != _NOTHING[: len(data)]:
            total.update(at.to_bytes(8, "little"))
            total.update(data)
        at += len(data)
    return total.digest()
