"""One file from one URL into one temporary file: resumed when the connection breaks, bounded in size and time.

A download goes on where it was only if the server has the very same file: by ``If-Range`` with a strong validator
(RFC 9110), or because the source never changes one. Whatever was resumed, the hash of the whole decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from agent.conf_images import ImageSettings
from agent.errors import InstructionError
from agent.images.remote.source import HASHES
from agent.images.remote.transport import FAILURES, Transport, failed

LOG = logging.getLogger(__name__)

BLOCK = 16 << 10
_ROOM_EVERY = 16 << 20
_PAUSES = (0.1, 0.5, 2.0, 5.0)
_WORTH = 1 << 20  # a try that brought so much does not count as one
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_STATE = 4096
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be fetched, as far as it is known before.

    :ivar name: for messages. :ivar size: bytes, 0 when it is not known. :ivar hashes: algorithm to hexadecimal digits.
    :ivar headers: to send, secret. :ivar immutable: what the URL names never changes.
    """

    name: str
    url: str
    format: str
    size: int = 0
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    immutable: bool = False

    @property
    def proven(self) -> bool:
        """Whether a hash is known that nobody can imitate."""
        return any(algorithm in HASHES for algorithm in self.hashes)

    @property
    def identity(self) -> str:
        """The same for the same file, whoever wants it: what a temporary file is named after."""
        text = json.dumps([self.url, self.format, self.size, sorted(self.hashes.items())])
        return hashlib.sha256(text.encode()).hexdigest()


class Cancelled(Exception):
    """Nobody wants it any more."""


@dataclasses.dataclass(slots=True)
class Progress:
    """Written by the download, read by those who wait. Bytes; `total` 0 while it is not known."""

    done: int = 0
    total: int = 0
    received: int = 0


