"""What a node's folder of config drives holds after domains have gone."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Set
from pathlib import Path

import pytest

from agent.configdrive import Drives
from agent.configdrive.drives import YOUNG_SECONDS
from agent.errors import InstructionError
from hypervisor.errors import HostUnavailable

HERE = "11111111-2222-3333-4444-555555555555"
GONE = "99999999-2222-3333-4444-555555555555"


@pytest.fixture
def drives(tmp_path: Path) -> Drives:
    return Drives(tmp_path / "drives")


def write(drives: Drives, domain: str, *, old: bool = True) -> Path:
    drives.write(domain, "cidata", {"meta-data": b"x"}, "maker")
    path = drives.path(domain)
    if old:
        age(path)
    return path


def age(path: Path) -> None:
    before = time.time() - YOUNG_SECONDS - 1
    os.utime(path, (before, before))


def test_its_maker_is_known(drives: Drives) -> None:
    assert not drives.made_by(HERE, "maker") and not drives.made_by(HERE, "")
    write(drives, HERE)
    assert drives.made_by(HERE, "maker") and not drives.made_by(HERE, "mak")
    drives.remove(HERE)
    drives.remove(HERE)
    assert not drives.made_by(HERE, "maker")


def test_a_sweep_takes_what_is_old_and_nobody_s(drives: Drives) -> None:
    kept = [write(drives, HERE), write(drives, GONE.replace("9", "8"), old=False), drives.folder / "notes.iso"]
    kept[-1].write_text("not ours")
    age(kept[-1])
    folder = drives.folder / f"{GONE.replace('9', '7')}.iso"
    folder.mkdir()
    age(folder)
    half = drives.folder / f"{GONE.replace('9', '6')}.iso.new"
    half.write_text("half")
    age(half)
    write(drives, GONE)
    assert drives.sweep(lambda: {HERE}) == 2
    assert set(drives.folder.iterdir()) == {*kept, folder}


def test_a_sweep_asks_after_it_has_looked(drives: Drives) -> None:
    """A domain that is made meanwhile keeps its drive; one that nobody can tell of, too."""
    path = write(drives, GONE)

    def asked() -> Set[str]:
        write(drives, HERE)
        return set()

    assert drives.sweep(asked) == 1
    assert not path.exists() and drives.path(HERE).exists()

    def away() -> Set[str]:
        raise HostUnavailable("no answer")

    with pytest.raises(HostUnavailable):
        drives.sweep(away)
    assert drives.path(HERE).exists()


def test_a_drive_that_another_domain_uses_stays(drives: Drives) -> None:
    path = write(drives, GONE)
    assert drives.sweep(lambda: {HERE, str(path)}) == 0
    assert path.exists()


def test_a_drive_stays_as_long_as_a_saved_file_needs_it(drives: Drives, tmp_path: Path) -> None:
    drives.keep_for(GONE, "/nowhere")
    assert not drives.folder.exists(), "there is nothing to keep"
    path = write(drives, GONE)
    saved = [tmp_path / "one", tmp_path / "two"]
    for file in saved:
        drives.keep_for(GONE, str(file))
        file.touch()
    note = path.with_suffix(".keep")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    age(note)
    drives.remove(GONE)
    assert drives.sweep(set) == 0 and path.exists()
    saved[0].unlink()
    assert drives.sweep(set) == 0 and path.exists()
    saved[1].unlink()
    assert drives.sweep(set) == 1
    assert list(drives.folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"\xff", b"{\n5\n\n", b"[" * 10000])
def test_a_note_of_noise(drives: Drives, content: bytes) -> None:
    """What cannot be read as text keeps the drive; lines that name no file do not."""
    path = write(drives, GONE)
    path.with_suffix(".keep").write_bytes(content)
    drives.remove(GONE)
    assert path.exists() == (content == b"\xff")


def test_a_sweep_of_nothing_asks_nobody(drives: Drives) -> None:
    def asked() -> Set[str]:
        raise AssertionError("asked")

    assert drives.sweep(asked) == 0
    write(drives, HERE, old=False)
    assert drives.sweep(asked) == 0


def test_what_cannot_be_read_or_removed_is_said(drives: Drives) -> None:
    drives.folder.mkdir()
    drives.path(HERE).mkdir()
    with pytest.raises(InstructionError, match="cannot be read"):
        drives.made_by(HERE, "maker")
    with pytest.raises(InstructionError, match="cannot be removed"):
        drives.remove(HERE)
