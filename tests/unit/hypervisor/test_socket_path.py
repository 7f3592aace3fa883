"""Sockets whose paths are too long for the kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hypervisor.socket_path import short_path


def test_a_path_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with short_path(folder / "sock") as address:
            listener.bind(address)
        listener.listen()
        assert (folder / "sock").is_socket()
        with short_path(folder / "sock") as address:
            client.connect(address)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), short_path(tmp_path / "none" / "sock"):
        pass
