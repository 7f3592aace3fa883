"""Saving and restoring when something goes wrong: full disks, killed processes, images for another processor.

REEVE_SAVE_KILLS: how often the host process is killed while it saves (6).
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from build import available, build_guest
from host_rig import HostRig, kill_process, until

from hypervisor.errors import (
    CpuIncompatible,
    HostFailure,
    HostUnavailable,
    InsufficientMemory,
    StreamInvalid,
    ToolstackError,
    WrongState,
)
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack
from hypervisor.toolstack.stream import config, envelope, libxc
from hypervisor.toolstack.stream.records import CpuidPolicy, Record
from hypervisor.toolstack.stream.source import Source

pytestmark = [
    pytest.mark.skipif(bool(available()), reason=str(available())),
    pytest.mark.timeout(600),
]
KILLS = int(os.environ.get("REEVE_SAVE_KILLS") or 6)
READY = b"suspend: ready"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("host"), runtime=REAL_RUNTIME, memory_mib=512)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    for info in made.list_domains():
        made.destroy(info.uuid)
    made.close()


def booted(toolstack: EmbeddedToolstack, memory_mib: int = 8) -> str:
    ident = str(uuid.uuid4())
    boot = KernelBoot(str(build_guest("suspend")))
    toolstack.create(DomainSpec(ident, f"d-{ident[:8]}", boot, memory_mib, vcpus=2, owner="tests"))
    toolstack.unpause(ident)
    until(lambda: READY in toolstack.console_log(ident), "the guest to boot", 60)
    return ident


def answers(toolstack: EmbeddedToolstack, ident: str) -> None:
    word = uuid.uuid4().hex
    console = toolstack.open_console(ident)
    try:
        console.write(f"{word}\n".encode())
        until(lambda: b"echo: " + word.encode() in toolstack.console_log(ident), "the guest to answer", 60)
    finally:
        console.close()
    assert b"BAD" not in toolstack.console_log(ident)


def test_a_full_disk(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    ident = booted(toolstack)
    path = tmp_path / "image"
    before = resource.prlimit(rig.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rig.pid, resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(HostFailure, match="cannot be written"):
            toolstack.save(ident, str(path))
    finally:
        resource.prlimit(rig.pid, resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    answers(toolstack, ident)
    toolstack.save(ident, str(path))
    assert toolstack.list_domains() == [] and path.exists()


def test_a_domain_process_that_is_killed(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    ident = booted(toolstack, memory_mib=128)
    failed: list[ToolstackError] = []

    def save() -> None:
        try:
            toolstack.save(ident, str(tmp_path / "image"))
        except ToolstackError as exc:
            failed.append(exc)

    thread = threading.Thread(target=save)
    thread.start()
    until(lambda: rig.record(ident)["suspending"], "the save to begin")
    kill_process(rig.process_of(ident))
    thread.join(60)
    assert not thread.is_alive()
    if failed:  # otherwise it was in the file already
        assert isinstance(failed[0], HostFailure | HostUnavailable | WrongState), failed
        assert list(tmp_path.iterdir()) == []
        until(lambda: toolstack.get_domain(ident).state is DomainState.CRASHED, "its crash to be told")


def test_a_checkpoint_when_the_host_process_is_killed(rig: HostRig, tmp_path: Path) -> None:
    """The guest runs on, and its memory is one piece again: the next checkpoint and a core dump are whole."""
    toolstack = rig.connect()
    ident = booted(toolstack, memory_mib=64)

    def save() -> None:
        with contextlib.suppress(ToolstackError):
            toolstack.save(ident, str(tmp_path / "killed"), keep_running=True)

    thread = threading.Thread(target=save)
    thread.start()
    time.sleep(random.uniform(0.0, 0.4))  # what is tested is any moment
    rig.restart()
    thread.join(60)
    toolstack.close()
    toolstack = rig.connect()
    answers(toolstack, ident)
    path = tmp_path / "whole"
    until(lambda: saved(toolstack, ident, path), "the killed one's writer to have ended", 60)
    toolstack.dump_core(ident, str(tmp_path / "core"))
    answers(toolstack, ident)
    toolstack.destroy(ident)
    toolstack.restore(str(path), owner="tests")
    toolstack.unpause(ident)
    answers(toolstack, ident)
    toolstack.destroy(ident)
    toolstack.close()


def saved(toolstack: EmbeddedToolstack, ident: str, path: Path) -> bool:
    """False: another save is under way."""
    try:
        toolstack.save(ident, str(path), keep_running=True)
    except WrongState:
        return False
    return True


def test_a_checkpoint_without_room_to_freeze_it(rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    ident = booted(toolstack)
    waits = f"domain {ident} waits while it is saved"
    free = toolstack.host_info().memory_free_mib
    toolstack.save(ident, str(tmp_path / "frozen"), keep_running=True)
    assert toolstack.host_info().memory_free_mib == free, "what was set aside is given back"
    assert waits not in rig.log.read_text()
    fill(toolstack)
    toolstack.save(ident, str(tmp_path / "waiting"), keep_running=True)
    assert waits in rig.log.read_text()
    answers(toolstack, ident)


def fill(toolstack: EmbeddedToolstack) -> None:
    """A domain that leaves less than a guest of 8 MiB needs."""
    for mib in range(toolstack.host_info().memory_free_mib, 0, -1):
        with contextlib.suppress(InsufficientMemory):
            ident = str(uuid.uuid4())
            boot = KernelBoot(str(build_guest("suspend")))
            toolstack.create(DomainSpec(ident, f"f-{ident[:8]}", boot, mib, owner="tests"))
            return


def test_a_host_process_that_is_killed(rig: HostRig, tmp_path: Path) -> None:
    """Whenever that is: the guest runs on, or its file is whole and it is gone. Never both, never neither."""
    rng = random.Random(11)
    outcomes = set()
    for number in range(KILLS):
        toolstack = rig.connect()
        ident = booted(toolstack, memory_mib=64)
        path = tmp_path / f"image-{number}"

        def save(path: Path = path, ident: str = ident, toolstack: EmbeddedToolstack = toolstack) -> None:
            with contextlib.suppress(ToolstackError):
                toolstack.save(ident, str(path))

        thread = threading.Thread(target=save)
        thread.start()
        time.sleep(rng.uniform(0.0, 0.8))  # what is tested is any moment
        rig.restart()
        thread.join(60)
        toolstack.close()
        toolstack = rig.connect()
        try:
            if path.exists():
                until(lambda: not toolstack.list_domains(), "the saved domain to be gone")  # noqa: B023
                toolstack.restore(str(path), owner="tests")
                toolstack.unpause(ident)
            answers(toolstack, ident)
            assert [p for p in tmp_path.iterdir() if ".part" in p.name] == []
            outcomes.add(path.exists())
            toolstack.destroy(ident)
        finally:
            toolstack.close()
    assert outcomes


def rewritten(image: bytes, change: object) -> bytes:
    """The image with each of its records put through `change`."""
    source = Source.of_file(io.BytesIO(image))
    saved = envelope.read_config(source)
    envelope.read_libxl_header(source)
    header = libxc.read_header(source)
    out = [libxc.record_bytes(change(record)) for record in libxc.read_records(source, header.version)]  # type: ignore[operator]
    return envelope.opening(saved) + libxc.header_bytes() + b"".join(out) + envelope.closing()


def test_images_that_this_host_cannot_take(toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    ident = booted(toolstack)
    path, other = tmp_path / "image", tmp_path / "other"
    toolstack.save(ident, str(path))
    image = path.read_bytes()
    avx = 1 << 28

    def with_avx(record: Record) -> Record:
        if not isinstance(record, CpuidPolicy):
            return record
        rows = [(*row[:4], row[4] | avx, row[5]) if row[0] == 1 else row for row in record.leaves]
        return CpuidPolicy(tuple(rows))

    free = toolstack.host_info().memory_free_mib
    for data, error, says in (
        (rewritten(image, with_avx), CpuIncompatible, "feature avx"),
        (image[: len(image) - 6000], StreamInvalid, "cut short"),
        (image.replace(b"\xff" * 8 + b"XENF", b"\xff" * 8 + b"XENG"), StreamInvalid, "libxc header"),
    ):
        other.write_bytes(data)
        with pytest.raises(error, match=says):
            toolstack.restore(str(other), owner="tests")
        assert toolstack.list_domains() == [] and toolstack.host_info().memory_free_mib == free
    toolstack.restore(str(path), owner="tests")
    toolstack.unpause(ident)
    answers(toolstack, ident)


def test_an_image_of_another_toolstack(toolstack: EmbeddedToolstack, tmp_path: Path) -> None:
    """Without our own key libxl's configuration is enough to restore it."""
    ident = booted(toolstack)
    path = tmp_path / "image"
    toolstack.save(ident, str(path))
    source = Source.of_file(io.BytesIO(path.read_bytes()))
    saved = envelope.read_config(source)
    rest = path.read_bytes()[source.position :]
    del saved[config.KEY]
    saved["b_info"].pop("kernel")
    head = envelope.opening(saved)
    path.write_bytes(head[: len(head) - 24] + rest)
    info = toolstack.restore(str(path), owner="tests")
    assert (info.uuid, info.owner, info.memory_mib) == (ident, "tests", 8)
    toolstack.unpause(ident)
    answers(toolstack, ident)
    with pytest.raises(ToolstackError):
        toolstack.reset(ident)
