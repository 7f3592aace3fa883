"""A domain process's part in a migration: which pages were written, the guest's state out and in.

Ops from the host: ``migration_facts``; ``migration_log`` (``on``; a descriptor of a bitmap file that `Sender.pages`
understands) begins and ends the log of writes; ``migration_dirty`` puts into that file what was written since the last
call, or since the log began; ``migration_freeze`` (``on``; ``dirty``: with the last look at what was written) stops the
run loop dead, and lets it go on;
``migration_export`` (``early`` or ``served``; a file) writes the state of a frozen guest, ``migration_import`` (a file,
and that of `Receiver.marks`) takes it. The early part tells of a guest that runs on; with it the target makes ready. A
guest that is ``served`` keeps its drivers, which do nothing meanwhile (`hypervisor.devices.driver.Committing`).

The order of a switch: freeze, then export and the last ``migration_dirty`` in any order, then the pages. A frozen guest
stays frozen when the host's connection ends: only who knows which copy may run says what becomes of it.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hypervisor.errors import HostFailure, MigrationFailed, Unsupported, WrongState
from hypervisor.host import channel as channels
from hypervisor.host import seccomp
from hypervisor.host.channel import Message
from hypervisor.host.dirty_log import Unavailable, WriteLog, packed
from hypervisor.host.runtime import Moving
from hypervisor.host.writable_pages import WritablePages
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)

OPS = frozenset(f"migration_{name}" for name in ("facts", "log", "dirty", "freeze", "export", "import"))
MAX_STATE = 32 << 20


class Neighbourhood(Protocol):
    def entangled(self) -> str:
        """Which neighbour uses something of the domain's; "" for none."""


def open_log() -> WriteLog | None:
    """Before the sandbox closes."""
    try:
        return WriteLog()
    except Unavailable as exc:
        LOG.info("writes of the guest cannot be logged, a migration compares its memory: %s", exc)
        return None


def profile(log: WriteLog | None) -> seccomp.Profile:
    """The domain process's, with what the log may ask of the kernel."""
    return dataclasses.replace(seccomp.DOMAIN, ioctls_of=log.ioctls() if log is not None else {})


