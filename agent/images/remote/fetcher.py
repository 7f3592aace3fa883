"""Fetching an image once, for all who want it at the same time.

Each download runs in a thread of its own; those who want it wait, and see to it that it does not hang. When the last
of them leaves, it is cut off; what has come stays and is resumed by the next one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from agent.conf_images import ImageSettings
from agent.errors import AgentError, InstructionError
from agent.images.remote.cache import Cache, Entry
from agent.images.remote.content import inspect
from agent.images.remote.disks import Disks
from agent.images.remote.download import Cancelled, Download, Progress, Wanted, discard
from agent.images.remote.glance import Glance
from agent.images.remote.policy import Policy
from agent.images.remote.source import Source
from agent.images.remote.transport import Transport

LOG = logging.getLogger(__name__)

_TURN = 0.05

Waiter = Callable[[Callable[[float], object]], object]
"""Calls what it is given again and again, with short waits, until it returns something true; may give up."""


class Fetcher:
    """The fetched images of one node.

    :ivar disks: what domains have of them.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self.disks = Disks(settings.disk_dir)
        self.cache = Cache(settings.cache_dir, settings.cache_max_mib << 20, self.disks.bases)
        rules = settings.allowed_schemes, settings.allowed_hosts, settings.allowed_networks
        self._policy = Policy(*rules)
        # What the configuration names may be asked for images of Glance, not by an instruction's URL.
        self._cloud_policy = Policy(*rules, trusted=(settings.glance_url, settings.auth_url))
        self._glance = Glance(settings, self._cloud_policy)
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(settings.downloads)
        self._jobs: dict[str, Job] = {}

    def prepare(self) -> None:
        """At start. :raises ConfigError: a folder cannot be made."""
        self.disks.prepare()
        self.cache.prepare(float(self.settings.keep_partial_seconds))

    def check(self, source: Source) -> None:
        """What can be said against a source before anything is asked for. :raises InstructionError."""
        if source.glance:
            if not (self.settings.glance_url or self.settings.auth_url):
                raise InstructionError(
                    "image.source_refused", "no Glance is known: set [images] glance_url or auth_url"
                )
            return
        self._policy.check(source.url)
        if self.settings.require_hash and not source.algorithm:
            text = f"{source.name}: no hash is given, and [images] require_hash is set: give hash"
            raise InstructionError("image.source_refused", text)

    def fetch(
        self, source: Source, holder: str, wait: Waiter, tell: Callable[[Progress], None] = lambda progress: None
    ) -> Entry:
        """The image, whole and checked, in the cache: fetched, unless it is there. It stays until `holder` releases it.

        :param wait: gives way when the caller has to end; what it raises is passed on.
        :param tell: how far it is; called often.
        :raises InstructionError: why there is none.
        """
        self.check(source)
        while True:
            job = self._join(source)
            try:
                over = job.wait(wait, tell)
            finally:
                self._leave(source, job)
            if not over:
                text = f"{source.name}: no time is left; what has come is kept"
                raise InstructionError("image.fetch_failed", text, retryable=True)
            if (entry := self.cache.lease(job.result().key, holder)) is not None:
                return entry
            # Given up again before we had it.

    def _join(self, source: Source) -> Job:
        with self._lock:
            job = self._jobs.get(source.key)
            if job is None or job.over.is_set():
                job = self._jobs[source.key] = Job(self, source)
                threading.Thread(target=job.run, name="image-fetch", daemon=True).start()
            job.users += 1
            return job

    def _leave(self, source: Source, job: Job) -> None:
        with self._lock:
            job.users -= 1
            if not job.users:
                if self._jobs.get(source.key) is job:
                    del self._jobs[source.key]
                job.cancel()

    def obtain(self, source: Source, job: Job) -> Entry:
        """In the job's thread. :raises InstructionError, Cancelled, OSError."""
        if source.algorithm and not source.glance:
            found = self.cache.find(source.format, {source.algorithm: source.digest})
            if found is not None:
                _check_size(source, found)
                return found
        with self._slot(job):
            transport = job.transport = Transport(self.settings, self._cloud_policy if source.glance else self._policy)
            try:
                job.check()
                wanted = self._wanted(source, transport)
                if wanted.proven and (found := self.cache.find(source.format, wanted.hashes)) is not None:
                    _check_size(source, found)
                    return found
                if not wanted.proven and (found := self._unchanged(wanted, transport)) is not None:
                    return found
                with self._alone(wanted.identity, job):
                    found = self.cache.find(source.format, wanted.hashes) if wanted.proven else None
                    return found or self._download(wanted, transport, job)
            finally:
                transport.close()

    def _wanted(self, source: Source, transport: Transport) -> Wanted:
        if source.glance:
            wanted = self._glance.locate(source, transport)
            if self.settings.require_hash and not wanted.proven:
                text = f"{source.name}: Glance has no strong hash of it, and [images] require_hash is set: give hash"
                raise InstructionError("image.source_refused", text)
            return wanted
        hashes = {source.algorithm: source.digest} if source.algorithm else {}
        return Wanted(source.name, source.url, source.format, source.size, hashes)

    def _unchanged(self, wanted: Wanted, transport: Transport) -> Entry | None:
        """What came from there before, if the server says that it is still the same."""
        known = self.cache.find_source(wanted.format, wanted.url)
        if known is None:
            return None
        with transport.open(wanted.url, {**wanted.headers, "If-None-Match": known[1]}) as answer:
            return known[0] if answer.status_code == 304 else None

    def _download(self, wanted: Wanted, transport: Transport, job: Job) -> Entry:
        given = self.settings
        boot = wanted.format in ("kernel", "ramdisk")
        limit = (given.max_kernel_mib if boot else given.max_image_mib) << 20
        part = self.cache.partial / f"{wanted.identity}.part"
        download = Download(
            wanted,
            transport,
            part,
            given,
            limit=limit,
            room=lambda more: self.cache.room(more, part),
            end=job.began + given.fetch_seconds,
            cancel=job.cancelled,
            progress=job.progress,
        )
        job.download = download
        try:
            hashes = download.run()
        finally:
            self.cache.no_more(part)
        try:
            disk = inspect(
                part,
                wanted.format,
                max_disk=given.max_disk_mib << 20,
                max_unpacked=given.max_unpacked_kernel_mib << 20,
                name=wanted.name,
            )
        except InstructionError:
            discard(part)
            raise
        job.check()
        now = time.time()
        validator = download.validator if download.validator.startswith('"') else ""
        sources = {wanted.url: "" if wanted.headers else validator}
        entry = Entry(
            f"{hashes['sha256']}.{wanted.format}", part.stat().st_size, disk, hashes, sources, created=now, used=now
        )
        return self.cache.add(part, entry)

    @contextlib.contextmanager
    def _slot(self, job: Job) -> Iterator[None]:
        while not self._slots.acquire(timeout=_TURN):
            job.check()
        try:
            yield
        finally:
            self._slots.release()

    @contextlib.contextmanager
    def _alone(self, identity: str, job: Job) -> Iterator[None]:
        """No other process downloads the same meanwhile."""
        while (lock := self.cache.try_download(identity)) is None:
            if job.cancelled.wait(_TURN):
                raise Cancelled
        with lock:
            yield


