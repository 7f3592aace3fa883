"""Ramdisks: complete ones pass, cut ones do not, whatever the format."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.errors import RamdiskInvalid
from hypervisor.toolstack.builder import check_ramdisk, load_ramdisk

Entry = Callable[..., bytes]


def archive(entry: Entry) -> bytes:
    return entry("init", b"#!/bin/sh\n" * 100) + entry("data", os.urandom(5001)) + entry("TRAILER!!!")


def lz4(data: bytes) -> bytes:
    packed = bytes(pytest.importorskip("lz4.block").compress(data, store_size=False))
    return struct.pack("<II", 0x184C2102, len(packed)) + packed


def zstd(data: bytes, **options: Any) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor(**options).compress(data))


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "cpio": bytes,
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "bzip2": bz2.compress,
    "zstd": zstd,
    "zstd with checksum": lambda data: zstd(data, write_checksum=True),
    "zstd without size": lambda data: zstd(data, write_content_size=False),
    "lz4": lz4,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_and_cut(cpio_entry: Entry, kind: str) -> None:
    data = FORMATS[kind](archive(cpio_entry))
    check_ramdisk(data, "initrd")
    check_ramdisk(data + bytes(512), "initrd")
    for cut in (len(data) // 3, len(data) // 2, len(data) - 9):
        with pytest.raises(RamdiskInvalid, match="initrd is truncated") as caught:
            check_ramdisk(data[:cut], "initrd")
        assert caught.value.code == "ramdisk.invalid"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_compressed_archive_after_a_plain_one(cpio_entry: Entry, kind: str) -> None:
    early = cpio_entry("kernel/x86/microcode", b"x" * 100) + cpio_entry("TRAILER!!!") + bytes(76)
    main = FORMATS[kind](archive(cpio_entry))
    check_ramdisk(early + main, "initrd")
    with pytest.raises(RamdiskInvalid):
        check_ramdisk(early + main[:-9], "initrd")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_several_compressed_archives(cpio_entry: Entry, kind: str) -> None:
    one = FORMATS[kind](archive(cpio_entry))
    check_ramdisk(one + one, "initrd")
    with pytest.raises(RamdiskInvalid):
        check_ramdisk(one + one[:-20], "initrd")


def test_corrupt_gzip(cpio_entry: Entry) -> None:
    data = bytearray(gzip.compress(archive(cpio_entry)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(RamdiskInvalid, match="damaged"):
        check_ramdisk(bytes(data), "initrd")


def test_cpio_with_a_bad_header(cpio_entry: Entry) -> None:
    good = cpio_entry("init", b"x" * 8)
    for bad in (b"070709" + good[6:], good[:54] + b"zzzzzzzz" + good[62:], good[:94] + b"00000000" + good[102:]):
        with pytest.raises(RamdiskInvalid, match="damaged"):
            check_ramdisk(cpio_entry("a") + bad + cpio_entry("TRAILER!!!"), "initrd")


def test_unknown_formats() -> None:
    with pytest.raises(RamdiskInvalid, match="cpio"):
        check_ramdisk(b"hello world" * 100, "initrd")
    check_ramdisk(b"hello world" * 100, "module", guest_os="mini-os")
    check_ramdisk(b"-rom1fs-" + bytes(1000), "initrd")
    check_ramdisk(bytes(1080) + b"\x53\xef" + bytes(1000), "initrd")


def test_files(tmp_path: Path, cpio_entry: Entry) -> None:
    for path, content in ((tmp_path / "empty", b""), (tmp_path / "missing", None), (tmp_path, None)):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RamdiskInvalid) as caught:
            load_ramdisk(path)
        assert str(path) in str(caught.value)
    (tmp_path / "good").write_bytes(archive(cpio_entry))
    assert load_ramdisk(tmp_path / "good") == (tmp_path / "good").read_bytes()


@settings(
    max_examples=200, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(junk=st.binary(max_size=200), kind=st.sampled_from(sorted(FORMATS)), at=st.integers(0, 300))
def test_any_bytes_are_contained(cpio_entry: Entry, junk: bytes, kind: str, at: int) -> None:
    data = FORMATS[kind](cpio_entry("init", b"x" * 50) + cpio_entry("TRAILER!!!"))
    for sample in (junk, data[: at % len(data)] + junk, data[:6] + junk):
        try:
            check_ramdisk(sample, "initrd")
        except RamdiskInvalid as exc:
            assert str(exc).startswith("ramdisk initrd")
        else:
            assert sample
