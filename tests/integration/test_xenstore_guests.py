"""Guests and xenstore, all real processes: restarts under load, and guests that want to harm the others."""

from __future__ import annotations

import json
import logging
import re
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig, until

from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

LOG = logging.getLogger(__name__)

READ, WRITE, INTRODUCE, RELEASE, IS_INTRODUCED = 2, 11, 8, 9, 17
KILLS = 10
NUISANCES = ("flood", "deaf", "watch", "transactions", "noise", "bell")

SLOWEST = 0.5
"""Seconds in which every answer must come: far above what is measured, since the machine may have other work."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[HostRig]:
    # Debug lines for what hostile guests do would measure the log.
    made = HostRig(tmp_path / "host", log_level="info").start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    made.close()


class Tool:
    """A client on xenstored's socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))

    def ask(self, kind: int, payload: bytes) -> bytes:
        self._socket.sendall(struct.pack("<4I", kind, 1, 0, len(payload)) + payload)
        size = struct.unpack("<4I", self._exactly(16))[3]
        return self._exactly(size)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            assert part, "xenstored hung up"
            data += part
        return data


@pytest.fixture
def tool(rig: HostRig) -> Iterator[Callable[[], Tool]]:
    made: list[Tool] = []

    def connect() -> Tool:
        made.append(Tool(rig.state / "xenstored.sock"))
        return made[-1]

    yield connect
    for each in made:
        each.close()


def start(rig: HostRig, toolstack: EmbeddedToolstack, script: str) -> tuple[str, int]:
    spec = rig.spec(f"print hello\n{script}")
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: b"hello" in toolstack.console_log(spec.uuid), "the guest to print")
    return spec.uuid, toolstack.get_domain(spec.uuid).domid


def counted(toolstack: EmbeddedToolstack, uuid: str) -> int:
    """How far a ``store-check`` guest has counted, and that it never saw anything wrong."""
    log = toolstack.console_log(uuid).decode()
    assert "wrong" not in log, log[log.index("wrong") :][:300]
    assert toolstack.get_domain(uuid).state == "running", toolstack.get_domain(uuid).detail
    numbers = re.findall(r"count (\d+)", log)
    return int(numbers[-1]) if numbers else 0


def test_a_guest_at_work_notices_no_restart(
    rig: HostRig, toolstack: EmbeddedToolstack, tool: Callable[[], Tool]
) -> None:
    uuid, domid = start(rig, toolstack, "store-check")
    path = b"/local/domain/%d/data/asked\0" % domid
    for number in range(KILLS):
        before = counted(toolstack, uuid)
        until(lambda at=before: counted(toolstack, uuid) > at, "the guest to count on")
        rig.restart()
        word = f"word-{number}"
        assert tool().ask(WRITE, path + word.encode()) == b"OK\0"
        until(lambda asked=word: f"heard {asked}" in toolstack.console_log(uuid).decode(), "its watch to fire")
    before = counted(toolstack, uuid)
    until(lambda: counted(toolstack, uuid) > before, "the guest to count on")


def latencies(ask: Callable[[], object], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        begin = time.monotonic()
        ask()
        taken.append(time.monotonic() - begin)
    return taken


def told(taken: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(1000 * t for t in taken)
    return {
        "median": round(statistics.median(ordered), 2),
        "p99": round(ordered[len(ordered) * 99 // 100], 2),
        "max": round(ordered[-1], 2),
    }


@pytest.mark.parametrize("nuisance", NUISANCES)
def test_a_hostile_guest_slows_nobody(
    rig: HostRig,
    toolstack: EmbeddedToolstack,
    tool: Callable[[], Tool],
    nuisance: str,
    record_property: Callable[[str, object], None],
) -> None:
    good, domid = start(rig, toolstack, "store-check")
    client = tool()
    name = b"/local/domain/%d/name\0" % domid
    quiet = latencies(lambda: client.ask(READ, name), 300)
    bad, bad_domid = start(rig, toolstack, f"store-hostile {nuisance}")
    busy = latencies(lambda: client.ask(READ, name), 300)
    writes = latencies(lambda: client.ask(WRITE, b"/tool/written\0x"), 300)
    before, begin = counted(toolstack, good), time.monotonic()
    until(lambda: counted(toolstack, good) >= before + 400, "the good guest to count on", 60)
    rounds = 400 / (time.monotonic() - begin)
    figures = {"quiet": told(quiet), "busy": told(busy), "writes": told(writes), "good guest, rounds/s": round(rounds)}
    record_property("latency_ms", json.dumps(figures))
    LOG.info("%s: latency in ms: %s", nuisance, figures)
    assert max(busy) < SLOWEST and max(writes) < SLOWEST
    # It may neither grow what the host process holds nor what is on disk beyond its quota.
    control = client.ask(0, b"quota\0%d\0" % bad_domid).decode()
    used = {key.strip(): int(value) for key, _, value in (line.partition(":") for line in control.split("\n")[1:-1])}
    assert used["nodes"] <= 1000 and used["watches"] <= 128 and used["transactions"] <= 10
    assert used["memory"] <= 1 << 20 and used["outstanding"] <= 20
    assert (rig.state / "xenstore").stat().st_size < 16 << 20
    toolstack.destroy(bad)
    assert client.ask(IS_INTRODUCED, b"%d\0" % bad_domid) == b"F\0"


def test_released_and_introduced_again_by_a_tool(
    rig: HostRig, toolstack: EmbeddedToolstack, tool: Callable[[], Tool]
) -> None:
    uuid, domid = start(rig, toolstack, "")
    client = tool()
    text = b"%d\0" % domid
    assert client.ask(INTRODUCE, text + b"1\0" + b"9\0") == b"EINVAL\0"
    assert client.ask(INTRODUCE, b"%d\0" % (domid + 1) + b"1\0" + b"1\0") == b"ENOENT\0"
    assert client.ask(RELEASE, text) == b"OK\0"
    assert client.ask(IS_INTRODUCED, text) == b"F\0"
    for _ in range(2):  # again after RELEASE; then for a domain that is served, which begins anew
        assert client.ask(INTRODUCE, text + b"1\0" + b"1\0") == b"OK\0"
        assert client.ask(IS_INTRODUCED, text) == b"T\0"
    rig.restart()
    assert tool().ask(IS_INTRODUCED, text) == b"T\0"
    toolstack.destroy(uuid)
    assert tool().ask(IS_INTRODUCED, text) == b"F\0"
