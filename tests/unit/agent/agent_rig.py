"""An agent without broker and threads, over the fake driver: for tests of what stands behind the message queue."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent import executor
from agent.api import Host, NoPeers, Peers
from agent.executor import Executor
from agent.images.remote.fetcher import Fetcher
from agent.journal import Accepted, Journal
from agent.loader import Verb, load_verbs
from agent.local_images import LocalImages
from agent.resources import ResourceClaims
from agent.wire import Instruction, Reply
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers.fake import FakeToolstack

HOST = "node1"


class Killed(BaseException):
    """What SIGKILL does, as far as a thread can see it."""


@dataclasses.dataclass
class Rig:
    toolstack: FakeToolstack
    journal: Journal
    host: Host
    verbs: dict[str, Verb]
    executor: Executor
    stopping: threading.Event
    kernel: Path

    def accept(self, verb: str, args: Mapping[str, Any], **fields: Any) -> str:
        instruction = Instruction(fields.pop("id", str(uuid.uuid4())), verb, HOST, dict(args), "replies", **fields)
        assert self.journal.accept(instruction) is Accepted.NEW
        return instruction.id

    def run(self, verb: str, args: Mapping[str, Any] | None = None, **fields: Any) -> Reply:
        ident = self.accept(verb, args or {}, **fields)
        self.executor.run(ident)
        return self.reply(ident)

    def reply(self, ident: str) -> Reply:
        rows = [row for row in self.journal.outbox(1000) if row.correlation_id == ident]
        assert len(rows) == 1, f"{len(rows)} replies"
        return Reply.from_json(json.loads(rows[0].body))

    def ok(self, verb: str, args: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        reply = self.run(verb, args, **fields)
        assert reply.error is None and reply.result is not None, reply.error
        return reply.result

    def killed(self, monkeypatch: pytest.MonkeyPatch, at: str, args: Mapping[str, Any]) -> None:
        """Killed at a boundary ("verb:…"), the agent takes the instruction up again, and it succeeds."""

        def boundary(name: str) -> None:
            if name == at:
                raise Killed

        ident = self.accept(at.partition(":")[0], args)
        monkeypatch.setattr(executor, "boundary", boundary)
        with pytest.raises(Killed):
            self.executor.run(ident)
        monkeypatch.undo()
        self.executor.run(ident)
        assert self.reply(ident).ok, self.reply(ident).error

    def refused(self, code: str, verb: str, args: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """The instruction fails with `code`, in one line, and leaves no claim and no open row."""
        reply = self.run(verb, args, **fields)
        assert reply.error is not None, reply.result
        assert reply.error["code"] == code, reply.error
        assert reply.error["message"] and "\n" not in reply.error["message"]
        self.clean()
        return reply.error

    def clean(self) -> None:
        counts = self.journal.counts()
        assert (counts["unfinished"], counts["claims"]) == (0, 0)

    def image(self, name: str = "disk.img", size: int = 1 << 20) -> str:
        """A raw disk image."""
        path = self.kernel.parent / name
        path.write_bytes(bytes(size))
        return str(path)

    def create(self, name: str = "web", **args: Any) -> str:
        result = self.ok("create", {"name": name, "memory_mib": 64, "kernel": str(self.kernel)} | args)
        return str(result["domain"]["uuid"])

    def foreign(self, name: str = "theirs") -> str:
        spec = DomainSpec(str(uuid.uuid4()), name, KernelBoot(str(self.kernel)), 64)
        return self.toolstack.add_foreign(spec).uuid


@functools.cache
def _verbs() -> Mapping[str, Verb]:
    """Once for all tests: looking entry points up costs more than most of them."""
    verbs, broken = load_verbs()
    assert not broken
    return verbs


def make_rig(
    folder: Path,
    toolstack: FakeToolstack | None = None,
    name: str = HOST,
    peers: Peers | None = None,
    sources: Fetcher | None = None,
    **options: Any,
) -> Rig:
    toolstack = toolstack or FakeToolstack(None)
    journal = Journal(folder / "journal.sqlite")
    journal._db.execute("PRAGMA synchronous=OFF")  # no test cuts the power, and a sync takes longer than most tests
    verbs = dict(_verbs())
    claims = ResourceClaims(toolstack, journal)
    kernel = folder / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    images = folder / "images"
    images.mkdir(exist_ok=True)
    settings = {"image_dir": str(images), "core_dir": str(folder / "cores"), "resize_confirm_seconds": "0"}
    settings["save_dir"] = str(folder / "saved")
    settings["config_drive_dir"] = str(folder / "drives")
    for loader in ("grub_x86_64", "grub_i386"):
        settings[loader] = str(folder / loader)
    owner = f"reeve/{journal.node_id()}"
    host = Host(name, owner, toolstack, claims, LocalImages(images), settings, peers or NoPeers(), sources)
    stopping = threading.Event()
    options.setdefault("unknown_seconds", 0.3)
    executor = Executor(journal, verbs, host, stopping, **options)
    return Rig(toolstack, journal, host, verbs, executor, stopping, kernel)
