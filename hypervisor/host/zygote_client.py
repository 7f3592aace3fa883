"""The host's hold on its zygote: starts it, asks it for children, starts another when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import subprocess
import sys
from typing import Any

from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.host import channel as channels
from hypervisor.host.channel import Message
from hypervisor.host.link import Link
from hypervisor.host.runtime import RuntimeFacts
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

START_TIMEOUT = 60.0
SPAWN_TIMEOUT = 20.0

# Libraries that start helper threads when loaded would make the zygote unsafe to fork.
_SINGLE_THREADED = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclasses.dataclass(slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    link: Link
    ready: asyncio.Future[RuntimeFacts]
    spawns: dict[int, asyncio.Future[tuple[int, int]]] = dataclasses.field(default_factory=dict)


class ZygoteClient:
    """:param runtime: ``module:attribute`` that the zygote loads."""

    def __init__(self, runtime: str, log_level: int = logging.INFO) -> None:
        self._runtime = runtime
        self._log_level = log_level
        self._running: _Running | None = None
        self._numbers = itertools.count(1)
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._lock = asyncio.Lock()
        self.facts: RuntimeFacts | None = None

    @property
    def pid(self) -> int | None:
        return self._running.process.pid if self._running else None

    async def start(self) -> RuntimeFacts:
        """:raises HostFailure: it cannot start, with the reason."""
        async with self._lock:
            if self._running is None:
                self._running = await self._launch()
        assert self.facts is not None
        return self.facts

    async def spawn(self, message: dict[str, Any], fds: list[int]) -> tuple[int, int]:
        """Fork a domain or driver process. :return: its pid and a pidfd that the caller owns.

        :param message: its ``op`` and what belongs to it (`hypervisor.host.zygote`).
        """
        await self.start()
        running = self._running
        if running is None:
            raise HostFailure("the zygote died while it started: see the log of the host process")
        number = next(self._numbers)
        future: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        running.spawns[number] = future
        try:
            running.link.send({"op": "spawn", **message, "id": number}, fds)
            return await within(future, SPAWN_TIMEOUT)
        except TimeoutError:
            raise HostUnavailable(f"the zygote did not fork within {SPAWN_TIMEOUT:g} s: try again") from None
        finally:
            running.spawns.pop(number, None)

    async def exit_code(self, pid: int, timeout: float = 1.0) -> int | None:
        """How a child ended, negative for a signal; None if it cannot be known."""
        future = self._exits.get(pid)
        if future is None:
            return None
        try:
            return await within(asyncio.shield(future), timeout)
        except TimeoutError:
            return None
        finally:
            self._exits.pop(pid, None)

    async def stop(self) -> None:
        """Domain processes are not touched."""
        running, self._running = self._running, None
        if running is not None:
            running.link.close()
            await asyncio.to_thread(_reap, running.process)

    async def _launch(self) -> _Running:
        loop = asyncio.get_running_loop()
        ours, theirs = channels.pair()
        command = [sys.executable, "-P", "-m", "hypervisor.host.zygote", "--channel-fd", str(theirs.fileno())]
        command += ["--runtime", self._runtime, "--log-level", str(self._log_level)]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={**os.environ, **_SINGLE_THREADED},
            )
        except OSError as exc:
            ours.close()
            raise HostFailure(f"the zygote cannot be started: {exc}") from exc
        finally:
            theirs.close()
        ready: asyncio.Future[RuntimeFacts] = loop.create_future()
        running = _Running(
            process,
            Link(ours, lambda m, f: self._event(running, m, f), lambda: self._died(running)),
            ready,
        )
        try:
            self.facts = await within(ready, START_TIMEOUT)
        except (TimeoutError, HostFailure) as exc:
            running.link.close()
            process.kill()
            await asyncio.to_thread(_reap, process)
            raise HostFailure(f"the zygote did not start: {exc or 'no answer'}; see the host process's log") from exc
        LOG.info("zygote %d is ready: %s", process.pid, self.facts.name)
        return running

    def _event(self, running: _Running, message: Message, fds: list[int]) -> None:
        kind = message["event"]
        if kind == "ready":
            if not running.ready.done():
                running.ready.set_result(RuntimeFacts.from_json(message["facts"]))
        elif kind == "spawned":
            pid = int(message["pid"])
            self._exits[pid] = asyncio.get_running_loop().create_future()
            future = running.spawns.get(message["id"])
            if future is not None and not future.done():
                future.set_result((pid, fds[0]))
                fds = fds[1:]
        elif kind == "failed":
            future = running.spawns.get(message["id"])
            if future is not None and not future.done():
                future.set_exception(HostFailure(f"the zygote could not fork: {message.get('why')}"))
        elif kind == "exited":
            exit_future = self._exits.get(int(message["pid"]))
            if exit_future is not None and not exit_future.done():
                exit_future.set_result(int(message["code"]))
        channels.close_all(fds)

    def _died(self, running: _Running) -> None:
        if self._running is running:
            self._running = None
            LOG.warning("the zygote died: the next domain starts another; running domains are not touched")
        if not running.ready.done():
            running.ready.set_exception(HostFailure("it ended before it was ready"))
        for future in running.spawns.values():
            if not future.done():
                future.set_exception(HostUnavailable("the zygote died: try again"))
        asyncio.get_running_loop().run_in_executor(None, _reap, running.process)


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