class Job:
    """One download, and who waits for it. :ivar users: counted by the fetcher, with its lock."""

    def __init__(self, fetcher: Fetcher, source: Source) -> None:
        self.users = 0
        self.over = threading.Event()
        self.cancelled = threading.Event()
        self.progress = Progress()
        self.began = time.monotonic()
        self.transport: Transport | None = None
        self.download: Download | None = None
        self._fetcher = fetcher
        self._source = source
        self._entry: Entry | None = None
        self._error: AgentError | None = None

    def run(self) -> None:
        try:
            self._entry = self._fetcher.obtain(self._source, self)
            LOG.info("image %s: %s is there", self._entry.key, self._source.name)
        except Cancelled:
            self._error = InstructionError("image.fetch_failed", f"{self._source.name}: given up", retryable=True)
        except AgentError as exc:
            self._error = exc
        except OSError as exc:
            text = f"{self._source.name} cannot be kept in {self._fetcher.cache.folder}: {exc.strerror or exc}"
            self._error = InstructionError("image.no_room", f"{text}: free space or correct its rights", retryable=True)
        except Exception:
            LOG.exception("fetching %s failed", self._source.name)
            self._error = InstructionError(
                "image.fetch_failed", f"{self._source.name}: see the log for a mistake of ours"
            )
        finally:
            self.over.set()

    def wait(self, wait: Waiter, tell: Callable[[Progress], None]) -> bool:
        """Whether it is over, when `wait` says that it is enough."""
        return bool(wait(lambda _left: self.turn(tell)))

    def turn(self, tell: Callable[[Progress], None]) -> bool:
        """What a waiter does again and again. Whether it is over."""
        if self.over.is_set():
            return True
        tell(self.progress)
        if self.transport is not None:
            why = self.download.slow() if self.download else ("no answer in time" if self.transport.late() else "")
            if why:
                LOG.info("%s: %s: cut off", self._source.name, why)
                self.transport.cut()
        return self.over.wait(0.01)

    def result(self) -> Entry:
        """:raises AgentError."""
        if self._error is not None:
            # Every waiter raises its own: a traceback belongs to one.
            exc = self._error
            raise InstructionError(exc.code, exc.message, exc.retryable)
        assert self._entry is not None
        return self._entry

    def check(self) -> None:
        """:raises Cancelled."""
        if self.cancelled.is_set():
            raise Cancelled

    def cancel(self) -> None:
        if not self.over.is_set():
            self.cancelled.set()
            if self.transport is not None:
                self.transport.cut(forever=True)


def _check_size(source: Source, entry: Entry) -> None:
    if source.size and source.size != entry.size:
        raise InstructionError(
            "image.invalid", f"{source.name} has {entry.size} bytes, not {source.size}: give another"
        )


def simple_wait(ready: Callable[[float], object]) -> Any:
    """For a command: until it is over."""
    while not (got := ready(0.5)):
        time.sleep(_TURN)
    return got
