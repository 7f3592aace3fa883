"""What domains have of fetched images: disks, kernels and ramdisks, files in one folder, each of one domain.

::

    <disk_dir>/<domain>.xvda.qcow2    an overlay on a cached image, or a copy (.raw, .qcow2)
    <disk_dir>/<domain>.kernel        the cached file under another name, or a copy; likewise .ramdisk
    <disk_dir>/<domain>.xvda.json     which instruction made it, and of what

A disk is a guest's data: nothing removes it but the undo of the instruction that made it, and the domain's destroy
if that was asked for. What a file is the overlay of, its own header says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from agent.durable import private, sync
from agent.errors import ConfigError, InstructionError

PROGRAM = "qemu-img"
_SECONDS = 3600.0
_FICLONE = 0x40049409
"""linux/fs.h"""
_HEADER = struct.Struct(">4sIQI")
_COPY = 16 << 20
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """What lies beside a file. :ivar file: its name. :ivar image: key of what it was made of."""

    instruction: str
    file: str
    image: str
    delete_on_destroy: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What is made of an image. :ivar what: ``kernel``, ``ramdisk`` or a disk's id.

    :ivar mode: ``link``, ``overlay`` or ``copy``. :ivar size: of a disk, bytes; 0: the image's.
    :ivar base_format: of the image below an overlay, ``raw`` or ``qcow2``; "": as its name ends.
    """

    domain: str
    what: str
    path: str
    mode: str
    format: str
    size: int = 0
    delete_on_destroy: bool = False
    base_format: str = ""


class Disks:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder. :raises ConfigError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"the folder of guests' disks {self.folder} cannot be made ({exc.strerror}): set [images] disk_dir"
            ) from exc

    def path(self, domain: str, what: str, image_format: str = "") -> Path:
        """:param image_format: of a disk; a kernel or ramdisk has none."""
        return self.folder / f"{domain}.{what}{'.' if image_format else ''}{image_format}"

    def check_free(self, place: Place, instruction: str) -> None:
        """:raises InstructionError: ``image.in_use``: another instruction's file is there."""
        if os.path.lexists(place.path) and not self.made_by(place, instruction):
            raise InstructionError(
                "image.in_use",
                f"{place.path} is there from before: attach it by its path, or remove it if nobody needs it",
            )

    def made_by(self, place: Place, instruction: str) -> bool:
        """Whether the whole file is there and that instruction made it."""
        note = self._note(place.domain, place.what)
        return note is not None and note.instruction == instruction and os.path.lexists(place.path)

    def make(self, place: Place, image: Path, instruction: str) -> None:
        """Make a file of a cached image, whole or not at all; no effect when this instruction has made it.

        :raises InstructionError: ``image.in_use``, ``image.invalid``, ``image.no_room``, ``host.failure``.
        """
        self.check_free(place, instruction)
        if self.made_by(place, instruction):
            return
        path = Path(place.path)
        work = path.with_name(f".{path.name}.new")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            work.unlink(missing_ok=True)
            _fill(work, image, place)
            # In this order: a file without its note would be nobody's.
            self._write_note(place, Note(instruction, path.name, image.name, place.delete_on_destroy))
            os.link(work, path)
            sync(self.folder)
        except FileExistsError:
            self._note_path(place.domain, place.what).unlink(missing_ok=True)  # what is there is not ours
            raise InstructionError("image.in_use", f"{path} has just been made by somebody else: remove it") from None
        except OSError as exc:
            code = "image.no_room" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "host.failure"
            raise InstructionError(
                code, f"{path} cannot be made: {exc.strerror or exc}: see [images] disk_dir"
            ) from exc
        finally:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)

    def unmake(self, place: Place, instruction: str) -> None:
        """Remove what that instruction made, if it made it. :raises InstructionError: it stays."""
        note = self._note(place.domain, place.what)
        if note is not None and note.instruction == instruction:
            self._remove(place.domain, place.what, note)

    def has(self, domain: str) -> bool:
        """Whether anything would go with a domain that is destroyed."""
        return any(True for _ in self._going(domain))

    def goes(self, domain: str, path: str) -> bool:
        """Whether a disk of the domain would go with it."""
        return any(note.file == self._name(path) for _, note in self._going(domain))

    def forget(self, domain: str, needed: Collection[str] = ()) -> None:
        """Remove the kernel and ramdisk of a domain that is destroyed, and the disks that are to go with it.

        :param needed: images that others need still; they stay, and so do those on which any that stays lies.
        :raises InstructionError: something stays that should go.
        """
        going = {note.file: (what, note) for what, note in self._going(domain)}
        for path in needed:
            going.pop(self._name(path), None)
        while going and (below := self._below(going) & set(going)):
            for name in below:
                del going[name]
        for what, note in going.values():
            self._remove(domain, what, note)

    def _below(self, going: Collection[str]) -> set[str]:
        """Names of the files here on which overlays lie that stay. :raises InstructionError: nobody can tell."""
        found = set()
        for path in self.folder.glob("*.qcow2"):
            if path.name in going:
                continue
            try:
                backing = _backing(path)
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise _untold(path, exc) from exc
            found.add(self._name(backing))
        return found

    def _name(self, path: str) -> str:
        """Of a file in the folder; "" for others."""
        folder, name = os.path.split(path)
        return name if folder and os.path.realpath(folder) == os.path.realpath(self.folder) else ""

    def bases(self) -> set[str]:
        """Keys of the cached images that disks lie on. :raises InstructionError: nobody can tell."""
        found: set[str] = set()
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return found
        except OSError as exc:
            raise _untold(self.folder, exc) from exc
        for name in names:
            if name.endswith((".qcow2", ".qcow2.new")):
                try:
                    found.add(os.path.basename(_backing(self.folder / name)))
                except FileNotFoundError:
                    continue
                except OSError as exc:
                    raise _untold(self.folder / name, exc) from exc
        return found - {""}

    def _going(self, domain: str) -> Iterator[tuple[str, Note]]:
        if not _UUID.fullmatch(domain):
            return
        for path in self.folder.glob(f"{domain}.*.json"):
            what = path.name[len(domain) + 1 : -len(".json")]
            note = self._note(domain, what)
            if note is not None and (note.delete_on_destroy or what in ("kernel", "ramdisk")):
                yield what, note

    def _remove(self, domain: str, what: str, note: Note) -> None:
        try:
            (self.folder / os.path.basename(note.file)).unlink(missing_ok=True)
            self._note_path(domain, what).unlink(missing_ok=True)
        except OSError as exc:
            text = f"{self.folder / note.file} cannot be removed: {exc.strerror}; remove it"
            raise InstructionError("host.failure", text) from exc

    def _note_path(self, domain: str, what: str) -> Path:
        return self.folder / f"{domain}.{what}.json"

    def _note(self, domain: str, what: str) -> Note | None:
        try:
            with open(self._note_path(domain, what), "rb") as file:
                data: Any = json.loads(file.read(65536))
            note = Note(**data)
        except (OSError, ValueError, TypeError):
            return None
        # Only what belongs to that domain is ever removed by it.
        return note if isinstance(note.file, str) and note.file.startswith(f"{domain}.{what}") else None

    def _write_note(self, place: Place, note: Note) -> None:
        path = self._note_path(place.domain, place.what)
        work = path.with_suffix(".new")
        with open(work, "w", encoding="utf-8", opener=private) as file:
            json.dump(dataclasses.asdict(note), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)


