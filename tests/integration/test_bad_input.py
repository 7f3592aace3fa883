"""Bad input by the whole way: scheduler, folder broker, agent, host process, domain process with the real machine.

Each case gets one line with cause and cure and a code, and leaves nothing behind: that is measured around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import re
import socket
import sqlite3
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from agent_process import HOST, AgentProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import build as guests
from host_rig import HostRig, until

from agent import wire
from agent.rpc.client import Client
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import Console, DomainState
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

WAIT = 30.0
PROMPT = 5.0
SETTLED = 20.0
"""Seconds in which a domain is destroyed, whatever its guest does; a loaded machine must not fail a test."""
NEIGHBOUR = "11111111-2222-3333-4444-555555555555"
MIB = 1 << 20


@dataclasses.dataclass
class Node:
    """One host process and one agent, and a guest that must notice nothing of all this."""

    rig: HostRig
    agent: AgentProcess
    toolstack: EmbeddedToolstack
    client: Client
    folder: Path
    console: Console | None = None

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def send(self, message: dict[str, Any] | bytes) -> wire.Reply:
        """A message as it is; the reply finds its sender by the message's own reply address."""
        ident = str(uuid.uuid4())
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.client.send_raw(body, correlation_id=ident)
        return self.client.wait(ident, WAIT)

    def send_huge(self, size: int) -> wire.Reply:
        """An envelope as kombu writes it around a body of `size` bytes, as a file with a hole."""
        ident = str(uuid.uuid4())
        properties = {
            "correlation_id": ident, "reply_to": self.client.reply_to, "delivery_mode": 2, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": wire.queue_name(HOST)}, "delivery_tag": ident,
        }  # fmt: skip
        data = Path(self.agent.url.removeprefix("filesystem://")) / "data"
        hidden = data / ".huge.new"
        with hidden.open("wb") as file:
            file.write(b'{"body": "')
            file.seek(size * 4 // 3)
            file.write(b'", "content-type": "application/json", "content-encoding": "utf-8", "headers": {}, ')
            file.write(b'"properties": ' + json.dumps(properties).encode() + b"}")
        hidden.rename(data / f"{time.time_ns() // 1_000_000}_{ident}.{wire.queue_name(HOST)}.msg")
        return self.client.wait(ident, WAIT)

    def journal(self, what: str) -> int:
        path = self.agent.folder / "state" / "agent" / "journal.sqlite"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return int(db.execute(f"SELECT count(*) FROM {what}").fetchone()[0])

    def processes(self) -> set[int]:
        """The host process and all below it."""
        found, todo = set(), [self.rig.pid]
        while todo:
            pid = todo.pop()
            found.add(pid)
            todo.extend(child for child in self.rig.children(pid) if child not in found)
        return found

    def xenstore(self, path: str) -> list[str]:
        """The children of a node, by XS_DIRECTORY (public/io/xs_wire.h)."""
        name = path.encode() + b"\0"
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(self.rig.state / "xenstored.sock"))
            link.sendall(struct.pack("<4I", 1, 0, 0, len(name)) + name)
            kind, _, _, size = struct.unpack("<4I", link.recv(16, socket.MSG_WAITALL))
            names = link.recv(size, socket.MSG_WAITALL)
        assert kind == 1, names
        return sorted(names.decode().rstrip("\0").split("\0"))

    def footprint(self) -> dict[str, Any]:
        """What there is of domains in the world."""
        info = self.toolstack.host_info()
        return {
            "processes": self.processes(),
            "descriptors": len(os.listdir(f"/proc/{self.rig.pid}/fd")),
            "memory": (info.memory_free_mib, info.domains),
            "folders": self.rig.left_behind(),
            "xenstore": self.xenstore("/local/domain") + self.xenstore("/vm"),
            "claims": self.journal("claims"),
            "unfinished": self.journal("instructions WHERE finished IS NULL"),
        }

    def neighbour_answers(self) -> None:
        word = uuid.uuid4().hex
        assert self.console is not None
        self.console.write(f"{word}\n".encode())
        seen = bytearray()

        def echoed() -> bool:
            assert self.console is not None
            seen.extend(self.console.read(timeout=0.2))
            return f"echo: {word}".encode() in seen

        until(echoed, "the neighbour to answer")

    def create(self, name: str, kernel: str, **fields: Any) -> wire.Reply:
        return self.client.call("create", {"name": name, "memory_mib": 16, "kernel": kernel, **fields}, timeout=WAIT)

    def destroy(self, ident: str) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        assert self.client.call("destroy", {"uuid": ident}, timeout=WAIT).ok
        return time.monotonic() - began


