"""Guest images on disk: a folder each, with a manifest that says what is in it.

::

    <images>/<name>/manifest.json    kernel    ramdisk

Folders appear and change by rename, so a reader sees a whole image or none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from agent.images.errors import ImageError, ImageNotFound

LOG = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
MAX_NAME = 63
_MAX_MANIFEST = 1 << 20
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of an image: its name in the folder, bytes, and SHA256 in hex."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A guest image.

    :ivar directory: where it is.
    :ivar ramdisk_file: None when the kernel needs none.
    :ivar packages: (package, version) of what it was made from, in the order used.
    :ivar created: seconds since the epoch.
    """

    name: str
    directory: Path
    kernel_file: ImageFile
    ramdisk_file: ImageFile | None
    cmdline: str
    packages: tuple[tuple[str, str], ...] = ()
    created: float = 0.0

    @property
    def kernel(self) -> str:
        """Path of the kernel."""
        return str(self.directory / self.kernel_file.name)

    @property
    def ramdisk(self) -> str | None:
        """Path of the ramdisk, or None."""
        return str(self.directory / self.ramdisk_file.name) if self.ramdisk_file else None

    @property
    def size(self) -> int:
        """Bytes of kernel and ramdisk."""
        return self.kernel_file.size + (self.ramdisk_file.size if self.ramdisk_file else 0)

    def files(self) -> tuple[ImageFile, ...]:
        return (self.kernel_file, self.ramdisk_file) if self.ramdisk_file else (self.kernel_file,)

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "format": FORMAT,
            "name": self.name,
            "kernel": self.kernel_file.name,
            "ramdisk": self.ramdisk_file.name if self.ramdisk_file else None,
            "cmdline": self.cmdline,
            "sha256": {file.name: file.sha256 for file in self.files()},
            "size": {file.name: file.size for file in self.files()},
            "packages": dict(self.packages),
            "created": self.created,
        }

    @classmethod
    def from_json(cls, data: object, directory: Path) -> Image:
        """:raises ImageError: not a manifest of this format."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ImageError(f"{directory / MANIFEST} is not of format {FORMAT}: build the image again")
        try:
            return cls(
                name=_text(data["name"]),
                directory=directory,
                kernel_file=_file(data, "kernel"),
                ramdisk_file=_file(data, "ramdisk") if data.get("ramdisk") is not None else None,
                cmdline=_text(data["cmdline"]),
                packages=tuple((_text(key), _text(value)) for key, value in data.get("packages", {}).items()),
                created=float(data.get("created", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ImageError(f"{directory / MANIFEST} is damaged ({exc}): build the image again") from exc


def check_name(name: str) -> str:
    """:raises ImageError: not usable as an image's name."""
    if not _NAME.fullmatch(name):
        raise ImageError(
            f"image name {name!r} is not usable: give 1 to {MAX_NAME} letters, digits, '.', '_' or '-', "
            "a letter or digit first"
        )
    return name


def load_image(directory: str | os.PathLike[str]) -> Image:
    """Read an image's manifest; its files are looked at, not read (see `verify_image`).

    :raises ImageNotFound: no image there.
    :raises ImageError: the manifest is damaged, or a file is missing or has another size.
    """
    folder = Path(directory)
    try:
        with (folder / MANIFEST).open("rb") as file:
            text = file.read(_MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ImageNotFound(f"no image at {folder}: make one with `reeve image build`") from exc
    except OSError as exc:
        raise ImageError(f"{folder / MANIFEST} cannot be read ({exc.strerror}): check its permissions") from exc
    if len(text) > _MAX_MANIFEST:
        raise ImageError(f"{folder / MANIFEST} is larger than a manifest may be: build the image again")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ImageError(f"{folder / MANIFEST} is damaged: build the image again") from exc
    image = Image.from_json(data, folder)
    for part in image.files():
        try:
            size = (folder / part.name).stat().st_size
        except OSError as exc:
            raise ImageError(f"{folder / part.name} is missing: build the image again") from exc
        if size != part.size:
            raise ImageError(f"{folder / part.name} has {size} bytes, not {part.size}: build the image again")
    return image


def verify_image(directory: str | os.PathLike[str]) -> Image:
    """Read an image whole and compare every checksum.

    :raises ImageNotFound, ImageError: as `load_image`, or a file's content differs.
    """
    image = load_image(directory)
    for part in image.files():
        path = image.directory / part.name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise ImageError(f"{path} cannot be read ({exc.strerror}): check its permissions") from exc
        if digest != part.sha256:
            raise ImageError(f"{path} has changed since the image was built: build the image again")
    return image


def list_images(images_dir: str | os.PathLike[str]) -> list[Image]:
    """The usable images in a folder, by name; others are logged and left out."""
    images = []
    try:
        folders = sorted(path for path in Path(images_dir).iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    except OSError:
        return []
    for folder in folders:
        try:
            images.append(load_image(folder))
        except ImageNotFound:
            continue
        except ImageError as exc:
            LOG.warning("image left out: %s", exc)
    return images


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _file(data: dict[str, Any], role: str) -> ImageFile:
    name = _text(data[role])
    size, digest = data["size"][name], _text(data["sha256"][name])
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a file of the image")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"size or sha256 of the {role} is unusable")
    return ImageFile(name, size, digest)
