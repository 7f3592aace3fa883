"""The image store as plugins see it (`agent.api.Images`): images found by name, files checked before use."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from agent.api import BootImage
from agent.errors import InstructionError
from agent.images.store import check_name, load_image


class LocalImages:
    """:param folder: one folder per image, as `agent.images.store` keeps them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[tuple[int, int, int], str]] = {}

    def find(self, name: str) -> BootImage:
        """See `agent.api.Images.find`."""
        image = load_image(self._folder / check_name(name))
        sums = {str(image.directory / file.name): file.sha256 for file in image.files()}
        return BootImage(image.name, image.kernel, image.ramdisk, image.cmdline, sums)

    def verify(self, image: str, files: Mapping[str, str]) -> None:
        """See `agent.api.Images.verify`. A hash is remembered while the file's inode, size and time stay the same."""
        for path, expected in sorted(files.items()):
            found = self._sha256(path)
            if found != expected:
                raise InstructionError(
                    "image.invalid",
                    f"file {path} of image {image!r} has SHA-256 {found}, its manifest says {expected}: "
                    "build the image again",
                )

    def _sha256(self, path: str) -> str:
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                key = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                with self._lock:
                    known = self._known.get(path)
                if known is not None and known[0] == key:
                    return known[1]
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise InstructionError("image.invalid", f"file {path} cannot be read: {exc.strerror}") from exc
        with self._lock:
            self._known[path] = (key, digest)
        return digest
