"""The host's hold on one domain process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.errors import HostFailure, from_json
from hypervisor.host import channel as channels
from hypervisor.host.channel import Channel, Message
from hypervisor.host.handles import Handles, answer, ring
from hypervisor.host.link import Link
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

KILL_TIMEOUT = 10.0
REQUEST_TIMEOUT = 5.0


class ProcessHold:
    """A living domain process: how to speak to it, ring it, end it, and hear of its end.

    :ivar on_ended: called with the ``ended`` message when the guest has ended.
    :ivar on_exit: called once with the exit code (negative for a signal, None unknown) when the process is gone.
    :ivar on_neighbour: called when the guest wants to reach the domain of that number.
    :ivar on_unlinked: called when the channel broke though the process may live.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        channel: Channel,
        handles: Handles,
        zygote: ZygoteClient,
    ) -> None:
        self.pid = pid
        self.handles = handles
        self.on_ended: Callable[[Message], None] = lambda message: None
        self.on_exit: Callable[[int | None], None] = lambda code: None
        self.on_neighbour: Callable[[int], None] = lambda domid: None
        self.exit_code: int | None = None
        self._pidfd = pidfd
        self._zygote = zygote
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._built: asyncio.Future[Message] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._doorbells: set[int] = set()
        self.on_unlinked: Callable[[], None] = lambda: None
        self.link = Link(channel, self._event, self._unlinked)
        self._loop.add_reader(pidfd, self._pid_readable)

    @property
    def alive(self) -> bool:
        return not self._exited.is_set()

    async def built(self, timeout: float) -> Message:
        """The ``built`` message. :raises ToolstackError: why it could not be built."""
        exited = self._loop.create_task(self._exited.wait())
        waiting: set[asyncio.Future[Any]] = {self._built, exited}
        try:
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
        if self._built.done():
            message = self._built.result()
            if message["event"] == "failed":
                raise from_json(message["error"])
            return message
        if self._exited.is_set():
            raise HostFailure(
                f"the domain process ended while it built the domain ({describe_exit(self.exit_code)}): "
                "see the log of the host process"
            )
        raise HostFailure(f"building the domain took longer than {timeout:g} s: give a smaller kernel or ramdisk")

    async def gone(self, timeout: float) -> bool:
        """Whether the process is gone, or goes within `timeout` seconds."""
        try:
            await within(self._exited.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def request(
        self,
        op: str,
        timeout: float = REQUEST_TIMEOUT,
        fields: Mapping[str, Any] | None = None,
        fds: Sequence[int] = (),
    ) -> dict[str, Any]:
        """As `Link.request`."""
        return await self.link.request(op, timeout, fields, fds)

    def listen(self, port: int, notified: Callable[[], None]) -> None:
        """Call `notified` when the guest signals `port`, at once if it has while nobody listened."""
        fd = self.handles.to_host[port]

        def readable() -> None:
            if answer(fd):
                try:
                    notified()
                except Exception:
                    LOG.exception("backend of port %d of process %d", port, self.pid)

        self._loop.add_reader(fd, readable)
        self._doorbells.add(fd)

    def unlisten(self, port: int) -> None:
        fd = self.handles.to_host[port]
        if fd in self._doorbells:
            self._doorbells.discard(fd)
            self._loop.remove_reader(fd)

    def ring(self, port: int) -> None:
        """Signal the guest's `port`."""
        ring(self.handles.to_guest[port])

    def relink(self, channel: Channel) -> None:
        """Speak with it over another connection; its doorbells stay."""
        self.link.close()
        self.link = Link(channel, self._event, self._unlinked)

    def kill(self) -> None:
        """End it now. It cannot refuse, and the pidfd makes sure that no other process is meant."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it, wait until it is gone, let go of everything. :raises HostFailure: it does not go."""
        self.on_exit = lambda code: None
        self.on_ended = lambda message: None
        self.on_unlinked = lambda: None
        self.kill()
        if not await self.gone(KILL_TIMEOUT):
            raise HostFailure(
                f"process {self.pid} does not end: it hangs in the host's kernel; its memory stays claimed"
            )
        self.close()

    def close(self) -> None:
        """Let go without ending it."""
        self._deafen()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            self.handles.close()
        self.link.close()

    def _deafen(self) -> None:
        for fd in self._doorbells:
            self._loop.remove_reader(fd)
        self._doorbells.clear()

    def _event(self, message: Message, fds: list[int]) -> None:
        channels.close_all(fds)
        kind = message["event"]
        if kind in ("built", "failed") and not self._built.done():
            self._built.set_result(message)
        elif kind == "ended":
            self.on_ended(message)
        elif kind == "neighbour" and type(message.get("domid")) is int:
            self.on_neighbour(message["domid"])

    def _unlinked(self) -> None:
        """The channel broke. If the process lives, it dropped a host that did not read: it can be called again."""
        if self.alive:
            self.on_unlinked()

    def _pid_readable(self) -> None:
        self._loop.remove_reader(self._pidfd)
        task = self._loop.create_task(self._gone())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _gone(self) -> None:
        code = reap(self._pidfd)
        if code is None:
            code = await self._zygote.exit_code(self.pid)
        # Whatever it said last is still in the channel.
        while not self.link.closed and self.link.readable():
            self.link.read_one()
        self.exit_code = code
        self._exited.set()
        self.on_exit(code)


def reap(pidfd: int) -> int | None:
    """Reap it if it is our own child (its zygote died before it)."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def describe_exit(code: int | None) -> str:
    if code is None:
        return "nobody saw how"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}"
