"""The host process's hold on its switch process: starts it, tells it everything again when it was replaced.

Sockets of nics and uplinks are kept here with both ends, so that neither a switch nor a driver that dies breaks a
connection: what is in them waits for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hypervisor.devices.net.networks import NetworkConfig
from hypervisor.devices.net.switchboard import MAX_MESSAGE
from hypervisor.devices.net.uplinks import Uplink, connect_path, open_uplink
from hypervisor.errors import HostFailure, HostUnavailable, ToolstackError
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

START_TIMEOUT = 20.0
ANSWER_TIMEOUT = 2.0
FIRST_DELAY, LONGEST_DELAY, GOOD_LIFE = 0.05, 2.0, 5.0
UPLINK_LOOK = 1.0
PROGRAM = (sys.executable, "-P", "-m", "hypervisor.host.net_switch")
SOCKET = "switch.sock"
_SEND_BUFFER = 1 << 20


@dataclasses.dataclass(slots=True)
class NicHold:
    """:ivar message: that makes its port. :ivar near: the driver's end of its socket; `far` the switch's."""

    message: dict[str, Any]
    near: socket.socket
    far: socket.socket

    def close(self) -> None:
        self.near.close()
        self.far.close()


@dataclasses.dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    started: float
    ready: asyncio.Future[None]


class SwitchKeeper:
    """:param folder: for sockets, mode 0700. :param sandbox: ``auto`` or ``required``.

    :ivar pid: of the switch process; None while there is none. :ivar starts: how many there were.
    """

    def __init__(
        self, folder: Path, *, sandbox: str = "auto", log_level: int = logging.INFO, program: tuple[str, ...] = PROGRAM
    ) -> None:
        self.starts = 0
        self._folder = folder
        self._arguments = (*program, "--sandbox", sandbox, "--log-level", str(log_level))
        self._running: _Running | None = None
        self._lock = asyncio.Lock()
        self._lifeline: tuple[int, int] | None = None
        self._uplinks: dict[str, tuple[NetworkConfig, Uplink | None]] = {}
        self._nics: dict[str, NicHold] = {}
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._delay = 0.0
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching = False

    @property
    def pid(self) -> int | None:
        return self._running.process.pid if self._running else None

    async def add(
        self, name: str, network: NetworkConfig, mac: str, addresses: list[str], limits: dict[str, Any]
    ) -> None:
        """Make a nic's port. :raises ToolstackError: the network cannot be had."""
        await self.join(network)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (near, far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            end.setblocking(False)
        message = {"op": "nic", "port": name, "network": network.name, "mac": mac}
        hold = NicHold({**message, "addresses": addresses, "limits": limits}, near, far)
        self.remove(name)
        self._nics[name] = hold
        self._send(hold.message, far.fileno())

    async def join(self, network: NetworkConfig) -> None:
        """Have the switch, and the network's uplink. :raises ToolstackError: the network cannot be had."""
        async with self._lock:
            await self._ensure()
            await self._join(network)

    def announce(self, name: str) -> None:
        """Tell everybody that a nic is here now."""
        self._send({"op": "announce", "port": name})

    def socket_of(self, name: str) -> int:
        """A duplicate of the driver's end."""
        return os.dup(self._nics[name].near.fileno())

    def remove(self, name: str) -> None:
        """No effect if there is none."""
        hold = self._nics.pop(name, None)
        if hold is not None:
            self._send({"op": "remove", "port": name})
            hold.close()

    async def stats(self) -> dict[str, Any]:
        """Counters of networks and ports. :raises HostUnavailable: the switch does not answer."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._send({"op": "stats", "id": number})
            return await within(future, ANSWER_TIMEOUT)
        except TimeoutError:
            raise HostUnavailable("the switch does not answer: try again") from None
        finally:
            del self._answers[number]

    def let_go(self) -> None:
        """The host process ends; switch and uplinks go on, for the drivers that do."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._running is not None:
            self._forget(self._running)
        for _, uplink in self._uplinks.values():
            if uplink is not None:
                uplink.let_go()
        for hold in self._nics.values():
            hold.close()
        for fd in self._lifeline or ():
            os.close(fd)
        self._nics, self._lifeline = {}, None

    async def close(self) -> None:
        """End all of it."""
        running = self._running
        self.let_go()
        if running is not None:
            running.process.kill()
            await asyncio.to_thread(running.process.wait)
        for _, uplink in self._uplinks.values():
            if uplink is not None:
                await asyncio.to_thread(uplink.close)
        self._uplinks = {}

    # -- the process ----------------------------------------------------------------------------------------------

    async def _ensure(self) -> None:
        if self._closed:
            raise HostUnavailable("the host process ends")
        if self._running is not None:
            return
        if self._lifeline is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._end_stranger()
            self._lifeline = os.pipe()
        running = self._launch()
        try:
            await within(asyncio.shield(running.ready), START_TIMEOUT)
        except (TimeoutError, HostFailure) as exc:
            running.process.kill()
            self._forget(running)
            await asyncio.to_thread(running.process.wait)
            raise HostFailure(f"the switch did not start ({exc or 'no answer'}): see the host process's log") from exc
        self._running = running
        for network, uplink in self._uplinks.values():
            self._tell_network(network, uplink)
        for hold in self._nics.values():
            self._send(hold.message, hold.far.fileno())

    def _launch(self) -> _Running:
        assert self._lifeline is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        write_end = self._lifeline[1]
        command = [*self._arguments, "--channel-fd", str(theirs.fileno()), "--lifeline-fd", str(write_end)]
        command += ["--socket", str(self._folder / SOCKET)]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno(), write_end],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        except OSError as exc:
            ours.close()
            raise HostFailure(f"the switch cannot be started: {exc.strerror}") from exc
        finally:
            theirs.close()
        ours.setblocking(False)
        self.starts += 1
        loop = asyncio.get_running_loop()
        running = _Running(process, ours, time.monotonic(), loop.create_future())
        loop.add_reader(ours.fileno(), self._message, running)
        return running

    def _message(self, running: _Running) -> None:
        try:
            data = running.channel.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._died(running)
            return
        try:
            message = json.loads(data)
        except ValueError:
            LOG.warning("the switch talks nonsense")
            return
        if "ready" in message and not running.ready.done():
            running.ready.set_result(None)
        future = self._answers.get(message.get("id", 0))
        if future is not None and not future.done():
            future.set_result(message)

    def _died(self, running: _Running) -> None:
        self._forget(running)
        if not running.ready.done():
            running.ready.set_exception(HostFailure("it ended at its start"))
            return
        lived = time.monotonic() - running.started
        self._delay = 0.0 if lived >= GOOD_LIFE else min(LONGEST_DELAY, self._delay * 2 or FIRST_DELAY)
        LOG.warning("the switch (process %d) ended after %.1f s: starting another", running.process.pid, lived)
        self._spawn(self._restart(running))

    async def _restart(self, dead: _Running) -> None:
        dead.process.kill()  # its channel may be broken while it lives
        await asyncio.to_thread(dead.process.wait)
        while not self._closed:
            await asyncio.sleep(self._delay)
            try:
                async with self._lock:
                    await self._ensure()
                return
            except ToolstackError as exc:
                self._delay = min(LONGEST_DELAY, self._delay * 2 or FIRST_DELAY)
                LOG.error("%s", exc.message)

    def _forget(self, running: _Running) -> None:
        if self._running is running:
            self._running = None
        if running.channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(running.channel.fileno())
            running.channel.close()

    async def _end_stranger(self) -> None:
        """The switch of a host process before this one ends when it is called; its uplinks with it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                connect_path(sock, self._folder / SOCKET)
            except OSError:
                return
            LOG.info("ending the switch of an earlier host process")
            sock.settimeout(START_TIMEOUT)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(sock.recv, 1)

    def _send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Lost if there is no switch: the next one is told everything."""
        running = self._running
        if running is None:
            return
        try:
            socket.send_fds(running.channel, [json.dumps(message).encode()], [] if fd is None else [fd])
        except OSError as exc:
            LOG.warning("the switch does not take a message (%s): replacing it", exc)
            running.process.kill()

    # -- uplinks --------------------------------------------------------------------------------------------------

    async def _join(self, network: NetworkConfig) -> None:
        if network.name in self._uplinks:
            return
        uplink = await open_uplink(network, self._folder, self._read_end)
        self._uplinks[network.name] = (network, uplink)
        self._tell_network(network, uplink)
        if not self._watching:
            self._watching = True
            self._spawn(self._watch_uplinks())

    def _read_end(self) -> int:
        assert self._lifeline is not None
        return os.dup(self._lifeline[0])

    def _tell_network(self, network: NetworkConfig, uplink: Uplink | None) -> None:
        message = {"op": "network", "name": network.name, "uplink": uplink.kind if uplink else ""}
        self._send(message, uplink.fd if uplink else None)

    async def _watch_uplinks(self) -> None:
        while True:
            await asyncio.sleep(UPLINK_LOOK)
            for name, (network, uplink) in list(self._uplinks.items()):
                if uplink is None or uplink.alive():
                    continue
                LOG.warning("network %s: its uplink ended: starting another", name)
                uplink.close()
                try:
                    another = await open_uplink(network, self._folder, self._read_end)
                except ToolstackError as exc:
                    LOG.error("%s", exc.message)
                    continue
                self._uplinks[name] = (network, another)
                self._tell_network(network, another)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
