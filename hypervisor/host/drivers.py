"""Driver processes as the host process holds them: started when needed, replaced when they die."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hypervisor.errors import HostFailure, HostUnavailable, ToolstackError
from hypervisor.host import channel as channels
from hypervisor.host.channel import Channel, Message
from hypervisor.host.driver_process import STATS_BYTES, DriverOrder, log_name, socket_name, stats_name
from hypervisor.host.link import Link
from hypervisor.host.process import describe_exit, reap
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

START_TIMEOUT = 20.0
REQUEST_TIMEOUT = 30.0
STATS_TIMEOUT = 1.0
LEAVE_TIMEOUT = 5.0
KILL_TIMEOUT = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0
"""Seconds between two starts of a driver that dies soon after them; doubled each time."""
GOOD_LIFE = 5.0
"""A driver that lived so many seconds is started at once when it dies."""

MAX_COUNTERS = 40

Counters = dict[int, dict[str, int]]


class GuestSide(Protocol):
    """The domain process's part of a link."""

    async def open_link(self) -> list[int]:
        """A new link's descriptors for a driver process, owned by the caller. :raises ToolstackError."""


class Backoff:
    """How long to wait before the next start. :param clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = -GOOD_LIFE
        self._delay = 0.0

    def started(self) -> None:
        self._started = self._clock()

    def ended(self) -> None:
        """It died, or could not be started."""
        if self._clock() - self._started >= GOOD_LIFE:
            self._delay = 0.0
        else:
            self._delay = min(LONGEST_DELAY, self._delay * 2 or FIRST_DELAY)
        self._ended = self._clock()

    def left(self) -> float:
        """Seconds until it may be started."""
        return max(0.0, self._started + self._delay - self._clock()) if self._delay else 0.0


@dataclasses.dataclass(slots=True)
class _Running:
    pid: int
    pidfd: int
    link: Link
    ready: asyncio.Future[None]
    gone: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class DriverHold:
    """One domain's driver of one kind.

    :param folder: the domain's, for socket, log and counters.
    :ivar generation: counts the processes there were; a device is served by the one that it was connected to.
    :ivar on_death: called when a process ended that was not asked to; with what it had counted last.
    :ivar on_report: called with devid, ``broken`` or ``warning``, and detail.
    :ivar holding: what its guest sends is kept back (`hypervisor.devices.driver.Committing`), by the next process too.
    """

    def __init__(
        self, order: DriverOrder, folder: Path, zygote: ZygoteClient, guest: GuestSide, *, sandbox: str = "auto"
    ) -> None:
        self.order = order
        self.generation = 0
        self.on_death: Callable[[Counters], None] = lambda counters: None
        self.on_report: Callable[[int, str, str], None] = lambda devid, what, detail: None
        self._folder = folder
        self._zygote = zygote
        self._guest = guest
        self._sandbox = sandbox
        self._lock = asyncio.Lock()
        self._running: _Running | None = None
        self._backoff = Backoff()
        self._stopping = False
        self.holding = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return self._running.pid if self._running else None

    async def ensure(self) -> int:
        """Have a driver process; waits its turn if it died too often. :returns: the generation.

        :raises ToolstackError: it could not be started; try again.
        """
        async with self._lock:
            if self._stopping:
                raise HostUnavailable("the domain's drivers are being ended")
            if self._running is None:
                await asyncio.sleep(self._backoff.left())
                self._backoff.started()
                try:
                    await self._start()
                except (ToolstackError, OSError) as exc:
                    self._backoff.ended()
                    await self._kill()
                    raise exc if isinstance(exc, ToolstackError) else HostFailure(str(exc)) from exc
                except BaseException:
                    await self._kill()
                    raise
            return self.generation

    async def request(
        self, op: str, fields: Mapping[str, Any], fds: Sequence[int] = (), timeout: float = REQUEST_TIMEOUT
    ) -> dict[str, Any]:
        """:raises HostUnavailable: it is gone, or did not answer: it is killed then, and replaced."""
        running = self._running
        if running is None:
            raise HostUnavailable("the driver process is gone")
        try:
            return await running.link.request(op, timeout, fields, fds)
        except HostUnavailable:
            if not running.link.closed and timeout >= REQUEST_TIMEOUT:
                LOG.error("driver process %d does not answer %s: killing it", running.pid, op)
                _signal(running.pidfd)
            raise

    async def counters(self, devid: int) -> dict[str, int]:
        """What it has counted of a device; nothing if it does not say."""
        try:
            answer = await self.request("stats", {}, timeout=STATS_TIMEOUT)
        except ToolstackError:
            return {}
        found = answer.get("stats")
        return numbers(found.get(str(devid))) if isinstance(found, dict) else {}

    async def finish(self, devid: int) -> dict[str, int] | None:
        """Have it serve what the front end brings when it is told to look. :returns: what it has counted up to now.

        None: there is nothing to wait for. :raises HostUnavailable: it does not answer.
        """
        answer = await self.request("finish", {"devid": devid})
        return numbers(answer["stats"]) if "stats" in answer else None

    async def leave(self, devid: int) -> dict[str, int]:
        """Have it finish with a device of a guest that goes to another host. :returns: what it had counted.

        :raises HostUnavailable: it does not answer.
        """
        if self._running is None:
            return {}
        answer = await self.request("leave", {"devid": devid}, timeout=LEAVE_TIMEOUT)
        return numbers(answer.get("stats"))

    async def commit(self, op: str, **fields: Any) -> dict[str, Any]:
        """An op for guests with a standby; {} of a process that is gone: it serves nothing, and what it kept is lost.

        :raises HostUnavailable: it does not answer.
        """
        running = self._running
        if running is None:
            return {}
        try:
            return await running.link.request(op, LEAVE_TIMEOUT, fields)
        except HostUnavailable:
            if running.link.closed:
                return {}
            raise

    async def clear(self) -> Counters:
        """End a driver process that an earlier host process left; its counters. :raises HostFailure: it does not go."""
        async with self._lock:
            await end_stranger(self._folder, self.order.kind)
            return self._read_counters()

    async def stop(self) -> None:
        """End it for good. :raises HostFailure: it does not go."""
        self._stopping = True
        async with self._lock:
            await self._kill()

    def let_go(self) -> None:
        """The host process ends, the driver does not."""
        self._stopping = True
        running, self._running = self._running, None
        if running is not None:
            self._forget(running)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await end_stranger(self._folder, self.order.kind)
        fds: list[int] = []
        ours, theirs = channels.pair()
        try:
            fds = [theirs.fileno(), self._open_log(), self._open_counters()]
            fds += await self._guest.open_link()
            message = {
                "op": "spawn-driver",
                "order": self.order.to_json(),
                "directory": str(self._folder),
                "sandbox": self._sandbox,
            }
            pid, pidfd = await self._zygote.spawn(message, fds)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            channels.close_all(fds[1:])
        running = self._hold(pid, pidfd, ours)
        self.generation += 1
        try:
            await within(asyncio.shield(running.ready), START_TIMEOUT)
        except TimeoutError:
            raise HostFailure(f"driver process {pid} did not start: see {log_name(self.order.kind)}") from None
        if self.holding:
            await running.link.request("hold", LEAVE_TIMEOUT)

    def _hold(self, pid: int, pidfd: int, channel: Channel) -> _Running:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        link = Link(channel, lambda message, fds: self._event(ready, message, fds), lambda: _signal(running.pidfd))
        running = self._running = _Running(pid, pidfd, link, ready)
        loop.add_reader(pidfd, lambda: self._died(running))
        return running

    def _died(self, running: _Running) -> None:
        code = reap(running.pidfd)
        unexpected = self._running is running
        self._forget(running)
        running.gone.set()
        if not running.ready.done():
            running.ready.set_exception(HostFailure("the driver process ended at its start: see its log"))
            running.ready.exception()  # somebody may have given up waiting
        task = asyncio.get_running_loop().create_task(self._log_end(running.pid, code, unexpected=unexpected))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if unexpected:
            self._running = None
            self._backoff.ended()
            self.on_death(self._read_counters())

    async def _log_end(self, pid: int, code: int | None, *, unexpected: bool) -> None:
        if code is None:
            code = await self._zygote.exit_code(pid)
        level = logging.WARNING if unexpected else logging.DEBUG
        order = self.order
        LOG.log(level, "%s driver %d of domain %s ended: %s", order.kind, pid, order.uuid, describe_exit(code))

    def _forget(self, running: _Running) -> None:
        if running.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(running.pidfd)
            os.close(running.pidfd)
            running.pidfd = -1
        running.link.close()

    async def _kill(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        _signal(running.pidfd)
        try:
            await within(running.gone.wait(), KILL_TIMEOUT)
        except TimeoutError:
            self._running = running
            raise HostFailure(f"driver process {running.pid} does not end: it hangs in the host's kernel") from None

    def _event(self, ready: asyncio.Future[None], message: Message, fds: list[int]) -> None:
        channels.close_all(fds)
        devid = message.get("devid")
        if message["event"] == "ready" and not ready.done():
            ready.set_result(None)
            report = message.get("sandbox")
            for line in report.get("missing", ())[:8] if isinstance(report, dict) else ():
                LOG.warning("%s driver of domain %s: %s", self.order.kind, self.order.uuid, str(line)[:200])
        elif message["event"] == "report" and isinstance(devid, int):
            self.on_report(devid, str(message.get("what")), str(message.get("detail"))[:500])

    def _open_log(self) -> int:
        """Its log; one that has grown is put aside."""
        path = self._folder / log_name(self.order.kind)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size >= self.order.log_bytes:
                path.replace(path.with_name(path.name + ".1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _open_counters(self) -> int:
        path = self._folder / stats_name(self.order.kind)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def _read_counters(self) -> Counters:
        try:
            with (self._folder / stats_name(self.order.kind)).open("rb") as file:
                return parse_counters(json.loads(file.read(STATS_BYTES) or b"{}"))
        except (OSError, ValueError, RecursionError):
            return {}


async def end_stranger(folder: Path, kind: str) -> None:
    """End a driver process of the domain that an earlier host process left, if there is one.

    Whoever listens at the driver's socket must be dead before another may write to the same disk.

    :raises HostFailure: it does not go.
    """
    try:
        sock = channels.connect(folder / socket_name(kind), socket.SOCK_SEQPACKET, timeout=1.0)
    except OSError:
        return
    with sock:
        pid = channels.peer(sock)[0]
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
        try:
            # The kernel resets what waits at a dead listener: then this number is another's.
            if _reset(sock):
                return
            LOG.info("ending driver process %d of an earlier host process", pid)
            _signal(pidfd)
            if not await asyncio.to_thread(_ended, pidfd, KILL_TIMEOUT):
                raise HostFailure(f"driver process {pid} does not end: it hangs in the host's kernel")
        finally:
            os.close(pidfd)


def parse_counters(data: object) -> Counters:
    """What a driver process says of its devices; what is no counter is left out.

    :raises ValueError: a number of thousands of digits.
    """
    if not isinstance(data, dict):
        return {}
    return {int(devid): numbers(found) for devid, found in data.items() if str(devid).isdecimal()}


def numbers(data: object) -> dict[str, int]:
    if not isinstance(data, dict):
        return {}
    found = list(data.items())[:MAX_COUNTERS]
    return {str(name)[:40]: value for name, value in found if type(value) is int and 0 <= value < 1 << 63}


def _signal(pidfd: int) -> None:
    if pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _reset(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def _ended(pidfd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
