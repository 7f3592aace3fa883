"""Copy-on-write overlays: a new qcow2 image on top of one that stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from hypervisor.devices.block.image.qcow2 import read_header
from hypervisor.errors import HostFailure, ImageInvalid

PROGRAM = "qemu-img"
TIMEOUT = 120.0


def create(path: str | Path, backing: str | Path, backing_format: str, size: int = 0) -> None:
    """Make `path`, on top of `backing`, whole or not at all.

    :param backing_format: ``raw`` or ``qcow2``. :param size: of the new disk, bytes; 0: that of the backing file.
    :raises ImageInvalid: the files are not what was said, or `path` exists. :raises HostFailure: no qemu-img.
    """
    if backing_format not in ("raw", "qcow2"):
        raise ImageInvalid(f"backing format {backing_format!r} is not known: give raw or qcow2")
    path, backing = Path(path), Path(os.path.realpath(backing))
    if not backing.is_file():
        raise ImageInvalid(f"backing file {backing} is not there: make it first")
    # -u: the backing file is not opened, so that nothing is guessed of it; then the size must be given.
    options = ["-u", "-o", f"backing_fmt={backing_format}", "-b", str(backing)]
    _make(path, options, size or disk_size(backing, backing_format))


def create_empty(path: str | Path, size: int) -> None:
    """Make `path`, a disk of `size` bytes that reads as zeroes, whole or not at all.

    :raises ImageInvalid: `path` exists, or it is no size. :raises HostFailure: no qemu-img.
    """
    _make(Path(path), [], size)


def _make(path: Path, options: list[str], size: int) -> None:
    if path.exists():
        raise ImageInvalid(f"image {path} exists already: remove it or choose another name")
    program = shutil.which(PROGRAM)
    if program is None:
        raise HostFailure(f"{PROGRAM} is not installed: apt-get install qemu-utils")
    work = path.with_name(f".{path.name}.new")
    command = [program, "create", "-q", "-f", "qcow2", *options, str(work), str(size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env={"LC_ALL": "C"}
        )
        if done.returncode:
            raise ImageInvalid(f"image {path} cannot be made: {' '.join(done.stderr.split())[:300]}")
        os.link(work, path)
    except FileExistsError:
        raise ImageInvalid(f"image {path} exists already: remove it or choose another name") from None
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ImageInvalid(f"image {path} cannot be made: {exc}") from exc
    finally:
        work.unlink(missing_ok=True)


def disk_size(path: Path, image_format: str) -> int:
    """Size of the disk that an image holds, bytes. :raises ImageInvalid."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_header(fd, str(path)).size if image_format == "qcow2" else os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
