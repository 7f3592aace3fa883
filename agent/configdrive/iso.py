"""An ISO 9660 image with Joliet and Rock Ridge names, written atomically."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import pycdlib

from agent.errors import InstructionError

MAX_BYTES = 8 << 20
"""More than any config drive needs; a bound for what one message can put on the disk."""


_APPLICATION = 16 * 2048 + 574, 128
"""Where the first volume descriptor has its application identifier (ECMA-119, 8.4.21), and how long it is."""


def write_iso(path: Path, label: str, files: Mapping[str, bytes], maker: str = "") -> None:
    """Write `files` (path in the image → content) to `path`, mode 0600 since user data holds secrets.

    :param maker: what `maker_of` will say; at most 128 letters, digits, blanks and the like.
    :raises InstructionError: it would be larger than `MAX_BYTES`, or the disk does not take it.
    """
    if sum(map(len, files.values())) > MAX_BYTES:
        raise InstructionError("instruction.bad_args", f"config drive: more than {MAX_BYTES} bytes")
    image = _image(label, files, maker)
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InstructionError(
            "host.failure", f"config drive {path} cannot be written: {exc.strerror}; free space or correct its rights"
        ) from exc


def maker_of(path: Path) -> str | None:
    """What `write_iso` was told; None when no whole image is there. :raises OSError: it cannot be read."""
    offset, size = _APPLICATION
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size).decode("latin-1").rstrip(" \0")
    except FileNotFoundError:
        return None


def _image(label: str, files: Mapping[str, bytes], maker: str) -> bytes:
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=label, sys_ident="LINUX", app_ident_str=maker)
    try:
        made: dict[str, str] = {"": ""}
        for number, (path, content) in enumerate(sorted(files.items())):
            folder = ""
            *parents, name = path.split("/")
            for part in parents:
                inside = f"{folder}/{part}".lstrip("/")
                if inside not in made:
                    made[inside] = f"{made[folder]}/D{len(made)}"
                    iso.add_directory(made[inside], rr_name=part, joliet_path=f"/{inside}")
                folder = inside
            # Plain ISO names are eight capitals; cloud-init reads the Rock Ridge or Joliet ones.
            iso.add_fp(
                io.BytesIO(content),
                len(content),
                f"{made[folder]}/F{number}.;1",
                rr_name=name,
                joliet_path=f"/{path}",
            )
        output = io.BytesIO()
        iso.write_fp(output)
        return output.getvalue()
    finally:
        iso.close()
