"""The control protocol: JSON lines over a UNIX socket. Pure: bytes in, values out.

::

    server: {"hello": {"protocol": [1, 1], "version": "0.1.0"}}
    client: {"id": 1, "verb": "hello", "args": {"protocol": [1, 1]}}
    client: {"id": 2, "verb": "domain.pause", "args": {"uuid": "…"}}
    server: {"id": 2, "result": null}
    server: {"id": 3, "error": {"code": "domain.not_found", "message": "…", "retryable": false}}
    server: {"event": {"kind": "crashed", "uuid": "…", "time": 1.0, "detail": ""}}

The first request is ``hello``. Answers come in the order in which work ends. After
the answer to ``console.attach`` the connection carries the guest's console as plain
bytes in both directions. ``docs/host-process.md`` lists the verbs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from hypervisor.errors import HostUnavailable, ProtocolError

VERSION = (1, 1)
"""Major: both sides must be equal. Minor: grows with what is added."""

REQUEST_MAX = 256 * 1024
"""Longest request line, bytes."""

ANSWER_MAX = 8 * 1024 * 1024
"""Longest line a client takes."""

CONSOLE_LOG_MAX = 2 * 1024 * 1024
"""Most console output given in one answer."""

SOCKET_NAME = "hypervisor.sock"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    id: int
    verb: str
    args: dict[str, Any]


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """:raises ProtocolError: not one JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"a line is not JSON ({str(exc)[:100]}): send one JSON object a line") from exc
    if not isinstance(message, dict):
        raise ProtocolError("a line is no JSON object: send one JSON object a line")
    return message


def decode_request(line: bytes) -> Request:
    """:raises ProtocolError: no request; it names the field."""
    message = decode(line)
    number, verb, args = message.get("id"), message.get("verb"), message.get("args", {})
    if not isinstance(number, int) or isinstance(number, bool):
        raise ProtocolError("id is missing or no number: give each request a number of its own")
    if not isinstance(verb, str):
        raise ProtocolError("verb is missing or no string: give a verb like domain.list")
    if not isinstance(args, dict):
        raise ProtocolError("args is no object: give the verb's arguments by name")
    return Request(number, verb, args)


def check_version(theirs: object) -> None:
    """:raises ProtocolError: another major version."""
    if not isinstance(theirs, (list, tuple)) or len(theirs) != 2 or theirs[0] != VERSION[0]:
        raise ProtocolError(
            f"protocol version {theirs!r} is not {VERSION[0]}.x: "
            "agent and host process are of different releases, upgrade the older one"
        )


def version() -> str:
    """The installed release."""
    try:
        return importlib.metadata.version("reeve")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def default_state_dir() -> Path:
    """``/var/lib/reeve/hypervisor`` for root, ``$XDG_STATE_HOME/reeve/hypervisor`` for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/reeve/hypervisor")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "reeve" / "hypervisor"


def default_socket() -> Path:
    """``/run/reeve/hypervisor.sock`` for root, ``$XDG_RUNTIME_DIR/reeve/hypervisor.sock`` for others."""
    if os.geteuid() == 0:
        return Path("/run/reeve") / SOCKET_NAME
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return (Path(runtime) / "reeve" if runtime else default_state_dir()) / SOCKET_NAME


def unavailable(socket: Path, why: object) -> HostUnavailable:
    return HostUnavailable(
        f"the host process does not answer at {socket} ({why}): start reeve-hypervisor or correct the socket's path"
    )
