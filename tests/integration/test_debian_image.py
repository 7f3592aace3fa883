"""Debian's own kernel and busybox: the image is made, its kernel placed in memory, its userspace booted in QEMU."""

from __future__ import annotations

import mmap
import os
import select
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from agent.images import READY, Image, ImageBuildFailed, build_image, verify_image
from hypervisor.errors import MemoryTooSmall
from hypervisor.toolstack.builder import BuildMemory, Kernel, KernelCache, build, load_ramdisk, plan_memory
from hypervisor.types import Mfn

PAGE = 4096
BASE = Mfn(0x10000)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "packages"
    try:
        return build_image(tmp_path_factory.mktemp("images"), name="debian", cache_dir=cache)
    except ImageBuildFailed as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Debian packages to be had here: {exc}")


@pytest.fixture(scope="module")
def kernel(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return KernelCache(tmp_path_factory.mktemp("kernels")).load(image.kernel)


def test_image_is_whole_and_names_its_sources(image: Image) -> None:
    assert verify_image(image.directory) == image
    assert [name.split("-")[0] for name, _ in image.packages] == ["linux", "busybox"]


def test_kernel_notes(kernel: Kernel) -> None:
    assert kernel.notes.guest_os == "linux"
    assert kernel.virt_base == 0xFFFFFFFF80000000
    assert kernel.notes.mod_start_pfn and kernel.p2m_base == 0x8000000000


def test_kernel_is_read_back_quickly(image: Image, kernel: Kernel, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    cache.load(image.kernel)
    start = time.perf_counter()
    again = cache.load(image.kernel)
    assert time.perf_counter() - start < 1  # a tenth of that on an idle machine
    assert again.segments == kernel.segments and again.data == kernel.data


def test_memory_too_small(kernel: Kernel) -> None:
    with pytest.raises(MemoryTooSmall, match="at least"):
        plan_memory(kernel, 2 << 20, 64)
    plan_memory(kernel, 2 << 20, 128)


def test_start_of_day(image: Image, kernel: Kernel) -> None:
    assert image.ramdisk is not None
    ramdisk = load_ramdisk(image.ramdisk)
    size = 128 << 20
    with mmap.mmap(-1, size) as memory:
        with memoryview(memory) as view:
            state = build(BuildMemory(view, BASE, size // PAGE), kernel, ramdisk, image.cmdline, shared_info_mfn=Mfn(1))

        def lookup(va: int) -> int:
            entry = state.l4_mfn << 12
            for level in (4, 3, 2, 1):
                slot = va >> (12 + 9 * (level - 1)) & 511
                at = ((entry & 0xFFFFFFFFFF000) >> 12) - BASE
                (entry,) = struct.unpack_from("<Q", memory, at * PAGE + slot * 8)
                assert entry & 5 == 5, hex(va)
            return entry

        for va in range(state.virt_base, state.virt_end, PAGE):
            assert (lookup(va) & 0xFFFFFFFFFF000) >> 12 == BASE + (va - state.virt_base) // PAGE
        for segment in kernel.segments:
            content = kernel.data[segment.offset : segment.offset + segment.filesz]
            assert memory[segment.paddr : segment.paddr + segment.filesz] == content
        assert not lookup(state.entry) >> 63
        mod_start, mod_len = struct.unpack_from("<QQ", memory, (state.start_info_mfn - BASE) * PAGE + 112)
        assert memory[mod_start * PAGE :][:mod_len] == ramdisk


class Serial:
    """QEMU with the image on its serial line."""

    def __init__(self, image: Image) -> None:
        program = shutil.which("qemu-system-x86_64")
        if program is None:
            if os.environ.get("CI"):
                pytest.fail("qemu-system-x86_64 is not installed")
            pytest.skip("qemu-system-x86_64 is not installed")
        command = [program, "-accel", "tcg", "-m", "256", "-no-reboot", "-nographic", "-kernel", image.kernel]
        command += ["-initrd", str(image.ramdisk), "-append", image.cmdline.replace("hvc0", "ttyS0")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.output = b""

    def expect(self, text: bytes, seconds: float) -> None:
        """Read until `text` appears in what came since the last call."""
        deadline = time.monotonic() + seconds
        assert self.process.stdout is not None
        while text not in self.output:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0))
            assert ready, f"no {text!r} within {seconds} s after {self.output[-1500:]!r}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"QEMU ended before {text!r}: {self.output[-1500:]!r}"
            self.output += data
        self.output = self.output.split(text, 1)[1]

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")


@pytest.mark.parametrize(
    ("command", "last_words"),
    [("/sbin/poweroff", b"Power down"), ("/sbin/reboot", b"Restarting"), ("poweroff", b"down")],
)
def test_userspace_boots_and_ends(image: Image, command: str, last_words: bytes) -> None:
    serial = Serial(image)
    try:
        serial.expect(READY.encode(), 120)
        serial.expect(b"/ # ", 60)
        serial.type("echo $((6 * 7)); tty")
        serial.expect(b"42\r\n/dev/ttyS0\r\n", 60)
        serial.type(command)
        serial.expect(last_words, 60)
        assert serial.process.wait(60) == 0
    finally:
        serial.process.kill()
        serial.process.communicate()
