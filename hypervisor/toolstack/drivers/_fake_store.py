"""What the fake driver remembers: one SQLite database, in memory or shared by several processes.

Every change is one ``BEGIN IMMEDIATE`` transaction, so a process killed in the middle leaves either
all of a verb or none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

from hypervisor.errors import DomainNotFound, HostFailure, HostUnavailable
from hypervisor.toolstack.api import DomainEvent, DomainInfo, DomainSpec, DomainState, ShutdownReason
from hypervisor.toolstack.devices import DeviceState

LOG = logging.getLogger(__name__)

LOG_LIMIT = 256 * 1024  # bytes of console output kept for each domain
INPUT_LIMIT = 64 * 1024  # bytes typed but not yet read by a paused guest
EVENT_LIMIT = 1000
POLL_S = 0.02  # how often a waiting process looks for another process's changes

_SCHEMA = """
CREATE TABLE IF NOT EXISTS domains (uuid TEXT PRIMARY KEY, domid INTEGER NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE,
    doc TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS console (uuid TEXT PRIMARY KEY, log BLOB NOT NULL, total INTEGER NOT NULL,
    input BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, uuid TEXT, time REAL, detail TEXT);
CREATE TABLE IF NOT EXISTS faults (id INTEGER PRIMARY KEY AUTOINCREMENT, verb TEXT, doc TEXT);
CREATE TABLE IF NOT EXISTS host (key TEXT PRIMARY KEY, value INTEGER);
CREATE TABLE IF NOT EXISTS migrations (seq INTEGER PRIMARY KEY AUTOINCREMENT, ident TEXT NOT NULL UNIQUE,
    doc TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS templates (name TEXT PRIMARY KEY, doc TEXT NOT NULL);
"""


@dataclasses.dataclass(slots=True)
class FakeDomain:
    """One simulated domain.

    :ivar request: what control/shutdown holds: ``poweroff``, ``reboot`` or empty.
    :ivar boots: how often its kernel started.
    :ivar readable: False makes every look at it say ``UNKNOWN``.
    :ivar online: vCPUs online now, `wanted_vcpus` asked for, of `max_vcpus`.
    :ivar memory_mib: what it has, `target_mib` what it was asked to have, MiB.
    :ivar max_vcpus, max_memory_mib: of the present run; the spec may say otherwise for the next one.
    :ivar migration: ident of the migration in whose hands it is, or "".
    :ivar hidden: memory and names are set aside for it, it is not here yet.
    :ivar template: ident of the template on whose memory it runs, or "".
    :ivar devices: of each device (``disk:xvda``, ``nic:0``) its ``state``, ``size_bytes`` and ``stats``.
    """

    spec: DomainSpec
    domid: int
    state: DomainState = DomainState.PAUSED
    shutdown_reason: ShutdownReason | None = None
    created_at: float = 0.0
    detail: str = ""
    request: str = ""
    boots: int = 0
    readable: bool = True
    cpu_time_ns: int = 0
    online: int = 0
    wanted_vcpus: int = 0
    memory_mib: int = 0
    target_mib: int = 0
    max_vcpus: int = 0
    max_memory_mib: int = 0
    devices: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    migration: str = ""
    hidden: bool = False
    template: str = ""

    def __post_init__(self) -> None:
        if not self.max_vcpus:
            self.begin_run()

    def begin_run(self) -> None:
        """What the spec says counts from now on."""
        spec = self.spec
        self.template = ""
        self.online = self.wanted_vcpus = spec.vcpus
        self.max_vcpus = spec.effective_max_vcpus
        self.memory_mib = self.target_mib = spec.memory_mib
        self.max_memory_mib = spec.effective_max_memory_mib
        for device in self.devices.values():
            device.update(state=DeviceState.CONNECTING)

    @property
    def held_mib(self) -> int:
        """Memory of the host that is its own: a guest may take what it was granted at any time."""
        return max(self.memory_mib, self.target_mib)

    @property
    def uuid(self) -> str:
        return self.spec.uuid

    @property
    def ended(self) -> bool:
        return self.state in (DomainState.SHUTDOWN, DomainState.CRASHED)

    def info(self) -> DomainInfo:
        return DomainInfo(
            uuid=self.spec.uuid,
            name=self.spec.name,
            domid=self.domid,
            state=self.state if self.readable else DomainState.UNKNOWN,
            vcpus=self.online,
            memory_mib=self.memory_mib,
            owner=self.spec.owner,
            type=self.spec.type,
            cpu_time_ns=self.cpu_time_ns,
            shutdown_reason=self.shutdown_reason if self.readable else None,
            created_at=self.created_at,
            detail=self.detail,
            metadata=self.spec.metadata,
            max_vcpus=self.max_vcpus,
            memory_target_mib=self.target_mib,
            max_memory_mib=self.max_memory_mib,
        )

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["spec"] = self.spec.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FakeDomain:
        fields = dict(data)
        fields["spec"] = DomainSpec.from_json(fields["spec"])
        fields["state"] = DomainState(fields["state"])
        reason = fields["shutdown_reason"]
        fields["shutdown_reason"] = ShutdownReason(reason) if reason else None
        return cls(**fields)


class Store:
    """The database and the condition that tells waiters of changes. All methods may be called from any thread."""

    def __init__(self, state_dir: str | None, memory_mib: int = 0, first_domid: int = 1) -> None:
        self.memory_mib = memory_mib  # of the host
        self.shared = state_dir is not None
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self._depth = 0
        try:
            if state_dir is not None:
                os.makedirs(state_dir, mode=0o700, exist_ok=True)
            path = os.path.join(state_dir, "fake.sqlite") if state_dir is not None else ":memory:"
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            # It outlives its processes, not a power failure: nothing in it is real.
            self._db.execute("PRAGMA synchronous=OFF")
            with self.transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT OR IGNORE INTO host VALUES ('next_domid', ?)", (first_domid,))
        except (OSError, sqlite3.Error) as exc:
            raise HostUnavailable(f"fake driver: state directory {state_dir!r} is not usable: {exc}") from exc

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside happens or nothing does. Nests."""
        with self.changed:
            self._check_open()
            if self._depth:
                yield
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._depth = 1
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
                self.changed.notify_all()
            except sqlite3.Error as exc:
                raise HostFailure(f"fake driver: its database failed: {exc}") from exc
            finally:
                self._depth = 0

    def wait_change(self, timeout: float | None) -> None:
        """Sleep until something may have changed, at most `timeout` seconds. Call with ``changed`` held."""
        if self.shared:
            timeout = POLL_S if timeout is None else min(POLL_S, timeout)
        self.changed.wait(timeout)

    def close(self) -> None:
        with self.changed:
            if not self.closed:
                self.closed = True
                self._db.close()
                self.changed.notify_all()

    def _check_open(self) -> None:
        if self.closed:
            raise HostUnavailable("fake driver: this connection is closed: make a new one")

    def _rows(self, sql: str, args: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self.changed:
            self._check_open()
            try:
                return self._db.execute(sql, args).fetchall()
            except sqlite3.Error as exc:
                raise HostFailure(f"fake driver: its database failed: {exc}") from exc

    # domains

    def domains(self) -> list[FakeDomain]:
        """Those that are hidden too."""
        return [
            FakeDomain.from_json(json.loads(doc)) for (doc,) in self._rows("SELECT doc FROM domains ORDER BY domid")
        ]

    def find(self, uuid: str) -> FakeDomain | None:
        """Not one that is hidden."""
        rows = self._rows("SELECT doc FROM domains WHERE uuid = ?", (uuid,))
        found = FakeDomain.from_json(json.loads(rows[0][0])) if rows else None
        return None if found is None or found.hidden else found

    def get(self, uuid: str) -> FakeDomain:
        domain = self.find(uuid)
        if domain is None:
            raise DomainNotFound(f"no domain {uuid} on this host: list the domains to see which there are")
        return domain

    def free_mib(self, without: FakeDomain | None = None) -> int:
        """Memory of the host that no domain holds; `without` is not counted."""
        held = sum(domain.held_mib for domain in self.domains() if without is None or domain.uuid != without.uuid)
        return self.memory_mib - held

    def put(self, domain: FakeDomain) -> None:
        doc = json.dumps(domain.to_json())
        self._rows(
            "INSERT INTO domains VALUES (?, ?, ?, ?) ON CONFLICT (uuid) DO UPDATE SET domid = excluded.domid,"
            " doc = excluded.doc",
            (domain.uuid, domain.domid, domain.spec.name, doc),
        )
        self._rows("INSERT OR IGNORE INTO console VALUES (?, x'', 0, x'')", (domain.uuid,))

    def delete(self, uuid: str) -> None:
        self._rows("DELETE FROM domains WHERE uuid = ?", (uuid,))
        self._rows("DELETE FROM console WHERE uuid = ?", (uuid,))

    def next_domid(self) -> int:
        """One that no domain has: those that moved here brought their own."""
        used = {int(domid) for (domid,) in self._rows("SELECT domid FROM domains")}
        ((value,),) = self._rows("SELECT value FROM host WHERE key = 'next_domid'")
        domid = next(number for number in itertools.count(int(value)) if number not in used)
        self._rows("UPDATE host SET value = ? WHERE key = 'next_domid'", (domid + 1,))
        return domid

    # migrations

    def migrations(self) -> list[dict[str, Any]]:
        """Their documents, oldest first."""
        return [dict(json.loads(doc)) for (doc,) in self._rows("SELECT doc FROM migrations ORDER BY seq")]

    def migration(self, ident: str) -> dict[str, Any] | None:
        rows = self._rows("SELECT doc FROM migrations WHERE ident = ?", (ident,))
        return dict(json.loads(rows[0][0])) if rows else None

    def put_migration(self, ident: str, doc: dict[str, Any]) -> None:
        self._rows(
            "INSERT INTO migrations (ident, doc) VALUES (?, ?) ON CONFLICT (ident) DO UPDATE SET doc = excluded.doc",
            (ident, json.dumps(doc)),
        )

    def forget_migration(self, ident: str) -> None:
        self._rows("DELETE FROM migrations WHERE ident = ?", (ident,))

    # console

    def templates(self) -> list[dict[str, Any]]:
        """By name."""
        return [json.loads(doc) for (doc,) in self._rows("SELECT doc FROM templates ORDER BY name")]

    def template(self, name: str) -> dict[str, Any] | None:
        found = self._rows("SELECT doc FROM templates WHERE name = ?", (name,))
        return json.loads(found[0][0]) if found else None

    def put_template(self, name: str, doc: dict[str, Any]) -> None:
        self._rows("INSERT INTO templates VALUES (?, ?)", (name, json.dumps(doc)))

    def forget_template(self, name: str) -> None:
        self._rows("DELETE FROM templates WHERE name = ?", (name,))

    def console(self, uuid: str) -> tuple[bytes, int] | None:
        """The kept output and how many bytes were ever printed; None when the domain is gone."""
        rows = self._rows("SELECT log, total FROM console WHERE uuid = ?", (uuid,))
        return (bytes(rows[0][0]), int(rows[0][1])) if rows else None

    def set_console(self, uuid: str, log: bytes, total: int) -> None:
        self._rows("UPDATE console SET log = ?, total = ? WHERE uuid = ?", (log, total, uuid))

    def print(self, uuid: str, data: bytes) -> None:
        kept = self.console(uuid)
        if kept is not None:
            log, total = kept
            self._rows(
                "UPDATE console SET log = ?, total = ? WHERE uuid = ?",
                ((log + data)[-LOG_LIMIT:], total + len(data), uuid),
            )

    def typed_input(self, uuid: str) -> bytes:
        rows = self._rows("SELECT input FROM console WHERE uuid = ?", (uuid,))
        return bytes(rows[0][0]) if rows else b""

    def set_input(self, uuid: str, data: bytes) -> None:
        self._rows("UPDATE console SET input = ? WHERE uuid = ?", (data[:INPUT_LIMIT], uuid))

    # events

    def emit(self, kind: str, uuid: str, detail: str = "") -> None:
        self._rows(
            "INSERT INTO events (kind, uuid, time, detail) VALUES (?, ?, ?, ?)", (kind, uuid, time.time(), detail)
        )
        self._rows("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (EVENT_LIMIT,))

    def last_event(self) -> int:
        ((last,),) = self._rows("SELECT COALESCE(MAX(id), 0) FROM events")
        return int(last)

    def events_after(self, last: int) -> list[tuple[int, DomainEvent]]:
        rows = self._rows("SELECT id, kind, uuid, time, detail FROM events WHERE id > ? ORDER BY id", (last,))
        return [(int(row[0]), DomainEvent(kind=row[1], uuid=row[2], time=row[3], detail=row[4])) for row in rows]

    # injected faults

    def add_fault(self, verb: str, doc: dict[str, Any]) -> None:
        self._rows("INSERT INTO faults (verb, doc) VALUES (?, ?)", (verb, json.dumps(doc)))

    def take_faults(self, verb: str, when: str) -> list[dict[str, Any]]:
        """The faults due at this point; each is counted down and dropped when used up. A link is no verb."""
        due = []
        others = "" if verb.startswith("link:") else "*"
        with self.transaction():
            for ident, text in self._rows(
                "SELECT id, doc FROM faults WHERE verb IN (?, ?) ORDER BY id", (verb, others)
            ):
                doc = json.loads(text)
                if doc["when"] != when:
                    continue
                due.append(doc)
                doc["times"] -= 1
                if doc["times"] <= 0:
                    self._rows("DELETE FROM faults WHERE id = ?", (ident,))
                else:
                    self._rows("UPDATE faults SET doc = ? WHERE id = ?", (json.dumps(doc), ident))
        return due

    def clear_faults(self) -> None:
        self._rows("DELETE FROM faults")