class Download:
    """:param path: of the temporary file; beside it lies what is known of the server's file.

    :param limit: most bytes it may have. :param room: makes sure that so many bytes more have room.
    :param end: by `time.monotonic`, when it has to be over. :param cancel: set when nobody wants it any more.
    """

    def __init__(
        self,
        wanted: Wanted,
        transport: Transport,
        path: Path,
        settings: ImageSettings,
        *,
        limit: int,
        room: Callable[[int], None],
        end: float,
        cancel: threading.Event,
        progress: Progress | None = None,
    ) -> None:
        self._wanted, self._transport, self._settings = wanted, transport, settings
        self._path, self._state = path, path.with_suffix(".json")
        self._limit, self._room, self._end, self._cancel = limit, room, end, cancel
        self.progress = progress or Progress()
        self._validator = ""
        self._roomed = 0
        self._hashers: dict[str, Any] = {}
        self._watched = (0.0, 0)
        self._file_size = 0
        self._resumed = False

    @property
    def validator(self) -> str:
        """Of the server's file: an entity tag or a date, "" for none."""
        return self._validator

    def run(self) -> dict[str, str]:
        """Fetch it all; the file is whole and on disk when this returns. Its hashes, by algorithm.

        :raises InstructionError: ``image.fetch_failed`` (may be retried), ``image.too_large``, ``image.invalid``,
            ``image.not_found``, ``image.source_refused``. :raises Cancelled. :raises OSError: of the temporary file.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._path, flags, 0o600), "r+b", buffering=0) as file:
            self._take_up(file)
            self._all(file)
            if self._resumed and self._wrong():
                # What lay there was not what it seemed to be: a crash of the machine, or a server that cheats.
                LOG.warning("%s: what was resumed does not fit: fetched from its beginning", self._wanted.name)
                self._restart(file, "")
                self._all(file)
            if wrong := self._wrong():
                discard(self._path)
                raise InstructionError("image.invalid", f"{self._wanted.name} {wrong}: give another source or hash")
            os.fsync(file.fileno())
        return self._hashes()

    def slow(self) -> str:
        """Why the connection should be cut now, "" when it should not. For another thread, to be asked often."""
        now = time.monotonic()
        if now > self._end:
            return "it takes too long"
        if self._transport.late():
            return "no answer in time"
        since, received = self._watched
        if not since or now - since < self._settings.stall_seconds:
            return ""
        if self.progress.received - received < self._settings.min_bytes_per_second * (now - since):
            return "too slow"
        self._watched = (now, self.progress.received)
        return ""

    def _take_up(self, file: Any) -> None:
        """Go on with what is there, if it is worth it."""
        size = os.fstat(file.fileno()).st_size
        try:
            with open(self._state, "rb") as state:
                known = json.loads(state.read(_STATE))
            self._validator, total = str(known["validator"]), int(known["total"])
        except (OSError, ValueError, KeyError, TypeError):
            size = total = 0
        # Without a hash nobody could tell whether a crash of the machine has left holes.
        fits = self._wanted.proven and (self._validator or self._wanted.immutable)
        if not size or not fits or size > self._limit or (total and size > total):
            self._restart(file, "")
            return
        self._rehash(file, size)
        self.progress.done, self.progress.total, self._resumed = size, total, True

    def _rehash(self, file: Any, size: int) -> None:
        self._fresh_hashers()
        file.seek(0)
        left = size
        while left:
            data = file.read(min(left, 1 << 20))
            if not data:
                raise OSError("the temporary file has become shorter")
            self._hash(data)
            left -= len(data)
            self._alive()
        self._file_size = size

    def _restart(self, file: Any, validator: str, total: int = 0) -> None:
        """From the beginning. In this order: a crash in between leaves an empty file and not another's beginning."""
        os.ftruncate(file.fileno(), 0)
        file.seek(0)
        self._fresh_hashers()
        self._file_size = self.progress.done = 0
        self._resumed = False
        self._validator, self.progress.total = validator, total
        work = self._state.with_suffix(".new")
        work.write_text(json.dumps({"validator": validator, "total": total}))
        os.replace(work, self._state)

    def _all(self, file: Any) -> None:
        tries = 0
        while True:
            before = self.progress.received
            try:
                if self._once(file):
                    return
                error = InstructionError("image.fetch_failed", f"{self._wanted.name}: cut off", retryable=True)
            except InstructionError as exc:
                if not exc.retryable:
                    raise
                error = exc
            self._alive()
            tries = 0 if self.progress.received - before >= _WORTH else tries + 1
            if tries > self._settings.retries:
                raise error
            LOG.info("%s, at %d bytes; trying again", error, self.progress.done)
            if self._cancel.wait(_PAUSES[min(tries, len(_PAUSES)) - 1 if tries else 0]):
                raise Cancelled

    def _once(self, file: Any) -> bool:
        """One request. Whether the file is whole now."""
        offset = self._file_size
        if offset and not (self._validator or self._wanted.immutable):
            self._restart(file, "")
            offset = 0
        if offset and offset == self.progress.total:
            return True
        headers = dict(self._wanted.headers)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self._validator:
                headers["If-Range"] = self._validator
        with self._transport.open(self._wanted.url, headers) as answer:
            self._begin(answer, file, offset)
            self._body(answer, file)
        return not self.progress.total or self._file_size == self.progress.total

    def _begin(self, answer: requests.Response, file: Any, offset: int) -> None:
        """Look at the headers of an answer, and make the file fit what comes."""
        status, name = answer.status_code, self._wanted.name
        if status == 416 and offset:
            self._restart(file, "")
            raise InstructionError("image.fetch_failed", f"{name}: it has become shorter", retryable=True)
        if status not in (200, 206):
            raise _refusal(name, status)
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            text = f"{name}: the server sends it encoded ({encoding[:40]}), which nobody asked for: correct the server"
            raise InstructionError("image.invalid", text)
        length = _number(answer.headers.get("Content-Length"))
        validator = _validator(answer.headers, proven=self._wanted.proven)
        if status == 206:
            part = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            first, last, total = (int(item) for item in part.groups()) if part else (-1, 0, 0)
            same = validator in ("", self._validator) and total in (self.progress.total or total,)
            if not offset or first != offset or last != total - 1 or not same:
                self._restart(file, "")
                raise InstructionError("image.fetch_failed", f"{name}: another part than was asked for", retryable=True)
            self.progress.total, self._resumed = total, True
        else:
            self._restart(file, validator, length)
            chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
            if not (length or chunked or self._wanted.proven or self._wanted.size):
                # The end of such a body looks like a connection that breaks.
                raise InstructionError("image.invalid", f"{name}: the server tells no length: give size or hash")
        self._check_total(self.progress.total)

    def _check_total(self, total: int) -> None:
        name, size = self._wanted.name, self._wanted.size
        if size and total and total != size:
            raise InstructionError("image.invalid", f"{name} has {total} bytes, not {size}: give another")
        if total > self._limit:
            raise too_large(name, self._limit)
        self._room(max(0, total - self._file_size))
        self._roomed = max(total, self._file_size)

    def _body(self, answer: requests.Response, file: Any) -> None:
        most = self.progress.total or self._wanted.size or self._limit
        self._watched = (time.monotonic(), self.progress.received)
        try:
            while True:
                self._alive()
                try:
                    data = answer.raw.read(BLOCK, decode_content=False)
                except FAILURES as exc:
                    self._alive()
                    raise failed(self._wanted.url, exc) from exc
                if not data and self._transport.broken:
                    raise InstructionError("image.fetch_failed", f"{self._wanted.name}: cut off", retryable=True)
                if not data:
                    return
                if self._file_size + len(data) > most:
                    if self.progress.total or self._wanted.size:
                        text = f"{self._wanted.name}: more than {most} bytes come: give another"
                        raise InstructionError("image.invalid", text)
                    raise too_large(self._wanted.name, self._limit)
                if self._file_size + len(data) > self._roomed:
                    self._room(_ROOM_EVERY)
                    self._roomed = self._file_size + _ROOM_EVERY
                _write(file, data)
                self._hash(data)
                self._file_size += len(data)
                self.progress.done = self._file_size
                self.progress.received += len(data)
        finally:
            self._watched = (0.0, 0)

    def _alive(self) -> None:
        if self._cancel.is_set():
            raise Cancelled
        if time.monotonic() > self._end:
            raise InstructionError(
                "image.fetch_failed",
                f"{self._wanted.name}: not within {self._settings.fetch_seconds:g} s: see [images] fetch_seconds",
            )

    def _fresh_hashers(self) -> None:
        names = {"sha256", *self._wanted.hashes}
        self._hashers = {name: hashlib.new(name, usedforsecurity=False) for name in sorted(names)}

    def _hash(self, data: bytes) -> None:
        for hasher in self._hashers.values():
            hasher.update(data)

    def _hashes(self) -> dict[str, str]:
        return {name: str(hasher.hexdigest()) for name, hasher in self._hashers.items()}

    def _wrong(self) -> str:
        """What does not fit what is wanted, "" for nothing."""
        if not self._file_size:
            return "is empty"
        if self._wanted.size and self._file_size != self._wanted.size:
            return f"has {self._file_size} bytes, not {self._wanted.size}"
        found = self._hashes()
        for name, value in self._wanted.hashes.items():
            if found[name] != value:
                return f"has {name} {found[name]}, not {value}"
        return ""


