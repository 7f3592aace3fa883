from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from hypervisor.host.word_size import is_64bit

ELF64, ELF32 = b"\x7fELF\x02\x01\x01" + bytes(1000), b"\x7fELF\x01\x01\x01" + bytes(1000)


def bzimage(version: int, flags: int, size: int = 0x1000) -> bytes:
    data = bytearray(size)
    data[0x202:0x206] = b"HdrS"
    data[0x206:0x208] = version.to_bytes(2, "little")
    data[0x236:0x238] = flags.to_bytes(2, "little")
    return bytes(data[:size])


@pytest.mark.parametrize(
    ("content", "wide"),
    [
        (ELF64, True),
        (ELF32, False),
        (gzip.compress(ELF64, mtime=0), True),
        (gzip.compress(ELF32, mtime=0), False),
        (gzip.compress(ELF64, mtime=0)[:6], False),
        (b"\x1f\x8bnonsense", False),
        (bzimage(0x20F, 0x7F), True),
        (bzimage(0x20F, 0x7E), False),
        (bzimage(0x20B, 0x7F), False),
        (bzimage(0x20F, 0x7F)[:0x210], False),
        (b"", False),
        (b"\x7fELF", False),
        (b"#scripted\n", False),
    ],
)
def test_what_a_kernel_is(tmp_path: Path, content: bytes, wide: bool) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    assert is_64bit(str(path)) is wide


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), str(tmp_path), str(tmp_path / "gone"), "a\0b"):
        assert not is_64bit(path)
