"""Fetched images on disk: whole, known by their content, limited in size, the least recently used given up first.

::

    <cache_dir>/<sha256>.<format>         an image, read-only
    <cache_dir>/<sha256>.<format>.json    what is known of it
    <cache_dir>/partial/<identity>.part   a download; .json beside it: what is known of the server's file
    <cache_dir>/lock, partial/lock-<xxx>  locks of processes: the agent's and those of `reeve image`

An image is there if its first file is: that one comes by rename, last, and goes first, so that a crash at any moment
leaves an image or none. Its second file may be alone; `Cache.prepare` removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from agent.durable import private, sync
from agent.errors import ConfigError, InstructionError
from agent.images.remote.download import discard

LOG = logging.getLogger(__name__)

LEASE_SECONDS = 86400.0
"""A lease older than that has lost its instruction."""
_NAME = re.compile(r"([0-9a-f]{64})\.(raw|qcow2|kernel|ramdisk)")
_MAX_STATE = 1 << 20


@dataclasses.dataclass(slots=True)
class Entry:
    """:ivar key: of the file, ``<sha256>.<format>``. :ivar size: bytes, `disk_size` of the disk within.

    :ivar hashes: algorithm to digits, those that were looked at. :ivar sources: where it came from, and the server's
        validator then. :ivar created: seconds since the epoch, like `used`. :ivar pinned: by the operator.
    :ivar leases: instructions that are about to use it, and since when.
    """

    key: str
    size: int
    disk_size: int
    hashes: dict[str, str]
    sources: dict[str, str]
    created: float
    used: float
    pinned: bool = False
    leases: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> str:
        return self.key.rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, key: str, data: Any) -> Entry:
        """:raises ValueError, TypeError, KeyError: damaged."""
        made = cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})
        good = made.key == key and type(made.size) is int and type(made.disk_size) is int and made.size > 0
        tables = all(isinstance(item, dict) for item in (made.hashes, made.sources, made.leases))
        if not good or not tables or made.hashes.get("sha256") != key[:64]:
            raise ValueError(key)
        made.created, made.used = float(made.created), float(made.used)
        made.leases = {str(name): float(since) for name, since in made.leases.items()}
        return made


class Cache:
    """For any thread, and for several processes.

    :param limit: bytes. :param in_use: keys of the images that domains' disks lie on; asked with the lock held.
    """

    def __init__(self, folder: Path, limit: int, in_use: Callable[[], Set[str]]) -> None:
        self.folder = folder
        self.partial = folder / "partial"
        self._limit = limit
        self._in_use = in_use
        self._promised: dict[str, int] = {}  # of downloads of this process: what they will come to

    def prepare(self, keep_partial_seconds: float) -> None:
        """Make the folders; remove what a crash has left and what nobody has resumed for so long.

        :raises ConfigError: the folders cannot be made.
        """
        try:
            self.partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.locked():
                self._clean(keep_partial_seconds)
        except OSError as exc:
            raise ConfigError(
                f"the folder of fetched images {self.folder} cannot be used ({exc.strerror}): set [images] cache_dir"
            ) from exc

    def path(self, key: str) -> Path:
        return self.folder / key

    def list(self) -> list[Entry]:
        """The images, by key; damaged ones are left out, and told in the log."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.folder)):
                if _NAME.fullmatch(name) and (entry := self._read(name)) is not None:
                    found.append(entry)
        return found

    def get(self, key: str) -> Entry | None:
        return self._read(key) if _NAME.fullmatch(key) else None

    def find(self, image_format: str, hashes: Mapping[str, str]) -> Entry | None:
        """An image with that format and one of those hashes (and none of them different)."""
        for entry in self.list():
            known = {name: entry.hashes[name] for name in hashes if name in entry.hashes}
            if entry.format == image_format and known and all(hashes[name] == value for name, value in known.items()):
                return entry
        return None

    def find_source(self, image_format: str, url: str) -> tuple[Entry, str] | None:
        """The latest image that came from there, and the validator it had."""
        found = [item for item in self.list() if item.format == image_format and item.sources.get(url)]
        if not found:
            return None
        latest = max(found, key=lambda item: item.created)
        return latest, latest.sources[url]

    def add(self, part: Path, entry: Entry) -> Entry:
        """Take a whole, checked file in; it is gone from `part`. :raises OSError."""
        path = self.path(entry.key)
        with self.locked():
            known = self._read(entry.key)
            if known is not None:
                known.hashes.update(entry.hashes)
                known.sources.update(entry.sources)
                self._write(known)
                discard(part)
                return known
            os.chmod(part, 0o400)
            self._write(entry)
            os.rename(part, path)
            sync(self.folder)
            discard(part)
        return entry

    def lease(self, key: str, holder: str) -> Entry | None:
        """Keep an image until `release`, and count it as used now; None when it is gone. `holder` "" keeps nothing."""
        with self.locked():
            entry = self._read(key)
            if entry is None:
                return None
            entry.used = time.time()
            if holder:
                entry.leases[holder] = entry.used
            self._write(entry)
            return entry

    def release(self, holder: str) -> None:
        with self.locked():
            for entry in self.list():
                if entry.leases.pop(holder, None) is not None:
                    self._write(entry)

    def pin(self, key: str, pinned: bool) -> Entry:
        """By the operator. :raises InstructionError: ``image.not_found``."""
        with self.locked():
            entry = self._known(key)
            entry.pinned = pinned
            self._write(entry)
            return entry

    def evict(self, key: str) -> Entry:
        """:raises InstructionError: ``image.not_found``, ``image.in_use``."""
        with self.locked():
            entry = self._known(key)
            if why := self.held(entry, self._in_use()):
                raise InstructionError("image.in_use", f"image {key} is {why}: it stays")
            self._remove(entry)
            return entry

    def room(self, more: int, beside: Path) -> None:
        """Give images up until so many bytes more have room, and keep it until `no_more`.

        :param beside: the temporary file that will grow by so much.
        :raises InstructionError: ``image.no_room``: the rest is pinned or in use, or the disk is full.
        """
        with self.locked():
            entries, in_use = self.list(), self._in_use()
            self._promised[beside.name] = _size(beside) + more
            parts = {beside, *self.partial.glob("*.part")}
            total = sum(entry.size for entry in entries) + sum(self._part(path) for path in parts)
            idle = sorted((item for item in entries if not self.held(item, in_use)), key=lambda item: item.used)
            spare = sum(entry.size for entry in idle)
            if total - spare > self._limit or self._free() + spare < more:
                total -= self._drop_partial()
            if total - spare > self._limit or self._free() + spare < more:
                raise InstructionError(
                    "image.no_room",
                    f"{self.folder} has no room for {(more >> 20) + 1} MiB more: what is there is in use or "
                    "pinned: free disk space, see [images] cache_max_mib and `reeve image list --fetched`",
                    retryable=True,
                )
            while idle and (total > self._limit or self._free() < more):
                entry = idle.pop(0)
                total -= entry.size
                self._remove(entry)
                LOG.info("image %s given up: the least recently used, and %s needs room", entry.key, beside.name)

    def no_more(self, part: Path) -> None:
        """A download is over: the room that was kept for the rest of it is free."""
        self._promised.pop(part.name, None)

    def held(self, entry: Entry, in_use: Set[str]) -> str:
        """Why an image must stay, "" when it need not."""
        if entry.pinned:
            return "pinned"
        if entry.key in in_use:
            return "in use by a domain's disk"
        now = time.time()
        if any(now - since < LEASE_SECONDS for since in entry.leases.values()):
            return "about to be used by an instruction"
        return ""

    def in_use(self) -> Set[str]:
        return self._in_use()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the folder, for a moment. Not for one thread twice."""
        with open(self.folder / "lock", "a", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _part(self, path: Path) -> int:
        return max(_size(path), self._promised.get(path.name, 0))

    def _drop_partial(self) -> int:
        """Remove downloads that nobody is at; how many bytes they had."""
        dropped = 0
        for path in self.partial.glob("*.part"):
            if path.name not in self._promised and (lock := self.try_download(path.name)) is not None:
                with lock:
                    dropped += _size(path)
                    discard(path)
        return dropped

    def _free(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def _known(self, key: str) -> Entry:
        entry = self.get(key)
        if entry is None:
            raise InstructionError("image.not_found", f"no fetched image {key}: see `reeve image list --fetched`")
        return entry

    def _read(self, key: str) -> Entry | None:
        try:
            size = os.stat(self.path(key), follow_symlinks=False).st_size
            with open(self._state(key), "rb") as file:
                entry = Entry.from_json(key, json.loads(file.read(_MAX_STATE)))
            if entry.size != size:
                raise ValueError(f"{size} bytes")
            return entry
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            LOG.warning("fetched image %s is damaged and not used: %s", key, exc)
            return None

    def _write(self, entry: Entry) -> None:
        path = self._state(entry.key)
        work = path.with_suffix(".new")
        with open(work, "w", encoding="utf-8", opener=private) as file:
            json.dump(entry.to_json(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)

    def _remove(self, entry: Entry) -> None:
        self.path(entry.key).unlink(missing_ok=True)
        self._state(entry.key).unlink(missing_ok=True)

    def _state(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _clean(self, keep: float) -> None:
        for path in [*self.folder.glob("*.new"), *self.partial.glob("*.new")]:
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.json"):
            if not self.path(path.name.removesuffix(".json")).exists():
                path.unlink(missing_ok=True)
        for path in [*self.partial.glob("*.part"), *self.partial.glob("*.json")]:
            with contextlib.suppress(FileNotFoundError):
                if 0 <= time.time() - path.stat().st_mtime < keep and path.with_suffix(".part").exists():
                    continue
                if (lock := self.try_download(path.name)) is not None:
                    with lock:
                        discard(path.with_suffix(".part"))

    def try_download(self, identity: str) -> Any:
        """The lock of a download, across processes; None while another has it. Closing it frees it."""
        file = open(self.partial / f"lock-{identity[:3]}", "a", opener=private)  # noqa: SIM115 - held by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
