"""Files for this user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agent.durable import private, sync


def test_a_private_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with open(tmp_path / "a", "w", opener=private) as file:
            file.write("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    sync(tmp_path / "a")
    sync(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic"), open(tmp_path / "link", "w", opener=private):
        pass
    assert (tmp_path / "a").read_text() == "x"
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
