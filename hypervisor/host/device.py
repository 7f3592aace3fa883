"""One device of a domain in the host process: its state between the front end's wishes and the driver process.

A device looks at what is (the front end's state, the driver's generation, whether it is to go) and takes the
step that is due; it never relies on having seen every change. So it does not matter how many changes a
guest makes, in which order, or what happened while nobody looked. Only the device's own task writes its
back end's nodes.

======================  ==============================================================================
front end's state       what the back end does
======================  ==============================================================================
Initialising            InitWait, with the features; a connected one is disconnected first (kexec)
Initialised, Connected  the driver is told to connect, then Connected with what the back end says
Closing                 the driver disconnects, Closing
Closed, none            the driver disconnects, Closed; a device that is to go, goes
anything else           nothing
======================  ==============================================================================
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from hypervisor.devices.driver import Backend, DeviceBroken, Opened
from hypervisor.devices.rate import Bucket
from hypervisor.devices.xenbus import XenbusDevice, XenbusState, printable
from hypervisor.errors import HostFailure, HostUnavailable, ToolstackError
from hypervisor.host import channel as channels
from hypervisor.host import finishing
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.device_specs import Spec
from hypervisor.host.drivers import DriverHold, numbers
from hypervisor.toolstack.devices import DeviceInfo, DeviceState
from hypervisor.xenstore.errors import XenstoreError

LOG = logging.getLogger(__name__)

LOOKS_PER_SECOND, LOOKS_AT_ONCE = 2.0, 50.0
"""How often one front end can make the host process look at it."""
RETRY_AFTER, LONGEST_RETRY = 0.2, 5.0
"""Seconds before what did not work is tried again, doubled each time."""

_WANTS = (XenbusState.INITIALISED, XenbusState.CONNECTED)


class Device:
    """:param opener: opens the device; called again after the host process was replaced.

    :param save: writes `memory` down. :param gone: called once when the device has left.
    """

    def __init__(
        self,
        spec: Spec,
        backend: Backend,
        bus: XenbusDevice,
        driver: DriverHold,
        *,
        save: Callable[[], None],
        gone: Callable[[Device], None],
        memory: DeviceMemory | None = None,
    ) -> None:
        self.spec = spec
        self.kind = backend.kind
        self.backend = backend
        self.memory = memory or DeviceMemory()
        self.opened: Opened | None = None
        self.closed = asyncio.Event()
        self._bus = bus
        self.driver = driver
        self._save = save
        self._gone = gone
        self._generation = 0  # of the driver that serves it; 0: none
        self._problem = ""  # for people; it is being tried again
        self._reported = ""  # by the driver: it has given the device up
        self._wake = asyncio.Event()
        self._force = self._guest_ended = False
        self._bucket = Bucket(LOOKS_PER_SECOND, LOOKS_AT_ONCE, time.monotonic)
        self._unwatch: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None
        self.looking = asyncio.Lock()  # whoever has it keeps driver, memory and nodes as they are

    @property
    def id(self) -> str:
        return str(self.spec.id)

    @property
    def devid(self) -> int:
        return self.spec.devid

    # -- from outside ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write its nodes unless they are there, and serve it. :raises HostFailure: xenstore refuses them."""
        try:
            if not self._bus.is_laid_out():
                assert self.opened is not None
                self._bus.lay_out(self.opened.nodes, self.opened.frontend)
            self._unwatch = self._bus.watch_frontend(lambda path: self._wake.set())
        except XenstoreError as exc:
            raise HostFailure(f"xenstore refuses the nodes of {self.kind} {self.id}: {exc}") from exc
        self._wake.set()
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def leave(self) -> None:
        """Ask the front end to let go; `closed` is set when it has."""
        self.memory.leaving = True
        self._save()
        self._wake.set()

    def force(self) -> None:
        """Take it away now."""
        self._force = True
        self._wake.set()

    def driver_died(self, counted: dict[str, int]) -> None:
        """Its driver process is gone, with what it had counted last."""
        if self.memory.front is not None:
            self.memory.restarts += 1
            self.memory.count(counted)
            self._save()
        self._wake.set()

    def report(self, what: str, detail: str) -> None:
        if what == "broken" and self.memory.front is not None:
            self._reported = printable(detail) or "its driver gave it up"
            self._wake.set()
        else:
            LOG.warning("%s %s: %s: %s", self.kind, self._bus.paths.backend, what, printable(detail))

    def guest_ended(self) -> None:
        """The guest runs no more: nothing of it is served."""
        self._guest_ended = True
        self._wake.set()

    async def end(self) -> None:
        """Stop looking after it; its driver must be gone already. What was opened is given back."""
        await self._stop_task()
        self._close()

    async def let_go(self) -> None:
        """The host process ends, the device does not."""
        await self._stop_task()

    # -- to another host ------------------------------------------------------------------------------------------

    async def quiesce(self) -> None:
        """The guest stands still: its driver lets go. `begin` takes it up again. :raises HostUnavailable."""
        await self._stop_task()
        self.memory.count(await self.driver.leave(self.devid))
        self._generation = 0

    async def flush(self) -> None:
        """:raises HostFailure: not all of its content is where another host finds it."""
        try:
            if self.opened is not None:
                await self.opened.flush()
        except HostFailure:
            # The driver does not know, and must not tell the guest that a flush went well.
            await self.quiesce()
            self.begin()
            raise

    async def pack(self, *, copied: bool) -> dict[str, Any]:
        """After `quiesce`: give back what was opened, unless it was `copied`. :returns: JSON of its memory and more.

        :raises HostFailure: as `flush`; nothing is given back then.
        """
        if (opened := self.opened) is None:
            return {**self.memory.to_json(), "carried": self.memory.carried or {}}
        await opened.flush()
        told = {**self.memory.to_json(), "carried": opened.leave()}
        if not copied:
            self.opened = None
            opened.close() if opened.end is None else await opened.end()
        return told

    async def ask(self, op: str, fds: Sequence[int]) -> dict[str, Any] | None:
        """What its driver process answers; None: there is none, and needs none now. :raises HostUnavailable: ended."""
        if self.driver.pid is None and self.memory.front is None:
            return None
        return await self.driver.request(op, {"devid": self.devid}, fds)

    async def info(self) -> DeviceInfo:
        stats = dict(self.memory.counted)
        if self.memory.front is not None and self._generation == self.driver.generation:
            for name, value in (await self.driver.counters(self.devid)).items():
                stats[name] = stats.get(name, 0) + value
        stats["restarts"] = self.memory.restarts
        return DeviceInfo(
            kind=self.kind,
            id=self.id,
            state=self.state,
            spec=self.spec.to_json(),
            size_bytes=self.opened.size_bytes if self.opened is not None else 0,
            detail=self.memory.broken or self._problem,
            stats=stats,
        )

    @property
    def state(self) -> DeviceState:
        if self.memory.broken:
            return DeviceState.FAILED
        if self.memory.leaving:
            return DeviceState.CLOSING
        if self._guest_ended:
            return DeviceState.CLOSED
        if self.memory.front is not None:
            served = self._generation == self.driver.generation and self.driver.pid is not None
            return DeviceState.CONNECTED if served else DeviceState.RECOVERING
        return DeviceState.CLOSED if self._bus.state() is XenbusState.CLOSED else DeviceState.CONNECTING

    async def changed(self, spec: Spec, nodes: dict[str, str]) -> None:
        """The opened device has another size or other limits: tell driver and front end."""
        self.spec = spec
        assert self.opened is not None
        try:
            if self.memory.front is None:
                return
            await self.driver.request("update", {"devid": self.devid, "device": self.opened.config})
        except HostUnavailable:
            LOG.info("%s %s: the next driver is told", self.kind, self._bus.paths.backend)
        if self.memory.front is not None and self._bus.state() is XenbusState.CONNECTED:
            self._bus.switch(XenbusState.CONNECTED, nodes)

    # -- its task -------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        retry = RETRY_AFTER
        while not self.closed.is_set():
            await self._wake.wait()
            if not self._force:
                await asyncio.sleep(self._bucket.delay())
            self._bucket.take()
            try:
                async with self.looking:
                    self._wake.clear()
                    await self._look()
                self._problem, retry = "", RETRY_AFTER
                continue
            except (ToolstackError, XenstoreError, OSError) as exc:
                before, self._problem = self._problem, printable(str(exc))
                level = logging.DEBUG if before == self._problem else logging.WARNING
                LOG.log(level, "%s %s: %s; trying again", self.kind, self._bus.paths.backend, exc)
            except Exception:
                LOG.exception("%s %s", self.kind, self._bus.paths.backend)
            self._wake.set()
            await asyncio.sleep(retry)
            retry = min(LONGEST_RETRY, retry * 2)

    async def _look(self) -> None:
        """Take the step that is due."""
        memory = self.memory
        if self._guest_ended:
            await self._disconnect()
            return
        front = self._bus.frontend_state()
        if self._force or (memory.leaving and not self._is_held(front)):
            await self._leave()
        elif memory.leaving and self._bus.is_online():
            self._bus.set_online(False)
            self._bus.switch(XenbusState.CLOSING)
            await self._keep(front)
        elif self._reported:
            why, self._reported = self._reported, ""
            await self._disconnect()
            self._refuse(why)
            self._wake.set()  # for what the front end has done meanwhile
        elif front in _WANTS:
            await self._keep(front)
        elif front is XenbusState.INITIALISING:
            await self._disconnect()
            self._set_broken("")
            if not memory.leaving and self._bus.state() is not XenbusState.INIT_WAIT:
                opened = await self._open()
                self._bus.switch(XenbusState.INIT_WAIT, opened.nodes)
        elif front is XenbusState.CLOSING:
            await self._disconnect()
            self._switch_once(XenbusState.CLOSING)
        elif front in (XenbusState.CLOSED, XenbusState.UNKNOWN):
            await self._disconnect()
            self._switch_once(XenbusState.CLOSED)

    def _is_held(self, front: XenbusState) -> bool:
        """Whether the guest may still use it."""
        return self.memory.front is not None and front not in (XenbusState.CLOSED, XenbusState.UNKNOWN)

    async def _keep(self, front: XenbusState) -> None:
        """Have the device served by the driver there is now."""
        memory, config = self.memory, self.memory.front
        if memory.broken or front not in _WANTS or (config is None and memory.leaving):
            return
        if config is None:
            try:
                config = self.backend.frontend(self._bus.read_frontend)
            except DeviceBroken as exc:
                self._refuse(str(exc))
                return
        await self._connect(config)

    async def _connect(self, config: dict[str, Any]) -> None:
        """No effect if the driver there is serves it."""
        memory = self.memory
        if memory.front is not None and self._generation == await self.driver.ensure():
            return
        opened, generation = await self._open(), await self.driver.ensure()
        fds = list(opened.fds())
        try:
            message = {"devid": self.devid, "config": {"frontend": config, "device": opened.config}}
            answer = await self.driver.request("connect", message, fds)
        finally:
            channels.close_all(fds)
        if "broken" in answer:
            memory.front = None
            self._refuse(str(answer["broken"]))
            return
        self._generation = generation
        fresh, memory.front = memory.front is None, config
        self._save()
        if fresh:
            self._bus.set_error("")
        if self._bus.state() is not XenbusState.CONNECTED and not memory.leaving:
            self._bus.switch(XenbusState.CONNECTED, opened.connected)
        LOG.info("%s %s: %s", self.kind, self._bus.paths.backend, "connected" if fresh else "connected again")

    async def _open(self) -> Opened:
        if self.opened is None:
            self.opened = await self.backend.open(self.driver.order.uuid, self._bus.paths.domid, self.spec)
        if self.memory.carried is not None:
            self.opened.arrive(self.memory.carried)
            self.memory.carried = None
            self._save()
        return self.opened

    async def _disconnect(self) -> None:
        """No effect if it is not connected."""
        if self.memory.front is None:
            return
        if self._generation and self._generation == self.driver.generation:
            try:
                answer = await self.driver.request("disconnect", {"devid": self.devid})
                self.memory.count(numbers(answer.get("stats")))
            except HostUnavailable:
                LOG.info("%s %s: its driver is gone", self.kind, self._bus.paths.backend)
        self._generation = 0
        self.memory.front = None
        self._save()

    def _refuse(self, why: str) -> None:
        """It cannot be served until the front end begins anew."""
        self._set_broken(printable(why))
        LOG.warning("%s %s: %s", self.kind, self._bus.paths.backend, self.memory.broken)
        self._bus.set_error(self.memory.broken)
        self._bus.switch(XenbusState.CLOSING)

    def _set_broken(self, why: str) -> None:
        if self.memory.broken != why:
            self.memory.broken = why
            self._save()

    def _switch_once(self, state: XenbusState) -> None:
        if self._bus.state() is not state:
            self._bus.switch(state)

    async def _leave(self) -> None:
        """The guest has let go, or is not asked."""
        await finishing.until_quiet(self._finish)
        await self._disconnect()
        self._bus.set_online(False)
        self._bus.switch(XenbusState.CLOSED)
        self._unwatch()
        self._bus.remove()
        self._close()
        self._gone(self)

    async def _finish(self) -> dict[str, int] | None:
        if self._force or (config := self.memory.front) is None:
            return None
        await self._connect(config)
        return await self.driver.finish(self.devid)

    def _close(self) -> None:
        opened, self.opened = self.opened, None
        if opened is not None:
            try:
                opened.close()
            except Exception:
                LOG.exception("closing %s %s", self.kind, self.id)
        self.closed.set()

    async def _stop_task(self) -> None:
        self._unwatch()
        self._unwatch = lambda: None
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
