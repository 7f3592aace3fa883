"""What is in a config drive, as a guest would see it."""

from __future__ import annotations

import io
from pathlib import Path

import pycdlib


def read_iso(path: Path) -> tuple[str, dict[str, bytes]]:
    """Label and files of an image, by their Rock Ridge names."""
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    files = {}
    for folder, _, names in iso.walk(rr_path="/"):
        for name in names:
            full = f"{folder.rstrip('/')}/{name}"
            output = io.BytesIO()
            iso.get_file_from_iso_fp(output, rr_path=full)
            files[full.lstrip("/")] = output.getvalue()
    label = iso.pvd.volume_identifier.decode().strip()
    iso.close()
    return label, files
