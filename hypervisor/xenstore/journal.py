"""xenstored's state on disk: a snapshot and the records since, in one file.

The first line is the JSON of `Server.save`, each further one a list of
records, one line per step of the server. When the records have outgrown the
snapshot a new file is begun. It is written a piece at each step, so that
however much guests have stored no step waits for all of it: first a snapshot without
nodes, then the nodes of that moment as records, then the steps since. A step is written before anything of
it is seen outside, with one ``write``, so the end of the process at any point
loses nothing that a client was told; the machine's end does not matter, for
it ends the domains too. A last line without its newline was never told
anybody and is left out.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.xenstore.errors import XenstoreError
from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.records import Record
from hypervisor.xenstore.server import STATE_VERSION, Server
from hypervisor.xenstore.store import Node, node_to_json

LOG = logging.getLogger(__name__)

COMPACT_AT = 1 << 20
"""Bytes of records after which a new snapshot is worth its time."""

NODES_PER_STEP = 32
"""Nodes that are written to the new file with each step."""

_MAX_FILE = 1 << 30


class StateDamaged(Exception):
    """The state file cannot be used; the message says where and what to do."""


class _NewFile:
    """The file that is to take the place of another, while it is written.

    :param nodes: those of the moment when it was begun; `since` the lines of the steps after that.
    """

    def __init__(self, path: Path, first: bytes, nodes: list[tuple[str, Node]]) -> None:
        self.path = path
        self.since: list[bytes] = []
        self.size = 0
        self._nodes = nodes
        self._at = 0
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._write(first)
        except OSError:
            self.give_up()
            raise

    def go_on(self) -> bool:
        """Write some more. :returns: whether all is written."""
        some = self._nodes[self._at : self._at + NODES_PER_STEP]
        self._at += len(some)
        if some:
            self._write(_line([["n", path, node_to_json(node)] for path, node in some]))
            return False
        for line in self.since:
            self._write(line)
        return True

    def give_up(self) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        _write_all(self.fd, data)
        self.size += len(data)


class FileJournal:
    """Writes one server's records; `server` is set once it exists."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._records_size = 0
        self._snapshot_size = 0
        self._behind = False
        self._next: _NewFile | None = None
        self.server: Server | None = None

    def append(self, records: list[Record]) -> None:
        """A disk that is full or broken stops nobody: the file is made anew as soon as that works again."""
        try:
            if self._behind:
                self.compact()
                LOG.info("xenstore state is being kept in %s again", self._path)
                return
            line = _line(records)
            _write_all(self._fd, line)
            self._records_size += len(line)
            if self._next is not None:
                self._next.since.append(line)
            self._renew()
        except OSError as exc:
            if not self._behind:
                LOG.error("xenstore state cannot be kept in %s until its disk is mended: %s", self._path, exc)
            self._behind = True

    def _renew(self) -> None:
        """Begin a new file when it is time, or go on with the one that is begun. The old one is good until the end."""
        try:
            if self._next is None:
                if self._records_size > max(COMPACT_AT, 2 * self._snapshot_size):
                    self._next = self._begin(nodes=False)
            elif self._next.go_on():
                self._finish(self._next)
        except OSError as exc:
            LOG.warning("xenstore state %s is not made smaller for now: %s", self._path, exc)
            self._give_up()
            self._records_size = 0

    def compact(self) -> None:
        """Replace the file at once by one with a new snapshot only."""
        self._give_up()
        self._finish(self._begin(nodes=True))

    def _begin(self, *, nodes: bool) -> _NewFile:
        """:param nodes: True for a snapshot that is complete."""
        assert self.server is not None
        rest = [] if nodes else self.server.store.snapshot()
        return _NewFile(self._path.with_name(self._path.name + ".new"), _line(self.server.save(nodes=nodes)), rest)

    def _finish(self, new: _NewFile) -> None:
        try:
            os.replace(new.path, self._path)
        except OSError:
            self._next = None
            new.give_up()
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = new.fd
        self._records_size = sum(map(len, new.since))
        self._snapshot_size = new.size - self._records_size
        self._next = None
        self._behind = False

    def _give_up(self) -> None:
        if self._next is not None:
            self._next.give_up()
            self._next = None

    def close(self) -> None:
        self._give_up()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_server(
    path: Path,
    limits: Limits | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """A server whose state is kept in the file `path`: restored from it, or new when there is none.

    :raises StateDamaged: the file is there and cannot be used.
    :raises OSError: it cannot be read or written.
    """
    state = load(path)
    journal = FileJournal(path)
    if state is None:
        server = Server(limits, clock=clock, journal=journal)
    else:
        try:
            server = Server.restore(state, limits, clock=clock, journal=journal)
        except (ValueError, KeyError, TypeError, AttributeError, XenstoreError) as exc:
            raise _damaged(path, f"its content makes no sense ({exc!r})") from exc
    journal.server = server
    journal.compact()
    return server


def load(path: Path) -> dict[str, Any] | None:
    """The state in a file, records applied; None when there is no file. :raises StateDamaged: it cannot be used."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise _damaged(path, "it is larger than 1 GiB")
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    lines.pop()  # what follows the last newline: nothing, or a torn record
    if not lines:
        raise _damaged(path, "it has no complete line")
    try:
        state: dict[str, Any] = json.loads(lines[0])
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise _damaged(path, "its first line is no snapshot of this version")
        for line in lines[1:]:
            replay(state, json.loads(line))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
        raise _damaged(path, f"a line of it makes no sense ({exc!r})") from exc
    return state


def replay(state: dict[str, Any], records: list[Record]) -> None:
    """Apply one step's records to the JSON form of a server's state."""
    for kind, key, *rest in records:
        if kind == "n":
            _replay_node(state["store"], key, rest[0])
        elif kind == "q":
            state.setdefault("quota", {})[key] = rest[0]
        elif kind == "d":
            state["domains"][str(key)] = _new_domain()
        elif kind == "r":
            state["domains"].pop(str(key), None)
        elif str(key) in state["domains"]:
            _replay_domain(state["domains"][str(key)], kind, rest)


def _replay_node(store: dict[str, Any], path: str, node: list[Any] | None) -> None:
    if node is None:
        store["nodes"].pop(path, None)
        store["generation"] += 1
    else:
        store["nodes"][path] = node
        store["generation"] = max(store["generation"], node[2])


def _new_domain() -> dict[str, Any]:
    return {
        "in": "",
        "out": [],
        "transactions": [],
        "next_transaction": 1,
        "target": None,
        "shutdown": False,
        "watches": [],
        "positions": None,
    }


def _replay_domain(domain: dict[str, Any], kind: str, rest: list[Any]) -> None:
    if kind == "i":
        domain["positions"] = [rest[0], (domain["positions"] or [0, 0])[1]]
        domain["in"] = rest[1]
    elif kind == "o":
        domain["out"].append(rest)
    elif kind == "p":
        domain["positions"] = rest
    elif kind == "w":
        domain["watches"].append(rest)
    elif kind == "u":
        domain["watches"] = [w for w in domain["watches"] if w[:2] != rest]
    elif kind == "W":
        domain["watches"] = []
    elif kind == "t":
        domain["transactions"].append(rest[0])
        domain["next_transaction"] = rest[0] % 0xFFFF_FFFF + 1
    elif kind == "e":
        domain["transactions"] = [t for t in domain["transactions"] if t != rest[0]]
    elif kind == "s":
        domain["shutdown"] = rest[0]
    elif kind == "g":
        domain["target"] = rest[0]
    elif kind == "R":
        domain.update({"in": "", "out": [], "transactions": [], "positions": [0, 0]})


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _damaged(path: Path, why: str) -> StateDamaged:
    return StateDamaged(
        f"xenstore state {path} cannot be used: {why}; "
        "end the domains of this host and move the file away to begin with an empty xenstore"
    )
