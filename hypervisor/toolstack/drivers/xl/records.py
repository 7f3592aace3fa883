"""What the driver keeps on disk of each domain it made: its spec, by UUID. A domid is never stored."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypervisor.errors import DomainNotFound, HostFailure, SpecInvalid
from hypervisor.toolstack.api import DomainSpec

MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """:ivar spec: what it is built from when it starts next; `run` what the present run was built from.

    :ivar made: it was marked; False: being made, or its maker died in between.
    :ivar again: it is being ended and made anew, or who did that died in between.
    :ivar log_start: bytes of xenconsoled's log, which goes by name, that are of an earlier domain.
    :ivar created_at: seconds since the epoch.
    """

    spec: DomainSpec
    run: DomainSpec
    created_at: float
    made: bool = False
    again: bool = False
    log_start: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_json(),
            "run": self.run.to_json(),
            "created_at": self.created_at,
            "made": self.made,
            "again": self.again,
            "log_start": self.log_start,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        specs = DomainSpec.from_json(data["spec"]), DomainSpec.from_json(data["run"])
        return cls(*specs, data["created_at"], data["made"], data["again"], data["log_start"])


class Records:
    """:param folder: made when it is missing, 0700; one for each host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise HostFailure(f"state folder {folder}: {exc.strerror}: make it, owned by this user") from exc

    def ident(self) -> str:
        """Tells this folder from every other: what is kept on disk goes with it, also into a backup."""
        path = self.folder / "ident"
        with self.lock():
            if not path.exists():
                self._write(path, str(uuid_module.uuid4()))
            return path.read_text()[:36]

    @contextlib.contextmanager
    def lock(self, name: str = "host", *, wait: bool = True) -> Iterator[None]:
        """Only one process and thread is inside; ends with the process that holds it.

        :raises DomainNotFound: the name is neither ``host`` nor a UUID. :raises BlockingIOError: not without waiting.
        """
        path = self.folder / "host.lock" if name == "host" else self._path(name).with_suffix(".lock")
        file = _locked(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            if name != "host" and not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
            os.close(file)

    def find(self, uuid: str) -> Record | None:
        """:raises HostFailure: it is there and cannot be read: nothing is concluded from that."""
        path = self._path(uuid)
        try:
            with path.open("rb") as file:
                return Record.from_json(json.loads(file.read(MAX_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SpecInvalid) as exc:
            raise HostFailure(f"record {path} cannot be read ({str(exc)[:80]}): restore it from a backup") from exc

    def uuids(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def put(self, record: Record) -> None:
        """Durable when it returns. :raises HostFailure: it cannot be written; what was there before is there still."""
        self._write(self._path(record.spec.uuid), json.dumps(record.to_json()))

    def delete(self, uuid: str) -> None:
        for suffix in (".json", ".cfg"):
            self._path(uuid).with_suffix(suffix).unlink(missing_ok=True)

    def config(self, uuid: str, text: str) -> Path:
        """The file for ``xl create``. :raises HostFailure: as `put`."""
        path = self._path(uuid).with_suffix(".cfg")
        self._write(path, text)
        return path

    def _write(self, path: Path, text: str) -> None:
        new = path.with_suffix(".new")
        try:
            with new.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as exc:
            new.unlink(missing_ok=True)
            raise HostFailure(f"{path} cannot be written: {exc.strerror}: free space or correct its rights") from exc

    def _path(self, uuid: str) -> Path:
        try:
            return self.folder / f"{uuid_module.UUID(uuid)}.json"
        except (ValueError, AttributeError, TypeError):
            raise DomainNotFound(f"no domain {uuid!r} on this host: that is no UUID") from None


def _locked(path: Path, how: int) -> int:
    """The descriptor of a lock file that was there after it had been locked: its last user may have removed it."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise HostFailure(f"lock {path}: {exc.strerror}: free space or correct its rights") from exc
        try:
            fcntl.flock(file, how)
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
