"""Debian's GRUB for PV guests, of both word sizes, reaches its prompt.

Needs the images of the package grub-xen-host, in their place or in the folder that REEVE_GRUB_XEN names.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.toolstack.api import Capability, DomainSpec, KernelBoot, Toolstack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from run_xtf import private_host

FOLDER = Path(os.environ.get("REEVE_GRUB_XEN", "/usr/lib/grub-xen"))
DEADLINE = 30.0

IMAGES = {"grub-x86_64-xen.bin": Capability.PV, "grub-i386-xen.bin": Capability.PV32}

pytestmark = pytest.mark.skipif(
    not all((FOLDER / name).is_file() for name in IMAGES),
    reason=f"no GRUB images in {FOLDER}: install grub-xen-host, or name their folder in REEVE_GRUB_XEN",
)


@pytest.fixture(scope="module")
def host() -> Iterator[Toolstack]:
    with private_host() as toolstack:
        yield toolstack


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_grub_reaches_its_prompt(host: Toolstack, image: str) -> None:
    if IMAGES[image] not in host.capabilities():
        pytest.skip(f"this host has no {IMAGES[image]}")
    spec = DomainSpec(
        uuid=str(uuid.uuid4()),
        name=f"grub-{uuid.uuid4().hex[:8]}",
        boot=KernelBoot(kernel=str(FOLDER / image)),
        memory_mib=64,
        owner="tests",
    )
    host.create(spec)
    try:
        host.unpause(spec.uuid)
        end = time.monotonic() + DEADLINE
        while b"grub>" not in (log := host.console_log(spec.uuid, 1 << 16)):
            assert time.monotonic() < end, log.decode(errors="replace")
            time.sleep(0.02)  # a poll with a deadline
        assert b"GNU GRUB" in log
    finally:
        host.destroy(spec.uuid)
