"""Saving domains to files, and restoring them: the host process's side.

A save asks the guest to suspend itself (control/shutdown), has its domain process write it into a pipe, and moves that
to a new file. Until the file is whole nothing is lost: whatever fails, the guest goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

from hypervisor.errors import HostFailure, OperationTimeout, SpecInvalid, StreamInvalid, ToolstackError, WrongState
from hypervisor.host.building import Image
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.new_file import already, checked, new_file
from hypervisor.host.records import RunSizes
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import DomainState, SaveInfo
from hypervisor.toolstack.stream import config, envelope, libxc
from hypervisor.toolstack.stream.config import SavedConfig
from hypervisor.toolstack.stream.records import PvInfo
from hypervisor.toolstack.stream.source import Source
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

STREAM_TIMEOUT = 1800.0
"""Seconds for all of a domain's memory to pass."""
SLOWEST_READ = 8 << 20
"""Bytes a second that an image must come with, at least."""
_PIPE = 1 << 20
_F_SETPIPE_SZ = 1031
MAX_SUSPEND_TIMEOUT = 3600.0


class GoingOn:
    """Lets a guest that has suspended itself go on, once. :param since: it stood still, by the monotonic clock.

    :ivar stood: seconds that it did; 0 while it does.
    """

    def __init__(self, life: Lifecycle, domain: Domain, since: float) -> None:
        self._life = life
        self._domain = domain
        self._since = since
        self.stood = 0.0

    async def go(self) -> None:
        if not self.stood:
            self.stood = await self._life.resume(self._domain) - self._since


class Saving:
    def __init__(self, life: Lifecycle) -> None:
        self._life = life

    # -- save -----------------------------------------------------------------------------------------------------

    async def save(self, domain: Domain, text: str, *, keep_running: bool, timeout: float) -> SaveInfo:
        """See `hypervisor.toolstack.api.Toolstack.save`; under the domain's lock."""
        began = time.monotonic()
        if not 0 < timeout <= MAX_SUSPEND_TIMEOUT:
            raise SpecInvalid(f"timeout is {timeout:g}: give more than 0, at most {MAX_SUSPEND_TIMEOUT:g} seconds")
        self.check(domain)
        path = checked(text)
        stood = 0.0
        try:
            async with self.suspended(domain, timeout) as since:
                going_on = GoingOn(self._life, domain, since) if keep_running else None
                with new_file(path) as out:
                    pages = await self._write(domain, out, path, going_on)
                    size = os.fstat(out).st_size
                    if going_on is not None:
                        stood = going_on.stood
                    await _sync(out, path)
                    if not keep_running:
                        self._note(domain, out, path)
        except FileExistsError:
            raise already(path) from None
        except OSError as exc:
            raise HostFailure(f"{path} cannot be made: {exc.strerror}: give another, or correct its rights") from exc
        info = SaveInfo(
            domain.uuid, domain.record.spec.name, str(path), size, pages, stood * 1000, time.monotonic() - began
        )
        if not keep_running:
            await self._life.destroy(domain)
        return info

    def _note(self, domain: Domain, out: int, path: Path) -> None:
        """From the moment on in which the file has its name the domain is to go, whoever sees to it."""
        found = os.fstat(out)
        domain.record.saved_as = [str(path), found.st_dev, found.st_ino]
        self._life.records.save(domain.record)

    def check(self, domain: Domain) -> None:
        """:raises WrongState: its guest cannot suspend now."""
        self._life.check_alive(domain, "save")
        if domain.record.state is not DomainState.RUNNING:
            raise WrongState(f"domain {domain.uuid} is {domain.state}, its guest cannot suspend: unpause it first")

    @contextlib.asynccontextmanager
    async def suspended(self, domain: Domain, timeout: float) -> AsyncIterator[float]:
        """The guest is suspended within, since the time (of the monotonic clock) that is given. If anything goes wrong
        there it goes on where it was; otherwise what becomes of it is the caller's business.

        :raises OperationTimeout: it did not suspend itself; it runs on. :raises WrongState: it ended.
        """
        await self._suspend(domain, timeout)
        try:
            yield time.monotonic()
        except BaseException:
            try:
                await self._life.resume(domain)
            except ToolstackError as exc:  # it is the first error that says what went wrong
                LOG.error("domain %s does not go on: %s", domain.uuid, exc)
            raise

    async def _suspend(self, domain: Domain, timeout: float) -> None:
        life, record, attachment = self._life, domain.record, domain.attachment
        assert attachment is not None
        record.suspending = True
        life.records.save(record)
        domain.suspension = asyncio.get_running_loop().create_future()
        try:
            attachment.request_shutdown("suspend")
            await within(domain.suspension, timeout)
        except WrongState:
            record.suspending = False
            raise
        except TimeoutError:
            if attachment.withdraw_shutdown():
                record.suspending = False
                life.records.save(record)
            raise OperationTimeout(
                f"the guest of domain {domain.uuid} did not suspend itself within {timeout:g} s, and runs on: look at"
                " its console, or give it more time"
            ) from None
        finally:
            domain.suspension = None

    async def _write(self, domain: Domain, out: int, path: Path, going_on: GoingOn | None) -> int:
        """The whole image. :returns: pages with data. :raises ToolstackError, OSError."""
        record, run = domain.record, domain.record.run
        info = await domain.info()
        pages = domain.stats.get("memory_pages", 0)
        saved = SavedConfig(
            record.spec,
            info.vcpus if 0 < info.vcpus <= run.max_vcpus else run.vcpus,
            run.max_vcpus,
            run.memory_mib,
            run.max_memory_mib,
            pages if isinstance(pages, int) else 0,
        )
        _write_all(out, envelope.opening(config.write(saved)), path)
        written = await self.stream(domain, out, path, going_on)
        _write_all(out, envelope.closing(), path)
        return written

    async def stream(self, domain: Domain, out: int, what: object, going_on: GoingOn | None = None) -> int:
        """The libxc stream of a suspended guest, into any descriptor. :returns: pages with data.

        :param what: is written, for the error. :param going_on: the guest goes on as soon as its memory is frozen, or
            when all is written. :raises ToolstackError.
        """
        process = domain.process
        assert process is not None
        with self._room(domain, going_on) as frozen:
            read, write = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a limit of the user's
                fcntl.fcntl(write, _F_SETPIPE_SZ, _PIPE)
            try:
                answer = asyncio.ensure_future(process.request("save", STREAM_TIMEOUT, {"frozen": frozen}, [write]))
                await asyncio.sleep(0)  # until it is sent
            finally:
                os.close(write)
            begun = _begun(answer, going_on)
            try:
                refused, pumped = await asyncio.gather(
                    begun, asyncio.to_thread(_pump, read, out), return_exceptions=True
                )
            finally:
                os.close(read)  # a writer that is still at it gives up
            if isinstance(refused, BaseException):
                raise refused
            outcome = (await asyncio.gather(process.request("saved", STREAM_TIMEOUT), return_exceptions=True))[0]
        if isinstance(pumped, BaseException):
            why = pumped.strerror if isinstance(pumped, OSError) else pumped
            raise HostFailure(f"{what} cannot be written: {why}: make room, or give another path")
        if isinstance(outcome, BaseException):
            raise outcome
        if going_on is not None:
            await going_on.go()
        pages = outcome.get("pages")
        return pages if isinstance(pages, int) and pages >= 0 else 0

    @contextlib.contextmanager
    def _room(self, domain: Domain, going_on: GoingOn | None) -> Iterator[bool]:
        """Whether the guest's memory may be frozen: all of it may be there twice then, and is set aside meanwhile."""
        held, ledger = domain.record.claim, self._life.ledger
        claim = None
        if going_on is not None and held is not None:
            try:
                claim = ledger.claim(domain.uuid, held.committed, held.committed, wide=True)
            except ToolstackError as exc:
                LOG.info("domain %s waits while it is saved, for want of memory: %s", domain.uuid, exc)
        try:
            yield claim is not None
        finally:
            if claim is not None:
                ledger.release(claim)

    # -- restore --------------------------------------------------------------------------------------------------

    async def restore(self, text: str, *, owner: str, name: str, uuid: str) -> Domain:
        """See `hypervisor.toolstack.api.Toolstack.restore`."""
        path = Path(text)
        if not path.is_absolute() or "\0" in text:
            raise SpecInvalid(f"path {text[:200]!r} is not usable: give an absolute one")
        descriptor = _open(path)
        try:
            return await self.take(descriptor, owner=owner, name=name, uuid=uuid)
        finally:
            os.close(descriptor)

    async def take(self, descriptor: int, *, owner: str, name: str = "", uuid: str = "") -> Domain:
        """A domain from an image whose file is at its beginning. :raises ToolstackError: nothing is left of it."""
        try:
            saved, bits = await asyncio.to_thread(_head, descriptor)
        except OSError as exc:
            raise HostFailure(f"the image cannot be read: {exc.strerror}: correct its rights, or give another") from exc
        saved = saved.named(owner=owner, name=name, uuid=uuid)
        run = RunSizes(saved.vcpus, saved.max_vcpus, saved.memory_mib, saved.max_memory_mib)
        self._life.check(run.applied(saved.spec), await self._life.zygote.start())
        pages = saved.pages or run.max_memory_mib * 256
        seconds = os.fstat(descriptor).st_size / SLOWEST_READ
        return await self._life.create(saved.spec, Image((descriptor,), run, pages, bits, seconds))


