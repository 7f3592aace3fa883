"""Two host processes on one machine, and a domain that goes back and forth between them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from authority import Authority
from host_rig import HostRig, alive, kill_process, until

from hypervisor.errors import MigrationNotFound, ToolstackError, WrongState
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainState, MigrationMode, MigrationOptions, MigrationPhase, MigrationStatus
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

Phase = MigrationPhase
HERE, THERE = "owner-here", "owner-there"


class Move:
    """One migration, asked for as agents do."""

    mode = MigrationMode.LIVE

    def __init__(self, pair: Pair, domain: str, source: int, **options: Any) -> None:
        self.pair, self.domain = pair, domain
        self.ident, self.token = str(uuid.uuid4()), secrets.token_hex(16)
        self.source, self.target = pair.rigs[source], pair.rigs[1 - source]
        self.options = MigrationOptions(**options)

    def prepare(self) -> Any:
        offer = self.here.migration_offer(self.domain)
        return self.there.migration_prepare(
            offer, ident=self.ident, token=self.token, owner=THERE, mode=self.mode, peer="here"
        )

    def start(self) -> Move:
        ticket = self.prepare()
        self.here.migration_start(
            self.domain, ident=self.ident, token=self.token, ticket=ticket, options=self.options, peer="there"
        )
        return self

    @property
    def here(self) -> EmbeddedToolstack:
        return self.pair.toolstack(self.source)

    @property
    def there(self) -> EmbeddedToolstack:
        return self.pair.toolstack(self.target)

    def status(self, toolstack: EmbeddedToolstack) -> MigrationStatus | None:
        with contextlib.suppress(MigrationNotFound):
            return toolstack.migration_status(self.ident)
        return None

    def ended(self, toolstack: EmbeddedToolstack, timeout: float = 30.0) -> MigrationStatus:
        until(lambda: (s := self.status(toolstack)) is not None and s.phase.ended, "the migration to end", timeout)
        status = self.status(toolstack)
        assert status is not None
        return status

    def moved(self) -> MigrationStatus:
        status = self.ended(self.here)
        assert status.phase is Phase.MOVED, status
        there = self.ended(self.there)
        assert there.phase is Phase.RUNNING, there
        return status

    def settle(self) -> tuple[Phase, Phase | None]:
        """As the source's agent does: its record is the truth. :returns: both phases then."""
        here = self.ended(self.here).phase
        kept = here is Phase.KEPT
        there = self.status(self.there)
        if there is not None and not there.phase.ended:
            until(lambda: self.settled(kept), "the target to be settled", 60)
            there = self.status(self.there)
        return here, there.phase if there is not None else None

    def settled(self, kept: bool) -> bool:
        there = self.status(self.there)
        if there is None or there.phase.ended:
            return True
        if there.phase is Phase.COMPLETE:
            with contextlib.suppress(ToolstackError):
                self.there.migration_resolve(self.ident, keep=not kept)
        elif kept:
            with contextlib.suppress(ToolstackError):
                self.there.migration_cancel(self.ident)
        return False

    def forget(self) -> None:
        for toolstack in (self.here, self.there):
            toolstack.migration_forget(self.ident)


class Standby(Move):
    """A domain of one host with a copy on the other."""

    mode = MigrationMode.STANDBY

    def epochs(self, more: int = 3) -> int:
        """Wait for so many further ones."""
        before = self.there.migration_status(self.ident).epochs
        until(lambda: self.there.migration_status(self.ident).epochs >= before + more, "epochs", 60)
        return before + more

    def complete(self) -> None:
        until(lambda: self.there.migration_status(self.ident).phase is Phase.COMPLETE, "the target to be alone", 60)


def dies(move: Standby) -> None:
    """The source's machine, as far as a test can do that."""
    pid = move.source.process_of(move.domain)
    move.source.kill()
    kill_process(pid)


class Pair:
    """:param options: of both host processes."""

    def __init__(self, folder: Path, **options: object) -> None:
        authority = Authority(folder)
        self.rigs: list[HostRig] = []
        self._connections: dict[int, tuple[int, EmbeddedToolstack]] = {}
        for name in ("a", "b"):
            tls = authority.host(name)
            files = {
                "migration_ca": tls.ca,
                "migration_certificate": tls.certificate,
                "migration_key": tls.key,
            }
            values = {"memory_mib": 1024, "networks": "default internal", **files, **options}
            self.rigs.append(HostRig(folder / name, runtime=REAL_RUNTIME, **values))  # type: ignore[arg-type]

    def start(self) -> Pair:
        for rig in self.rigs:
            rig.start()
        return self

    def stop(self) -> None:
        for rig in self.rigs:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                rig.go_on()
            rig.stop()

    def toolstack(self, rig: HostRig) -> EmbeddedToolstack:
        """A connection, a new one after the host process was replaced."""
        number = self.rigs.index(rig)
        pid, toolstack = self._connections.get(number, (0, None))
        if pid != rig.pid or toolstack is None:
            if toolstack is not None:
                toolstack.close()
            toolstack = rig.connect()
            self._connections[number] = (rig.pid, toolstack)
        return toolstack

    def clear(self) -> None:
        """After a test: end what it left, and see that nothing of it is left on either host."""
        for rig in self.rigs:
            rig.trap_file.unlink(missing_ok=True)
            toolstack = self.toolstack(rig)
            for status in toolstack.migration_list():
                with contextlib.suppress(WrongState):
                    toolstack.migration_cancel(status.ident)
                with contextlib.suppress(WrongState):
                    toolstack.migration_resolve(status.ident, keep=False)
                until(lambda i=status.ident, t=toolstack: t.migration_status(i).phase.ended, "its end")
                toolstack.migration_forget(status.ident)
            for info in toolstack.list_domains():
                toolstack.destroy(info.uuid)
            assert toolstack.host_info().memory_free_mib == toolstack.host_info().memory_total_mib
            assert rig.left_behind() == []
            until(lambda r=rig: not processes(r, "mover"), "movers to end")

    def places(self, domain: str) -> dict[int, DomainState]:
        """Where it is."""
        found = {}
        for number, rig in enumerate(self.rigs):
            for info in self.toolstack(rig).list_domains():
                if info.uuid == domain:
                    found[number] = info.state
        return found


@contextlib.contextmanager
def moving_pair(folder: Path, **options: object) -> Iterator[Pair]:
    pair = Pair(folder, **options)
    try:
        yield pair.start()
    finally:
        pair.stop()


def processes(rig: HostRig, kind: str) -> list[int]:
    """Its children of a kind: ``dom``, ``disk``, ``nic``, ``mover``; by the names that they give themselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if not (path / "comm").read_text().startswith(f"reeve-{kind}"):
                continue
            if belongs(int(path.name), rig):
                found.append(int(path.name))
    return found


def belongs(pid: int, rig: HostRig) -> bool:
    """Whether it descends from the rig's host process."""
    while pid > 1:
        if pid == rig.pid:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        until(lambda pid=pid: not alive(pid), f"process {pid} to be gone")


Check = Callable[[], bool]


def is_whole(pair: Pair, domain: str) -> None:
    """A guest `memtouch` runs in one place, and everything it wrote is there."""
    places = pair.places(domain)
    assert list(places.values()) == [DomainState.RUNNING], places
    toolstack = pair.toolstack(pair.rigs[next(iter(places))])
    toolstack.shutdown(domain)
    until(lambda: b"pages wrong" in toolstack.console_log(domain), "what the guest says of its memory", 60)
    said = toolstack.console_log(domain)
    assert re.search(rb"memtouch: OK, 0 pages wrong", said), said[-300:]
