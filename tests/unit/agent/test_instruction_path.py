"""docs/instruction-path.md names the functions an instruction passes; this runs one and compares."""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import conf
from agent.rpc.client import Client
from agent.service import Service
from hypervisor.toolstack.drivers.fake import FakeToolstack

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "instruction-path.md"


def hops() -> list[str]:
    section = DOCUMENT.read_text().split("## The hops")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.M)


def find(name: str) -> tuple[Any, str]:
    """The module or class that holds the function, and the function's name in it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise AssertionError(f"{name} is nowhere")


class Recorder:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: list[str] = []

    def wrap(self, name: str, function: Callable[..., Any], *, empty_calls: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if empty_calls or not _idle(args[0]):
                with self.lock:
                    if name not in self.seen:
                        self.seen.append(name)
            return function(*args, **kwargs)

        return wrapper


def _idle(consumer: Any) -> bool:
    """The consumer also looks when it holds no message."""
    return hasattr(consumer, "_held") and not consumer._held


def test_the_hops_of_one_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hops()
    assert len(expected) >= 15
    recorder = Recorder()
    for name in expected:
        owner, attribute = find(name)
        wrapped = recorder.wrap(name, getattr(owner, attribute), empty_calls="Consumer" not in name)
        monkeypatch.setattr(owner, attribute, wrapped)
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    # Notifications go their own way, meanwhile.
    given = ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1", "--notifications-nonative"]
    settings = conf.load([], given)
    service = Service(settings, FakeToolstack(None))
    service.start()
    try:
        with Client(settings.broker_url, "node1") as client:
            reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": str(kernel)}, timeout=20)
            assert reply.ok, reply.error
            assert service.publisher.flush(10)
    finally:
        service.close()
    assert recorder.seen == expected


def test_the_acknowledgement_comes_after_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    names = [
        "agent.rpc.filesystem.Channel._get",
        "agent.journal.store.Journal.take_in",
        "agent.rpc.filesystem.Channel.basic_ack",
    ]
    settings = conf.load([], ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1"])
    service = Service(settings, FakeToolstack(None))
    with Client(settings.broker_url, "node1") as client:
        ident = client.send("list")
        for name in names:
            owner, attribute = find(name)
            monkeypatch.setattr(owner, attribute, recorder.wrap(name, getattr(owner, attribute), empty_calls=True))
        service.start()
        try:
            reply = client.wait(ident, 20)
        finally:
            service.close()
    assert reply.ok and recorder.seen == names
