"""What the host process tells the service manager."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from hypervisor.host import server


class Manager:
    """Takes what is sent to NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(str(path))

    async def heard(self) -> str:
        return (await asyncio.get_running_loop().sock_recv(self.sock, 1000)).decode()


def test_it_tells_of_itself_while_its_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    monkeypatch.setenv("NOTIFY_SOCKET", f"/proc/{os.getpid()}/cwd/n")
    manager = Manager(Path("n"))

    async def test() -> None:
        stop = asyncio.Event()
        waiting = asyncio.create_task(server.until(stop))
        for _ in range(3):
            assert await manager.heard() == "WATCHDOG=1"
        stop.set()
        await waiting

    with manager.sock:
        asyncio.run(test())


def test_without_a_watchdog_it_waits_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", f"/proc/{os.getpid()}/cwd/n")
    manager = Manager(Path("n"))

    async def test() -> None:
        stop = asyncio.Event()
        waiting = asyncio.create_task(server.until(stop))
        await asyncio.sleep(0)
        stop.set()
        await waiting
        with pytest.raises(BlockingIOError):
            manager.sock.recv(100)

    with manager.sock:
        asyncio.run(test())
