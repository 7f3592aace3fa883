"""Making images: from a small Debian of our own, from files, and what must not be left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.images import (
    DEFAULT_CMDLINE,
    ImageBuildFailed,
    ImageError,
    ImageNotFound,
    build_image,
    list_images,
    load_image,
    verify_image,
)
from agent.images.debian import Apt


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def apt(tmp_path: Path, fake_apt: Any) -> Apt:
    return Apt(tmp_path / "cache", run=fake_apt.run)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    kernel, ramdisk = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"a kernel")
    ramdisk.write_bytes(b"a ramdisk")
    return kernel, ramdisk


def left_over(images: Path) -> list[str]:
    return sorted(path.name for path in images.iterdir() if path.name != ".cache") if images.exists() else []


def test_from_packages(images: Path, apt: Apt) -> None:
    told: list[str] = []
    image = build_image(images, name="debian", apt=apt, progress=told.append)
    assert Path(image.kernel).read_bytes() == b"KERNEL" * 100
    assert image.ramdisk is not None and b"BUSYBOX" in Path(image.ramdisk).read_bytes()
    assert image.cmdline == DEFAULT_CMDLINE
    assert dict(image.packages) == {"linux-image-6.1.0-1-amd64": "6.1-1", "busybox-static": "1:1.35-4"}
    assert verify_image(images / "debian") == load_image(images / "debian") == image
    assert list_images(images) == [image]
    assert told and told[-1] == "writing image debian"


def test_downloads_are_kept_and_checked(images: Path, apt: Apt, fake_apt: Any, tmp_path: Path) -> None:
    build_image(images, name="one", apt=apt)
    assert fake_apt.count("download") == 2
    build_image(images, name="two", apt=Apt(tmp_path / "cache", run=fake_apt.run))
    assert fake_apt.count("download") == 2
    for path in (tmp_path / "cache").glob("busybox*.deb"):
        path.write_bytes(b"broken")
    build_image(images, name="three", apt=Apt(tmp_path / "cache", run=fake_apt.run))
    assert fake_apt.count("download") == 3
    assert verify_image(images / "three").packages == verify_image(images / "one").packages


@pytest.mark.parametrize("trouble", ["empty", "stale"])
def test_private_lists_when_the_machines_own_do_not_help(images: Path, apt: Apt, fake_apt: Any, trouble: str) -> None:
    setattr(fake_apt, trouble, True)
    assert build_image(images, name="debian", apt=apt).size > 0
    assert fake_apt.count("update") == 1
    after = fake_apt.commands[next(i for i, c in enumerate(fake_apt.commands) if "update" in c) :]
    assert all(any(word.startswith("Dir::State::lists=") for word in command) for command in after)


@pytest.mark.parametrize("trouble", ["offline", "corrupt"])
def test_a_failed_build_leaves_nothing(images: Path, apt: Apt, fake_apt: Any, tmp_path: Path, trouble: str) -> None:
    setattr(fake_apt, trouble, True)
    with pytest.raises(ImageBuildFailed) as caught:
        build_image(images, name="debian", apt=apt)
    assert caught.value.code == "image.build_failed" and "\n" not in caught.value.message
    assert left_over(images) == []
    assert not list((tmp_path / "cache").glob("*.deb")) and not list((tmp_path / "cache").glob(".download*"))


def test_unknown_and_strange_packages(images: Path, apt: Apt) -> None:
    with pytest.raises(ImageBuildFailed, match="knows no package linux-image-none"):
        build_image(images, name="x", apt=apt, kernel_package="linux-image-none")
    with pytest.raises(ImageBuildFailed, match="no Debian package name"):
        build_image(images, name="x", apt=apt, kernel_package="--option")
    with pytest.raises(ImageBuildFailed, match="does not hold"):
        build_image(images, name="x", apt=apt, kernel_package="busybox-static")


def test_from_files(images: Path, files: tuple[Path, Path], fake_apt: Any, apt: Apt) -> None:
    kernel, ramdisk = files
    image = build_image(images, name="own", kernel=kernel, ramdisk=ramdisk, cmdline="console=hvc0 quiet", apt=apt)
    assert Path(image.kernel).read_bytes() == b"a kernel"
    assert image.ramdisk is not None and Path(image.ramdisk).read_bytes() == b"a ramdisk"
    assert (image.cmdline, image.packages, image.size) == ("console=hvc0 quiet", (), 17)
    assert fake_apt.commands == []


def test_own_kernel_with_our_ramdisk_and_added_files(images: Path, files: tuple[Path, Path], apt: Apt) -> None:
    kernel, extra = files
    image = build_image(images, name="own", kernel=kernel, add=[f"{extra}:/etc/extra", (extra, "bin/two")], apt=apt)
    assert image.ramdisk is not None
    data = Path(image.ramdisk).read_bytes()
    assert b"etc/extra\0" in data and b"bin/two\0" in data and data.count(b"a ramdisk") == 2
    assert [name for name, _ in image.packages] == ["busybox-static"]


def test_unusable_input(images: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    kernel, ramdisk = files
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    wrong: list[dict[str, Any]] = [
        {"name": "../escape", "kernel": kernel, "ramdisk": ramdisk},
        {"name": ".cache", "kernel": kernel, "ramdisk": ramdisk},
        {"name": "x", "kernel": tmp_path / "missing", "ramdisk": ramdisk},
        {"name": "x", "kernel": tmp_path / "empty", "ramdisk": ramdisk},
        {"name": "x", "kernel": tmp_path / "fifo", "ramdisk": ramdisk},
        {"name": "x", "kernel": tmp_path, "ramdisk": ramdisk},
        {"name": "x", "kernel": kernel, "ramdisk": ramdisk, "cmdline": "a\nb"},
        {"name": "x", "kernel": kernel, "ramdisk": ramdisk, "cmdline": "a" * 1024},
        {"name": "x", "kernel": kernel, "ramdisk": ramdisk, "add": ["a:b"]},
        {"name": "x", "kernel": kernel, "add": ["no-colon"]},
    ]
    for options in wrong:
        with pytest.raises(ImageError) as caught:
            build_image(images, **options)
        assert caught.value.code == "image.invalid"
    assert left_over(images) == []


def test_an_image_is_replaced_only_when_asked(images: Path, files: tuple[Path, Path]) -> None:
    kernel, ramdisk = files
    build_image(images, name="own", kernel=kernel, ramdisk=ramdisk)
    kernel.write_bytes(b"another kernel")
    with pytest.raises(ImageError, match="exists already"):
        build_image(images, name="own", kernel=kernel, ramdisk=ramdisk)
    assert Path(load_image(images / "own").kernel).read_bytes() == b"a kernel"
    build_image(images, name="own", kernel=kernel, ramdisk=ramdisk, replace=True)
    assert Path(verify_image(images / "own").kernel).read_bytes() == b"another kernel"
    assert left_over(images) == ["own"]


def test_unwritable_store(tmp_path: Path, files: tuple[Path, Path]) -> None:
    kernel, ramdisk = files
    with pytest.raises(ImageBuildFailed):
        build_image(kernel / "images", name="x", kernel=kernel, ramdisk=ramdisk)


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        (lambda folder: (folder / "vmlinuz").write_bytes(b"A kernel"), True),
        (lambda folder: (folder / "vmlinuz").write_bytes(b"longer than before"), False),
        (lambda folder: (folder / "initrd.img").unlink(), False),
        (lambda folder: (folder / "manifest.json").write_text("{"), False),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100000), False),
        (lambda folder: (folder / "manifest.json").write_text("[]"), False),
        (lambda folder: (folder / "manifest.json").write_bytes(b" " * (2 << 20)), False),
        (lambda folder: edit(folder, kernel="../../etc/passwd"), False),
        (lambda folder: edit(folder, kernel="manifest.json"), False),
        (lambda folder: edit(folder, format=2), False),
        (lambda folder: edit(folder, cmdline=None), False),
        (lambda folder: edit(folder, size={"vmlinuz": True, "initrd.img": 9}), False),
        (lambda folder: edit(folder, sha256={"vmlinuz": "00"}), False),
        (lambda folder: edit(folder, packages=[1]), False),
    ],
)
def test_damage_is_noticed(images: Path, files: tuple[Path, Path], change: Any, loads: bool) -> None:
    kernel, ramdisk = files
    build_image(images, name="own", kernel=kernel, ramdisk=ramdisk)
    change(images / "own")
    assert len(list_images(images)) == loads
    for read in (verify_image,) if loads else (verify_image, load_image):
        with pytest.raises(ImageError) as caught:
            read(images / "own")
        assert caught.value.code == "image.invalid" and "own" in caught.value.message


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_no_image(images: Path) -> None:
    for path in (images, images / "none", Path(__file__)):
        with pytest.raises(ImageNotFound) as caught:
            load_image(path)
        assert caught.value.code == "image.not_found"
    assert list_images(images) == []


def test_manifest_says_what_is_in_the_image(images: Path, files: tuple[Path, Path]) -> None:
    kernel, ramdisk = files
    image = build_image(images, name="own", kernel=kernel, ramdisk=ramdisk)
    manifest = json.loads((images / "own" / "manifest.json").read_text())
    assert manifest == image.to_json()
    assert manifest["name"] == "own" and manifest["kernel"] == "vmlinuz" and manifest["ramdisk"] == "initrd.img"
    assert len(manifest["sha256"]["vmlinuz"]) == 64 and manifest["size"] == {"vmlinuz": 8, "initrd.img": 9}
    assert type(image).from_json(manifest, images / "own") == image
