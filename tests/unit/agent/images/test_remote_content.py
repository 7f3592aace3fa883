"""What fetched files hold: declared formats are compared with the content, hostile features are found."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import sys
from pathlib import Path
from typing import Any

import lz4.block
import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch_rig import qcow2

from agent.errors import InstructionError
from agent.images.remote.content import inspect

MIB = 1 << 20


def look(tmp_path: Path, data: bytes, image_format: str) -> int:
    path = tmp_path / "file"
    path.write_bytes(data)
    return inspect(path, image_format, max_disk=64 * MIB, max_unpacked=4 * MIB, name="it")


def bzimage(payload: bytes, version: int = 0x20F) -> bytes:
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    return bytes(head) + payload


def lz4_legacy(data: bytes) -> bytes:
    blocks = [lz4.block.compress(data[at : at + 8 * MIB], store_size=False) for at in range(0, len(data), 8 * MIB)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(item)) + item for item in blocks) + bytes(4)


PACKERS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "lz4": lz4_legacy,
}
KERNEL = b"\x7fELF" + bytes(MIB)


def test_good_ones(tmp_path: Path) -> None:
    assert look(tmp_path, bytes(MIB), "raw") == MIB
    assert look(tmp_path, qcow2(8 * MIB), "qcow2") == 8 * MIB
    assert look(tmp_path, qcow2(8 * MIB, version=2, extensions=b""), "qcow2") == 8 * MIB
    assert look(tmp_path, qcow2(8 * MIB, incompatible=1), "qcow2") == 8 * MIB, "dirty: QEMU repairs it"
    names = struct.pack(">II", 0x6803F857, 48) + bytes(48)
    assert look(tmp_path, qcow2(8 * MIB, extensions=names), "qcow2") == 8 * MIB
    assert look(tmp_path, KERNEL, "kernel") == len(KERNEL)
    assert look(tmp_path, gzip.compress(KERNEL), "kernel")
    for data in (b"070701" + bytes(200), gzip.compress(b"070701")):
        assert look(tmp_path, data, "ramdisk") == len(data)


@pytest.mark.parametrize("packer", PACKERS)
def test_kernels_are_unpacked_within_bounds(tmp_path: Path, packer: str) -> None:
    pack: Any = PACKERS[packer]
    assert look(tmp_path, bzimage(pack(KERNEL)), "kernel")
    with pytest.raises(InstructionError) as caught:
        look(tmp_path, bzimage(pack(bytes(32 * MIB))), "kernel")
    assert caught.value.code == "image.too_large" and "unpacks to more than 4 MiB" in caught.value.message
    if packer in ("gzip", "xz", "bzip2"):
        with pytest.raises(InstructionError, match="cannot be unpacked"):
            look(tmp_path, bzimage(pack(KERNEL)[:-20]), "kernel")


BAD: dict[str, tuple[bytes, str, str, str]] = {
    "qcow2 as raw": (qcow2(), "raw", "image.invalid", "called raw and is qcow2"),
    "vmdk as raw": (b"KDMV" + bytes(508), "raw", "image.invalid", "VMDK"),
    "vdi as raw": (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(444), "raw", "image.invalid", "VDI"),
    "vhd as raw": (bytes(512) + b"conectix" + bytes(504), "raw", "image.invalid", "VHD"),
    "packed as raw": (gzip.compress(bytes(1024)).ljust(512, b"\0"), "raw", "image.invalid", "gzip"),
    "no sectors": (bytes(100), "raw", "image.invalid", "100 bytes"),
    "large raw": (bytes(65 * MIB), "raw", "image.too_large", "65 MiB"),
    "raw as qcow2": (bytes(MIB), "qcow2", "image.invalid", "no qcow2"),
    "short qcow2": (qcow2()[:80], "qcow2", "image.invalid", "no qcow2"),
    "version": (qcow2(version=4), "qcow2", "image.invalid", "version 4"),
    "backing": (qcow2(backing=b"/etc/shadow"), "qcow2", "image.invalid", "backing file"),
    "json backing": (qcow2(backing=b'json:{"driver":"nbd"}'), "qcow2", "image.invalid", "backing file"),
    "external data": (qcow2(incompatible=4), "qcow2", "image.invalid", "another file"),
    "data file's name": (
        qcow2(extensions=struct.pack(">II", 0x44415441, 8) + b"/etc/x\0\0" + bytes(8)),
        "qcow2",
        "image.invalid",
        "names a file",
    ),
    "encrypted": (qcow2(crypt=2), "qcow2", "image.invalid", "encrypted"),
    "luks": (qcow2(extensions=struct.pack(">II", 0x0537BE77, 0) + bytes(8)), "qcow2", "image.invalid", "encrypted"),
    "corrupt": (qcow2(incompatible=2), "qcow2", "image.invalid", "corrupt"),
    "unknown feature": (qcow2(incompatible=1 << 7), "qcow2", "image.invalid", "0x80"),
    "large disk": (qcow2(1 << 40), "qcow2", "image.too_large", "1048576 MiB"),
    "empty disk": (qcow2(0), "qcow2", "image.invalid", "0 bytes"),
    "half a sector": (qcow2(MIB + 100), "qcow2", "image.invalid", "whole sectors"),
    "clusters": (
        qcow2(bits=16)[:20] + struct.pack(">I", 40) + qcow2()[24:],
        "qcow2",
        "image.invalid",
        "damaged header",
    ),
    "extension": (qcow2(extensions=struct.pack(">II", 1, 1 << 31)), "qcow2", "image.invalid", "damaged header"),
    "tables": (qcow2(l1_entries=1 << 23)[: 1 << 20], "qcow2", "image.invalid", "tables"),
    "cut short": (qcow2()[: 3 << 16], "qcow2", "image.invalid", "tables"),
    "no kernel": (bytes(4096), "kernel", "image.invalid", "no kernel"),
    "short kernel": (b"MZ", "kernel", "image.invalid", "no kernel"),
    "old kernel": (bzimage(b"x" * 100, 0x200), "kernel", "image.invalid", "too old"),
    "beyond its end": (bzimage(b"x" * 100)[:-50], "kernel", "image.invalid", "cut short"),
    "odd payload": (bzimage(b"x" * 100), "kernel", "image.invalid", "compression is not known"),
    "damaged gzip": (b"\x1f\x8b" + bytes(4000), "kernel", "image.invalid", "cannot be unpacked"),
    "no ramdisk": (b"hello", "ramdisk", "image.invalid", "no ramdisk"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ones(tmp_path: Path, case: str) -> None:
    data, image_format, code, says = BAD[case]
    with pytest.raises(InstructionError) as caught:
        look(tmp_path, data, image_format)
    assert caught.value.code == code and says in caught.value.message and caught.value.message.startswith("it ")
