"""The kernel cache: unpacks once, notices change and damage, stays within bounds, never makes a load fail."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import KernelInvalid
from hypervisor.toolstack.builder import KernelCache, cache
from hypervisor.toolstack.builder.kernel import unpack_kernel


class Counter:
    """Counts how often kernels are unpacked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(cache, "unpack_kernel", self.unpack)

    def unpack(self, data: bytes, name: str) -> bytes:
        self.count += 1
        return unpack_kernel(data, name)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.fixture
def vmlinuz(make: Any, tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make.bzimage(make.compress("gzip", make.elf())))
    return path


def names(directory: Path, suffix: str) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix == suffix)


def test_unpacks_once_across_instances(tmp_path: Path, vmlinuz: Path, unpacked: Counter) -> None:
    first = KernelCache(tmp_path / "cache").load(vmlinuz)
    again = KernelCache(tmp_path / "cache").load(vmlinuz)
    assert unpacked.count == 1
    assert bytes(again.data) == bytes(first.data) and again.segments == first.segments
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_same_content_under_another_name_is_not_unpacked_again(
    tmp_path: Path, vmlinuz: Path, unpacked: Counter
) -> None:
    kernels = KernelCache(tmp_path / "cache")
    kernels.load(vmlinuz)
    copy = tmp_path / "copy"
    copy.write_bytes(vmlinuz.read_bytes())
    assert kernels.load(copy).name == str(copy)
    assert unpacked.count == 1


def test_an_unchanged_file_is_not_read(tmp_path: Path, vmlinuz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KernelCache(tmp_path / "cache")
    kernels.load(vmlinuz)
    monkeypatch.setattr(cache, "read_file", None)
    assert kernels.load(vmlinuz).entry


def test_changed_content_under_the_same_time_is_noticed(
    tmp_path: Path, vmlinuz: Path, make: Any, unpacked: Counter
) -> None:
    kernels = KernelCache(tmp_path / "cache")
    kernels.load(vmlinuz)
    times = vmlinuz.stat()
    changed = make.elf(make.notes(guest_version="2.7"))
    data = make.bzimage(make.compress("gzip", changed))
    vmlinuz.write_bytes(data.ljust(times.st_size, b"\0")[: max(len(data), times.st_size)])
    os.utime(vmlinuz, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert kernels.load(vmlinuz).notes.guest_version == "2.7"
    assert unpacked.count == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "empty"])
def test_damage_is_noticed_and_repaired(tmp_path: Path, vmlinuz: Path, unpacked: Counter, damage: str) -> None:
    kernels = KernelCache(tmp_path / "cache")
    good = bytes(kernels.load(vmlinuz).data)
    (entry,) = names(tmp_path / "cache", ".kernel")
    data = bytearray(entry.read_bytes())
    data[4 if damage == "header" else -1] ^= 1
    entry.write_bytes({"cut": bytes(data[:-1]), "empty": b""}.get(damage, bytes(data)))
    assert bytes(kernels.load(vmlinuz).data) == good
    assert bytes(kernels.load(vmlinuz).data) == good
    assert unpacked.count == 2


def test_damaged_pointer_is_ignored(tmp_path: Path, vmlinuz: Path, unpacked: Counter) -> None:
    kernels = KernelCache(tmp_path / "cache")
    kernels.load(vmlinuz)
    (pointer,) = names(tmp_path / "cache", ".stat")
    for text in (b"../../../../etc/passwd", b"\xff" * 64, b"", b"0" * 64):
        pointer.write_bytes(text)
        assert kernels.load(vmlinuz).entry
    assert unpacked.count == 1


def test_size_bound_drops_the_longest_unused(tmp_path: Path, make: Any, unpacked: Counter) -> None:
    paths = []
    for index in range(3):
        path = tmp_path / f"k{index}"
        path.write_bytes(make.bzimage(make.compress("gzip", make.elf(make.notes(guest_version=f"{index}.0")))))
        paths.append(path)
    kernels = KernelCache(tmp_path / "cache", max_bytes=2 * len(make.elf()) + 500)
    for age, path in ((200, paths[0]), (100, paths[1])):
        kernels.load(path)
        for entry in names(tmp_path / "cache", ".kernel"):
            if entry.stat().st_mtime > 1e9:
                os.utime(entry, (1e9 - age, 1e9 - age))
    kernels.load(paths[0])  # used: now the newest
    kernels.load(paths[2])
    assert len(names(tmp_path / "cache", ".kernel")) == 2
    assert unpacked.count == 3
    kernels.load(paths[0])
    assert unpacked.count == 3
    kernels.load(paths[1])
    assert unpacked.count == 4


def test_leftovers_of_a_crash_are_removed(tmp_path: Path, vmlinuz: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / "tmp-old").write_bytes(b"x")
    os.utime(directory / "tmp-old", (1, 1))
    (directory / "tmp-new").write_bytes(b"x")
    KernelCache(directory).load(vmlinuz)
    assert not (directory / "tmp-old").exists() and (directory / "tmp-new").exists()


def test_unusable_directory_only_costs_time(
    tmp_path: Path, vmlinuz: Path, unpacked: Counter, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    kernels = KernelCache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        assert kernels.load(vmlinuz).entry == kernels.load(vmlinuz).entry
    assert unpacked.count == 2 and "going on without" in caplog.text


def test_bad_kernels_are_not_kept(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "bad"
    path.write_bytes(make.bzimage(b"\x1f\x8b" + b"x" * 100))
    kernels = KernelCache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(KernelInvalid):
            kernels.load(path)
    with pytest.raises(KernelInvalid):
        kernels.load(tmp_path / "missing")
    assert names(tmp_path / "cache", ".kernel") == names(tmp_path / "cache", ".stat") == []


def test_plain_elf_needs_no_entry(tmp_path: Path, make: Any) -> None:
    (tmp_path / "vmlinux").write_bytes(make.elf())
    assert KernelCache(tmp_path / "cache").load(tmp_path / "vmlinux").entry
    assert not (tmp_path / "cache").exists()


def test_threads_share_one_unpacking(tmp_path: Path, vmlinuz: Path, unpacked: Counter) -> None:
    kernels = [KernelCache(tmp_path / "cache") for _ in range(6)]
    gate, found = threading.Barrier(6), []

    def load(one: KernelCache) -> None:
        gate.wait(10)
        found.append(bytes(one.load(vmlinuz).data))

    threads = [threading.Thread(target=load, args=(one,)) for one in kernels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 6 and len(set(found)) == 1
    assert unpacked.count == 1