def _fill(work: Path, image: Path, place: Place) -> None:
    if place.mode == "link":
        try:
            os.link(image, work)
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
                raise
            _copy(image, work)
    elif place.mode == "overlay":
        # -u: the image is not opened, so that nothing is guessed of it; then the size must be given.
        base = str(image.resolve())
        options = ["-u", "-o", f"backing_fmt={place.base_format or image.suffix[1:]}", "-b", base]
        _qemu_img("create", "-q", "-f", "qcow2", *options, str(work), str(place.size))
        os.chmod(work, 0o600)
        sync(work)
    else:
        _copy(image, work)
        if place.format == "raw" and place.size:
            os.truncate(work, max(place.size, work.stat().st_size))
        elif place.size:
            _qemu_img("resize", "-q", "-f", "qcow2", str(work), str(place.size))
        sync(work)


def _copy(image: Path, work: Path) -> None:
    """By sharing the blocks where the file system can, else with its holes."""
    with open(image, "rb") as source, open(work, "xb", opener=private) as target:
        size = os.fstat(source.fileno()).st_size
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        except OSError:
            os.truncate(target.fileno(), size)
            at = 0
            while at < size:
                try:
                    at = os.lseek(source.fileno(), at, os.SEEK_DATA)
                except OSError as exc:
                    if exc.errno == errno.ENXIO:
                        break  # nothing but a hole is left
                    raise
                end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
                while at < end:
                    data = os.pread(source.fileno(), min(_COPY, end - at), at)
                    if not data:
                        raise OSError(errno.EIO, "the image was cut off") from None
                    at += os.pwrite(target.fileno(), data, at)
        os.fsync(target.fileno())


def _qemu_img(*arguments: str) -> None:
    program = shutil.which(PROGRAM)
    if program is None:
        raise InstructionError("host.failure", f"{PROGRAM} is not installed: apt-get install qemu-utils")
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False, env={"LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired as exc:
        raise InstructionError("host.failure", f"{PROGRAM} {arguments[0]} does not end: see the disk") from exc
    if done.returncode:
        text = f"{PROGRAM} {arguments[0]} failed: {' '.join(done.stderr.split())[:300]}"
        raise InstructionError("image.no_room" if "No space" in done.stderr else "host.failure", text)


def _backing(path: Path) -> str:
    """Name of the backing file in a qcow2 image's header, "" for none or for what is no whole image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or head[:4] != b"QFI\xfb":
            return ""
        _, _, at, length = _HEADER.unpack(head)
        return os.fsdecode(os.pread(fd, min(length, 1023), at)) if at else ""
    finally:
        os.close(fd)


def _untold(path: Path, exc: OSError) -> InstructionError:
    text = f"{path} cannot be read ({exc.strerror}), so nobody can tell which images are in use: correct its rights"
    return InstructionError("image.in_use", text)
