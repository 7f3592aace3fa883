from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.images.store import Image, ImageFile
from agent.local_images import LocalImages


@pytest.fixture
def store(tmp_path: Path) -> LocalImages:
    folder = tmp_path / "debian"
    folder.mkdir()
    files = []
    for name in ("kernel", "ramdisk"):
        (folder / name).write_bytes(name.encode())
        files.append(ImageFile(name, len(name), hashlib.sha256(name.encode()).hexdigest()))
    image = Image("debian", folder, files[0], files[1], "console=hvc0")
    (folder / "manifest.json").write_text(json.dumps(image.to_json()))
    return LocalImages(tmp_path)


def test_an_image_as_the_store_writes_it(store: LocalImages, tmp_path: Path) -> None:
    image = store.find("debian")
    assert (image.kernel, image.ramdisk) == (str(tmp_path / "debian/kernel"), str(tmp_path / "debian/ramdisk"))
    assert image.cmdline == "console=hvc0" and len(image.sha256) == 2
    store.verify(image.name, image.sha256)
    store.verify(image.name, image.sha256)


def test_a_changed_file_is_found_also_after_it_was_good(store: LocalImages, tmp_path: Path) -> None:
    image = store.find("debian")
    store.verify(image.name, image.sha256)
    (tmp_path / "debian" / "ramdisk").write_bytes(b"RAMDISK")
    with pytest.raises(AgentError, match="ramdisk of image 'debian' has SHA-256") as caught:
        store.verify(image.name, image.sha256)
    assert caught.value.code == "image.invalid"
    (tmp_path / "debian" / "ramdisk").unlink()
    with pytest.raises(AgentError, match="cannot be read"):
        store.verify(image.name, image.sha256)


@pytest.mark.parametrize(("name", "code"), [("nope", "image.not_found"), ("../debian", "image.invalid")])
def test_names_that_are_no_image(store: LocalImages, name: str, code: str) -> None:
    with pytest.raises(AgentError) as caught:
        store.find(name)
    assert caught.value.code == code
