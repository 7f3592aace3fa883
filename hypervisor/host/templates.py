"""The store of templates: suspended guests from which domains begin, below the host's state folder.

A template is a folder ``<state>/templates/<name>`` with ``template.json`` (what it is), ``memory`` and ``state``
(`hypervisor.suspended.template`). It is made under another name and renamed when all of it is on the disk, so that what
has a name is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from hypervisor.errors import (
    HostFailure,
    SpecInvalid,
    StreamInvalid,
    StreamUnsupported,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
    ToolstackError,
    WrongState,
)
from hypervisor.host.building import Image
from hypervisor.host.ledger import PAGES_PER_MIB
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.records import RunSizes
from hypervisor.host.saving import MAX_SUSPEND_TIMEOUT, STREAM_TIMEOUT, GoingOn, Saving
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import DomainSpec, TemplateInfo
from hypervisor.toolstack.template import check_begins, check_template_ident, check_template_name
from hypervisor.types import PAGE_SIZE
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

FOLDER, ABOUT, MEMORY, STATE = "templates", "template.json", "memory", "state"
FORM = 1
MAX_TEMPLATES = 256
_NEW, _GOING = ".new-", ".going-"
_MAX_ABOUT = 1 << 20
_SPARE = 16 << 20
START_TIMEOUT, END_TIMEOUT = 60.0, 0.5
_WRITE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Templates:
    def __init__(self, life: Lifecycle, saving: Saving) -> None:
        self._life = life
        self._saving = saving
        self.root = life.settings.state_dir / FOLDER
        self._making: set[str] = set()

    def sweep(self) -> None:
        """Remove what a host process left that was killed: no template has such a name."""
        for folder in (*self.root.glob(f"{_NEW}*"), *self.root.glob(f"{_GOING}*")):
            shutil.rmtree(folder, ignore_errors=True)

    # -- what there is

    def all(self) -> list[TemplateInfo]:
        """By name. What cannot be read is told in the log."""
        found = []
        for folder in sorted(self.root.glob("[!.]*")):
            try:
                found.append(self.get(folder.name))
            except ToolstackError as exc:
                LOG.warning("%s", exc)
        return found

    def get(self, name: str) -> TemplateInfo:
        """:raises TemplateNotFound. :raises StreamInvalid, StreamUnsupported: it is damaged, or of another form."""
        check_template_name(name)
        folder = self.root / name
        try:
            with open(folder / ABOUT, "rb") as file:
                about = json.loads(file.read(_MAX_ABOUT + 1))
            if about.pop("form") != FORM:
                raise StreamUnsupported(f"template {name} is of another release: remove its folder, make it again")
            info = TemplateInfo.from_json(about)
        except FileNotFoundError:
            raise TemplateNotFound(f"there is no template {name!r}: look at `reeve template list`") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SpecInvalid) as exc:
            raise StreamInvalid(f"template {name} cannot be read ({exc}): remove its folder, make it again") from exc
        return dataclasses.replace(info, name=name, bytes=_on_disk(folder), users=self._users(info.ident))

    def _users(self, ident: str) -> tuple[str, ...]:
        domains = self._life.table.all()
        return tuple(sorted(d.uuid for d in domains if d.record.template == ident))

    # -- making

    async def create(
        self, domain: Domain, name: str, *, ident: str, keep_running: bool, timeout: float
    ) -> TemplateInfo:
        """See `hypervisor.toolstack.api.Toolstack.template_create`; under the domain's lock."""
        check_template_name(name)
        check_template_ident(ident)
        self._check(domain, name, timeout, keep_running=keep_running)
        self._making.add(name)
        try:
            self.root.mkdir(mode=0o700, exist_ok=True)
            work = self.root / f"{_NEW}{secrets.token_hex(8)}"
            work.mkdir(mode=0o700)
        except OSError as exc:
            self._making.discard(name)
            raise _failed(name, exc) from exc
        try:
            return await self._create(domain, name, work, ident=ident, keep_running=keep_running, timeout=timeout)
        except OSError as exc:
            raise _failed(name, exc) from exc
        finally:
            self._making.discard(name)
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    def _check(self, domain: Domain, name: str, timeout: float, *, keep_running: bool) -> None:
        if not 0 < timeout <= MAX_SUSPEND_TIMEOUT:
            raise SpecInvalid(f"timeout is {timeout:g}: give more than 0, at most {MAX_SUSPEND_TIMEOUT:g} seconds")
        if name in self._making or os.path.lexists(self.root / name):
            raise TemplateExists(f"there is a template {name!r} already: remove it, or give another name")
        if sum(1 for _ in self.root.glob("*")) >= MAX_TEMPLATES:
            raise HostFailure(f"there are {MAX_TEMPLATES} templates: remove one")
        self._saving.check(domain)
        if keep_running and (mine := [disk.id for disk in domain.record.spec.disks if not disk.readonly]):
            raise WrongState(
                f"domain {domain.uuid} would go on writing to {', '.join(mine)}, and the template be of no use: detach"
                " them, or let the domain go"
            )
        info = os.statvfs(self._life.settings.state_dir)
        pages = domain.stats.get("memory_pages")
        most = pages if isinstance(pages, int) and pages >= 0 else domain.record.run.memory_mib * PAGES_PER_MIB
        needed, free = most * PAGE_SIZE + _SPARE, info.f_bavail * info.f_frsize
        if free < needed:
            raise HostFailure(
                f"template {name} may need {needed >> 20} MiB, the disk of {self._life.settings.state_dir} has"
                f" {free >> 20}: make room"
            )

    async def _create(
        self, domain: Domain, name: str, work: Path, *, ident: str, keep_running: bool, timeout: float
    ) -> TemplateInfo:
        record = domain.record
        stood = 0.0
        frames = record.run.max_memory_mib * PAGES_PER_MIB
        async with _Layer(name, work, frames) as layer, self._saving.suspended(domain, timeout) as since:
            going_on = GoingOn(self._life, domain, since) if keep_running else None
            await layer.take(self._saving.stream(domain, layer.stream, f"template {name}", going_on))
            if going_on is not None:
                stood = going_on.stood
            said = await layer.done()
            spec = dataclasses.replace(record.run.applied(record.spec), owner="")
            info = TemplateInfo(name, ident, spec, said["bits"], said["pages"], 0, time.time(), stood * 1000)
            self._finish(work, info)
            if not keep_running:
                # From the moment on in which it has its name the domain is to go, whoever sees to it.
                found = os.stat(work / MEMORY)
                record.saved_as = [str(self.root / name / MEMORY), found.st_dev, found.st_ino]
                self._life.records.save(record)
            os.rename(work, self.root / name)
        with contextlib.suppress(OSError):  # after a power cut it may be gone
            _sync_folder(self.root)
        if not keep_running:
            await self._life.destroy(domain)
        return self.get(name)

    def _finish(self, work: Path, info: TemplateInfo) -> None:
        descriptor = os.open(work / ABOUT, _WRITE, 0o400)
        with open(descriptor, "w") as file:
            json.dump({"form": FORM, **info.to_json()}, file)
            file.flush()
            os.fsync(descriptor)
        for name in (MEMORY, STATE):
            os.chmod(work / name, 0o400)
        _sync_folder(work)

    # -- beginning from one

    async def clone(self, name: str, spec: DomainSpec) -> Domain:
        """See `hypervisor.toolstack.api.Toolstack.clone`."""
        spec.validate()
        info = self.get(name)
        check_begins(spec, info)
        run = RunSizes.of(spec)
        with contextlib.ExitStack() as undo:
            descriptors = []
            for part in (MEMORY, STATE):
                try:
                    descriptors.append(os.open(self.root / name / part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
                except OSError as exc:
                    raise StreamInvalid(f"template {name}: {part}: {exc.strerror}: remove it, make it again") from exc
                undo.callback(os.close, descriptors[-1])
            image = Image(tuple(descriptors), run, run.max_memory_mib * PAGES_PER_MIB, info.bits, template=info.ident)
            return await self._life.create(spec, image)

    # -- removing

    async def remove(self, name: str, *, force: bool) -> None:
        """See `hypervisor.toolstack.api.Toolstack.template_remove`."""
        check_template_name(name)
        folder = self.root / name
        if not os.path.lexists(folder):
            raise TemplateNotFound(f"there is no template {name!r}: look at `reeve template list`")
        with contextlib.suppress(StreamInvalid):  # what cannot be read nobody runs on
            if (users := self.get(name).users) and not force:
                raise TemplateInUse(
                    f"template {name} is the memory of {len(users)} domains, {users[0]} for one: destroy them first, or"
                    " give force"
                )
        going = self.root / f"{_GOING}{secrets.token_hex(8)}"
        try:
            os.rename(folder, going)
        except OSError as exc:
            raise HostFailure(f"template {name} cannot be removed: {exc.strerror}: correct its rights") from exc
        await asyncio.to_thread(shutil.rmtree, going, ignore_errors=True)


class _Layer:
    """The process that makes a template's files of a libxc stream; within, it is ready for that.

    :ivar stream: where it goes.
    """

    def __init__(self, name: str, work: Path, frames: int) -> None:
        self._name = name
        self._work = work
        self._frames = frames
        self._child: Any = None
        self.stream = -1

    async def __aenter__(self) -> _Layer:
        with contextlib.ExitStack() as undo:
            inner, self.stream = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, inner)
            fds = [inner]
            for name in (MEMORY, STATE):
                fds.append(os.open(self._work / name, _WRITE, 0o600))
                undo.callback(os.close, fds[-1])
            command = [sys.executable, "-P", "-m", "hypervisor.suspended.template", *map(str, fds), str(self._frames)]
            pipe = asyncio.subprocess.PIPE
            self._child = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, pass_fds=fds
            )
        try:
            ready = await within(self._child.stdout.readline(), START_TIMEOUT)
        except BaseException:
            await self._end()
            raise
        if not ready:
            await self._end()
            raise HostFailure(f"template {self._name} could not be written: its process does not start; see the log")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _end(self) -> None:
        self._close()
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()

    async def take(self, coming: Awaitable[object]) -> None:
        """:raises ToolstackError: why it does not come, or is not taken."""
        try:
            await coming
        except HostFailure:
            # As long as the pipe is open it ends only if it fails, and then it knows better why.
            with contextlib.suppress(TimeoutError):
                await within(self._child.wait(), END_TIMEOUT)
                await self.done()
            raise

    async def done(self) -> dict[str, int]:
        """What it says of the guest, after the files are on the disk. :raises HostFailure: why they are of no use."""
        self._close()
        try:
            out, error = await within(self._child.communicate(), STREAM_TIMEOUT)
        except TimeoutError:
            raise HostFailure(f"template {self._name} was not written within {STREAM_TIMEOUT:g} s: try again") from None
        try:
            said = json.loads(out)
            return {name: int(said[name]) for name in ("bits", "pages")}
        except (TypeError, ValueError, KeyError):
            why = error.decode(errors="replace").strip().rpartition("\n")[2][:300] or "it says nothing"
            if self._child.returncode == -signal.SIGBUS:  # a page of the file could not be made
                why = "No space left on device"
            raise HostFailure(
                f"template {self._name} could not be written: {why}: make room, or look at the log"
            ) from None

    def _close(self) -> None:
        if self.stream >= 0:
            os.close(self.stream)
            self.stream = -1


def _failed(name: str, exc: OSError) -> HostFailure:
    return HostFailure(f"template {name} cannot be made: {exc.strerror or exc}: make room, or correct the rights")


def _on_disk(folder: Path) -> int:
    """Bytes that it takes; 0 when it has gone meanwhile."""
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir())
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