@contextlib.contextmanager
def running_node(folder: Path, neighbour: Mapping[str, Any], **options: object) -> Iterator[Node]:
    """:param neighbour: arguments of the neighbour's create. :param options: of the host process."""
    rig = HostRig(folder / "host", REAL_RUNTIME, memory_mib=256, cpus=2, **options).start()
    agent = AgentProcess(folder, driver=("--driver-name", "embedded", "--driver-socket", str(rig.socket)))
    toolstack = rig.connect()
    try:
        agent.start()
        with agent.client() as client:
            made = Node(rig, agent, toolstack, client, folder)
            reply = made.create("neighbour", str(guests.build_guest("hello")), uuid=NEIGHBOUR, **neighbour)
            assert reply.ok, reply.error
            until(lambda: b"hello: ready" in toolstack.console_log(NEIGHBOUR), "the neighbour to boot")
            made.console = toolstack.open_console(NEIGHBOUR)
            yield made
    finally:
        agent.stop()
        toolstack.close()
        rig.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running_node(tmp_path_factory.mktemp("bad-input"), {}) as made:
        yield made


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What differs. A connection that was just closed may still have counted among the descriptors before."""
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    if after["descriptors"] < before["descriptors"]:
        del changed["descriptors"]
    return changed


@pytest.fixture
def spotless(node: Node) -> Iterator[Node]:
    """The node, which must be after the test what it was before."""
    before = node.footprint()
    yield node
    deadline = time.monotonic() + SETTLED
    while changed := left_behind(before, node.footprint()):
        assert time.monotonic() < deadline, f"left behind (before, after): {changed}"
    node.neighbour_answers()


def refused(reply: wire.Reply, code: str, cause: str, cure: str) -> None:
    error = reply.error
    assert error is not None, reply.result
    assert (error["code"], error["undone"], error["retryable"]) == (code, True, False), error
    message = error["message"]
    assert "\n" not in message and len(message) < 700  # that of an unknown verb names all there are
    assert re.search(cause, message), f"no cause {cause!r}: {message}"
    assert re.search(cure, message), f"no cure {cure!r}: {message}"


def guest(name: str, **defines: bool) -> str:
    return str(guests.build_guest(name, **defines))


def ramdisk() -> bytes:
    """A gzipped archive that ends in the middle."""
    packed = gzip.compress(os.urandom(20000))
    return packed[: len(packed) // 2]


# What `create` is given on top of a good name, kernel and memory; "@…" is a file made by the test.
CREATES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no kernel": ({"kernel": "@text"}, "kernel.invalid", "is not a kernel image", "give a Linux bzImage"),
    "no file": ({"kernel": "/nowhere/vmlinuz"}, "kernel.invalid", "/nowhere/vmlinuz", "give|check"),
    "truncated kernel": ({"kernel": "@half"}, "kernel.invalid", "truncated|damaged", "copy or download"),
    "no Xen notes": ({"kernel": "@plain"}, "kernel.no_xen_notes", "no Xen notes", "Xen PV support"),
    "PVH only": ({"kernel": "@pvh"}, "kernel.pvh_only", "only a PVH entry", "Xen PV support"),
    "truncated ramdisk": ({"ramdisk": "@ramdisk"}, "ramdisk.invalid", "truncated", "build or copy it again"),
    "too small": ({"memory_mib": 1}, "domain.memory_too_small", "1 MiB", "at least"),
    "too much memory": ({"memory_mib": 1 << 20}, "host.insufficient_memory", "has .* MiB", "make it smaller"),
    "too many vCPUs": ({"vcpus": 3}, "host.insufficient_vcpus", "at most 2", "ask for less"),
    "too many claimed": ({"vcpus": 32}, "host.insufficient_vcpus", "31 left of 32", "make it smaller"),
    "name in use": ({"name": "neighbour"}, "domain.name_in_use", "'neighbour'", "another name"),
    "UUID in use": ({"uuid": NEIGHBOUR}, "domain.uuid_in_use", NEIGHBOUR, "give another"),
    "unknown argument": ({"memroy": 64}, "instruction.bad_args", "'memroy'", "arguments of 'create': .*memory_mib"),
    "text for a number": ({"memory_mib": "16"}, "instruction.bad_args", "args.memory_mib: '16'", "'integer'"),
    "no UUID": ({"uuid": "web"}, "instruction.bad_args", "args.uuid: 'web'", "match"),
    "no vCPU": ({"vcpus": 0}, "instruction.bad_args", "args.vcpus: 0", "minimum of 1"),
    "no image": ({"image": "nonsense", "kernel": None}, "image.not_found", "images/nonsense", "image build"),
}


@pytest.mark.parametrize("case", CREATES)
def test_a_domain_that_cannot_be(spotless: Node, case: str) -> None:
    changes, code, cause, cure = CREATES[case]
    content = {
        "@text": lambda: b"Dear Sir or Madam,\n" * 100,
        "@half": lambda: Path(guest("hello")).read_bytes()[:5000],
        "@plain": lambda: Path(guest("hello", NO_XEN_NOTES=True)).read_bytes(),
        "@pvh": lambda: Path(guest("hello", PVH_ONLY=True)).read_bytes(),
        "@ramdisk": ramdisk,
    }
    args: dict[str, Any] = {"name": "web", "memory_mib": 16, "kernel": guest("hello"), **changes}
    for key, value in list(args.items()):
        if value is None:
            del args[key]
        elif value in content:
            args[key] = spotless.file(value[1:], content[value]())
    refused(spotless.client.call("create", args, timeout=WAIT), code, cause, cure)


def test_memory_that_is_gone_once_overhead_is_counted(spotless: Node) -> None:
    """The agent's own count lets it pass; the host process's ledger does not."""
    left = spotless.toolstack.host_info().memory_free_mib
    reply = spotless.create("web", guest("hello"), memory_mib=left)
    refused(reply, "host.insufficient_memory", f"has {left} of 256 MiB left", "give it less memory")


def message(**changes: Any) -> dict[str, Any]:
    good = {"reeve": "1.0", "id": str(uuid.uuid4()), "verb": "list", "host": HOST, "args": {}}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


MESSAGES: dict[str, tuple[dict[str, Any] | bytes, str, str, str]] = {
    "not JSON": (b"create a domain, please", "message.not_json", "not JSON", "send one JSON object"),
    "not UTF-8": (b'{"reeve": "\xff"}', "message.not_json", "UTF-8", "send one JSON object"),
    "no object": (b"[1, 2]", "message.bad_field", "JSON array", "send an object with"),
    "nested lists": (b"[" * 10000 + b"]" * 10000, "message.too_deep", "deeper than 32", "flatten it"),
    "nested objects": (b'{"a":' * 10000 + b"1" + b"}" * 10000, "message.too_deep", "deeper than 32", "flatten it"),
    "another host": (message(host="node2"), "message.wrong_host", "for host 'node2'", "queue 'reeve.node2'"),
    "unknown field": (message(urgent=True), "message.unknown_field", "'urgent'", "known are .*verb"),
    "ill-typed field": (message(args=[]), "message.bad_field", "'args' is a JSON array", "give an object"),
    "ill-typed verb": (message(verb=7), "message.bad_field", "'verb' is 7", "give lower-case letters"),
    "missing field": (message(verb=None), "message.missing_field", "'verb' is missing", "give it"),
    "newer version": (message(reeve="2.0"), "message.unsupported_version", "2.0 is not spoken", "send 1.0"),
    "no version": (message(reeve="latest"), "message.bad_field", "'latest'", 'give the format\'s version, "1.0"'),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_that_is_no_instruction(spotless: Node, case: str) -> None:
    body, code, cause, cure = MESSAGES[case]
    kept = spotless.journal("quarantine")
    answer = spotless.send(body) if isinstance(body, bytes) else by_id(spotless, body)
    refused(answer, code, cause, cure)
    assert spotless.journal("quarantine") == kept + 1


def by_id(node: Node, body: dict[str, Any]) -> wire.Reply:
    """A message whose id can be read is answered under it."""
    node.client.send_raw(json.dumps(body).encode())
    return node.client.wait(str(body["id"]), WAIT)


def test_an_unknown_verb(spotless: Node) -> None:
    answer = spotless.client.call("levitate", {"uuid": NEIGHBOUR}, timeout=WAIT)
    refused(answer, "instruction.unknown_verb", "'levitate'", "create.*unpause")


def test_a_message_of_100_mb_costs_the_agent_no_memory(spotless: Node) -> None:
    assert spotless.agent.process is not None
    status = Path(f"/proc/{spotless.agent.process.pid}/status")

    def peak_kib() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]

    before = peak_kib()
    size = 100 * MIB
    answer = spotless.send_huge(size)
    refused(answer, "message.too_large", r"has 1\d{8} bytes", r"at most 1048576 .*max_message_bytes")
    assert peak_kib() - before < 20 * 1024


@pytest.mark.parametrize("name", ["triple", "stackbomb"])
def test_a_guest_that_faults_without_a_handler_is_crashed_until_destroyed(spotless: Node, name: str) -> None:
    reply = spotless.create("web", guest(name))
    assert reply.ok and reply.result is not None, reply.error
    ident = reply.result["domain"]["uuid"]
    ended = spotless.toolstack.wait(ident, frozenset({DomainState.CRASHED}), PROMPT)
    assert ended is not None and ended.detail and "\n" not in ended.detail
    spotless.neighbour_answers()
    shown = spotless.client.call("show", {"uuid": ident}, timeout=WAIT).result
    assert shown is not None and shown["domain"]["state"] == "crashed"
    assert shown["domain"]["detail"] == ended.detail
    assert spotless.destroy(ident) < PROMPT


def test_a_guest_that_faults_without_a_handler_goes_by_itself_if_so_ordered(spotless: Node) -> None:
    reply = spotless.create("web", guest("triple"), on_crash="destroy")
    assert reply.ok and reply.result is not None, reply.error
    assert spotless.toolstack.wait(reply.result["domain"]["uuid"], frozenset(), PROMPT) is None


def test_a_guest_that_spins_with_events_masked_spins_alone(spotless: Node) -> None:
    reply = spotless.create("web", guest("spin"))
    assert reply.ok and reply.result is not None, reply.error
    ident = reply.result["domain"]["uuid"]
    until(lambda: b"spin: spinning" in spotless.toolstack.console_log(ident), "the guest to spin")
    spotless.neighbour_answers()
    asked = spotless.client.call("shutdown", {"uuid": ident, "wait_seconds": 0.2}, timeout=WAIT)
    assert asked.error is not None and asked.error["code"] == "domain.timeout"
    assert spotless.toolstack.get_domain(ident).state is DomainState.RUNNING
    assert spotless.destroy(ident) < PROMPT