async def _begun(answer: Awaitable[dict[str, Any]], going_on: GoingOn | None) -> None:
    if (await answer).get("frozen") is True and going_on is not None:
        await going_on.go()


def _open(path: Path) -> int:
    """:raises SpecInvalid: no file, or not readable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as exc:
        raise SpecInvalid(f"{path} cannot be opened: {exc.strerror}: give a readable file") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SpecInvalid(f"{path} is no file: give a saved image")
    return descriptor


def _head(descriptor: int) -> tuple[SavedConfig, int]:
    """The configuration and the guest's word size; afterwards the libxc stream is next. :raises StreamInvalid."""
    source = Source(lambda size: os.read(descriptor, size))
    saved = config.read(envelope.read_config(source))
    envelope.read_libxl_header(source)
    begin = source.position
    header = libxc.read_header(source)
    for record in libxc.read_records(source, header.version):
        if isinstance(record, PvInfo):
            os.lseek(descriptor, begin, os.SEEK_SET)
            return saved, record.bits
    raise StreamInvalid("the image is damaged: it has no X86_PV_INFO record; give another")


def _pump(read: int, out: int) -> int | OSError:
    """Move all that comes; bytes, or why the target takes no more."""
    total = 0
    try:
        while moved := os.splice(read, out, _PIPE):
            total += moved
    except OSError as exc:
        return exc
    return total


def _write_all(out: int, data: bytes, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(out, view) :]
    except OSError as exc:
        raise HostFailure(f"{path} cannot be written: {exc.strerror}: make room, or give another path") from exc


async def _sync(out: int, path: Path) -> None:
    try:
        await asyncio.to_thread(os.fsync, out)
    except OSError as exc:
        raise HostFailure(f"{path} cannot be written: {exc.strerror}: make room, or give another path") from exc