class MigrationPart:
    """Belongs to the channel thread.

    Which pages driver processes and the host process may have written nobody sees; they are told every time, in the
    second bitmap too, and the sender compares them with what it sent last.

    :param log: None: the kernel cannot do that.
    :param writable: pages that driver processes can write to.
    """

    def __init__(
        self, guest: Moving, log: WriteLog | None, writable: WritablePages, neighbours: Neighbourhood | None
    ) -> None:
        self._guest = guest
        self._log = log
        self._writable = writable
        self._neighbours = neighbours
        self._bitmap = -1

    def answer(self, message: Message, fds: list[int]) -> dict[str, Any]:
        """One of `OPS`; the descriptors are owned from here on. :raises ToolstackError."""
        verbs: dict[str, Callable[[Message, list[int]], dict[str, Any]]] = {
            "migration_facts": self._facts,
            "migration_log": self._start_or_stop,
            "migration_dirty": self._dirty,
            "migration_freeze": self._freeze,
            "migration_export": self._export,
            "migration_import": self._import,
        }
        started = time.monotonic()
        try:
            result = verbs[str(message["op"])](message, fds)
        except OSError as exc:
            raise HostFailure(f"{message['op']}: {exc.strerror or exc}: see domain.log") from exc
        finally:
            channels.close_all(fds)
        return {**result, "seconds": time.monotonic() - started}

    def state(self) -> dict[str, Any]:
        """For the host that comes next."""
        return {"frozen": self._guest.frozen, "incoming": self._guest.incoming, "logged": self._bitmap >= 0}

    # -- writes

    @property
    def _method(self) -> str:
        return "write-protection" if self._log is not None else "comparison"

    def _facts(self, _message: Message, _fds: list[int]) -> dict[str, Any]:
        return {"facts": self._guest.facts(), "pages": self._guest.pages, "log": self._method}

    def _start_or_stop(self, message: Message, fds: list[int]) -> dict[str, Any]:
        if message.get("on"):
            self._look_for_obstacles()
            if len(fds) != 1:
                raise HostFailure(f"op migration_log with {len(fds)} descriptors")
            self._stop()
            self._guest.settle()
            self._bitmap = fds.pop()
            self._writable.watch(True)
            self._guest.punched = collections.deque()
            if self._log is not None:
                self._log.start(self._guest.address, self._guest.pages * PAGE_SIZE)
        else:
            self._stop()
        return {"log": self._method, "pages": self._guest.pages}

    def _look_for_obstacles(self) -> None:
        """:raises WrongState: it cannot be moved."""
        obstacle = self._guest.call(self._neighbours.entangled) if self._neighbours is not None else ""
        if obstacle := obstacle or self._guest.obstacles():
            raise WrongState(f"the domain cannot be moved: {obstacle}: end what the two share, or save it")

    def _stop(self) -> None:
        if self._bitmap >= 0:
            os.close(self._bitmap)
            self._bitmap = -1
        self._writable.watch(False)
        self._guest.punched = None
        if self._log is not None:
            self._log.stop()

    def _dirty(self, _message: Message, _fds: list[int]) -> dict[str, Any]:
        """Whatever is written while this is on its way is told now, or with the next call."""
        if self._bitmap < 0:
            raise WrongState("the log of writes is off: call migration_log first")
        pages = self._guest.pages
        shared = np.zeros(pages, dtype=bool)
        if self._log is None:
            dirty = np.ones(pages, dtype=bool)
            shared[:] = True
        else:
            try:
                dirty = self._log.take()
            except PermissionError:
                raise WrongState("the domain cannot be moved: it shared memory with another one meanwhile") from None
            shared[[index for index in self._written_by_others() if index < pages]] = True
            dirty |= shared
            punched = self._guest.punched
            while punched:
                first, count = punched.popleft()
                dirty[first : first + count] = True
        content = packed(dirty) + packed(shared)
        if os.pwrite(self._bitmap, content, 0) != len(content):
            raise HostFailure("the bitmap cannot be written")
        return {"pages": int(np.count_nonzero(dirty)), "shared": int(np.count_nonzero(shared)), "log": self._method}

    def _written_by_others(self) -> set[int]:
        return self._writable.take() | self._guest.host_pages()

    # -- the guest

    def _freeze(self, message: Message, fds: list[int]) -> dict[str, Any]:
        if message.get("on"):
            if self._guest.incoming:
                raise WrongState("there is no guest in it yet")
            self._guest.freeze()
            try:
                told = self._dirty(message, fds) if message.get("dirty") else {}
            except BaseException:
                self._guest.thaw()
                raise
            return {**told, "frozen": True}
        self._guest.thaw()
        return {"frozen": self._guest.frozen}

    def _export(self, message: Message, fds: list[int]) -> dict[str, Any]:
        early = bool(message.get("early"))
        if not early:
            self._look_for_obstacles()
        if len(fds) != 1:
            raise HostFailure(f"op migration_export with {len(fds)} descriptors")
        data = memoryview(self._guest.give(early=early, served=bool(message.get("served"))))
        at = 0
        while at < len(data):
            at += os.pwrite(fds[0], data[at:], at)
        return {"bytes": at}

    def _import(self, _message: Message, fds: list[int]) -> dict[str, Any]:
        if len(fds) not in (1, 2):
            raise HostFailure(f"op migration_import with {len(fds)} descriptors")
        data = os.pread(fds[0], MAX_STATE + 1, 0)
        if len(data) > MAX_STATE:
            raise MigrationFailed(f"a domain's state of more than {MAX_STATE} bytes")
        self._guest.take(data, fds[1] if len(fds) > 1 else None)
        return {}


def part(
    guest: Moving | None, log: WriteLog | None, writable: WritablePages, neighbours: Neighbourhood | None
) -> MigrationPart | None:
    return MigrationPart(guest, log, writable, neighbours) if guest is not None else None


def answer(part: MigrationPart | None, message: Message, fds: list[int]) -> dict[str, Any]:
    """As `MigrationPart.answer`, if there is one."""
    if part is None:
        channels.close_all(fds)
        raise Unsupported("this runtime cannot move guests")
    return part.answer(message, fds)