def discard(path: Path) -> None:
    """Remove a temporary file and what lies beside it."""
    for item in (path, path.with_suffix(".json"), path.with_suffix(".new")):
        with contextlib.suppress(FileNotFoundError):
            item.unlink()


def too_large(name: str, limit: int) -> InstructionError:
    text = f"{name} has more than {limit >> 20} MiB: see [images] max_image_mib and max_kernel_mib"
    return InstructionError("image.too_large", text)


def _refusal(name: str, status: int) -> InstructionError:
    if status in (404, 410):
        return InstructionError("image.not_found", f"{name} is not there (status {status}): give another URL")
    if status in (401, 403, 407):
        return InstructionError("image.auth_failed", f"{name}: refused by the server (status {status})")
    return InstructionError("image.fetch_failed", f"{name}: the server's status is {status}", status in _AGAIN)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else 0


def _validator(headers: Mapping[str, str], *, proven: bool) -> str:
    """What ``If-Range`` takes: a strong entity tag; a date only where a hash tells whether it was enough."""
    tag = headers.get("ETag", "")
    if tag.startswith('"') and tag.endswith('"') and 2 < len(tag) <= 512 and tag.isascii():
        return tag
    date = headers.get("Last-Modified", "")
    return date if proven and not tag and date.endswith(" GMT") and len(date) < 64 and date.isascii() else ""


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
