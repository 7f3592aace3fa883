"""The control connection of a storage daemon that greets, and then says nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.devices.block.image import qmp
from hypervisor.devices.block.image.qmp import Qmp, QmpError

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class Daemon:
    """:param answers: whether the connection of that number, from 1 on, answers. :ivar connections: how many came."""

    def __init__(self, answers: Callable[[int], bool], greets: Callable[[int], bool] = lambda _: True) -> None:
        self._answers, self._greets = answers, greets
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections = number = self.connections + 1
        if self._greets(number):
            writer.write(json.dumps(GREETING).encode() + b"\r\n")
        while line := await reader.readline():
            if self._answers(number):
                writer.write(json.dumps({"return": {}, "id": json.loads(line)["id"]}).encode() + b"\r\n")
        writer.close()


async def connected(folder: Path, daemon: Daemon) -> Qmp:
    async with await asyncio.start_unix_server(daemon.serve, folder / "qmp.sock"):
        return await Qmp.connect(str(folder), "qmp.sock")


def test_a_silent_connection_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "HELLO_TIMEOUT", 0.2)
    daemon = Daemon(lambda number: number > 3, greets=lambda number: number != 2)
    asyncio.run(connected(tmp_path, daemon)).close()
    assert daemon.connections >= 4


def test_a_daemon_that_never_answers_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "HELLO_TIMEOUT", 0.1)
    daemon = Daemon(lambda _number: False)
    with pytest.raises(QmpError, match="no answer within"):
        asyncio.run(connected(tmp_path, daemon))
    assert 1 < daemon.connections <= qmp.CONNECTIONS
