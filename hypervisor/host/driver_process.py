"""A driver process: a domain's devices of one kind, outside of the host process and of the guest.

It is forked by the zygote, loads its driver, gives up its rights (`sandbox`) and serves rings. It holds its
channel to the host process, its link to the domain process, what was opened for its devices, and
nothing else. It may be killed at any moment: the next one is told the same devices again and replays their
rings. It outlives the host process, so that a guest's disks go on; the next host process finds it at its socket
(``<state>/domains/<uuid>/driver-<kind>.sock``, which it never answers) and replaces it. It ends with its guest.

Messages from the host: ``{"id", "op"}`` with op ``connect`` (``devid``, ``config``, descriptors), ``update``
(``devid``, ``device``), ``finish``, ``disconnect`` and ``leave`` (``devid``), ``stats``, ``quit``, to drivers that
record what is written ``track`` (``devid``, a descriptor or none) and ``written`` (``devid``, a descriptor), and, for a
guest with a standby, ``hold``, ``boundary`` (``epoch``; ``still``: serve nothing from now on), ``go_on`` after it,
``release`` (``epoch``), ``let_out`` and ``discard`` (`hypervisor.devices.driver.Committing`). Answers:
``{"id", "result"}``, in which ``broken`` says why a device cannot be served, or ``{"id", "error"}``. Events: ``ready``
and ``report`` (``devid``, ``what``, ``detail``).
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypervisor.devices import registry
from hypervisor.devices.driver import (
    Committing,
    DeviceBroken,
    Driver,
    Finishing,
    GuestLink,
    Leaving,
    LinkClosed,
    LinkError,
    Recording,
)
from hypervisor.errors import HostFailure
from hypervisor.host import channel as channels
from hypervisor.host import guarded_link, sandbox, seccomp
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.host.driver_loop import EventLoop
from hypervisor.host.surroundings import own_surroundings

LOG = logging.getLogger(__name__)

MAX_OPEN_FILES = 1024
STATS_EVERY = 1.0
"""Seconds between two notes of the counters, while there is something to note."""
STATS_BYTES = 16384
_AT_ONCE = ("go_on", "quit", "written")
"""Ops that a driver which stands still does not put off."""
OWN_FDS = 3
"""Channel, log, counters; the link's descriptors come after them."""


@dataclasses.dataclass(frozen=True, slots=True)
class DriverOrder:
    """What a driver process is made for.

    :ivar factory: ``module:attribute`` of the driver.
    :ivar link: of what makes a `GuestLink`, for guests that are no machines; "": the real one.
    :ivar log_bytes: how much it may write into its log.
    """

    uuid: str
    domid: int
    kind: str
    factory: str
    link: str = ""
    log_bytes: int = 4 << 20

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DriverOrder:
        return cls(**data)


def socket_name(kind: str) -> str:
    return f"driver-{kind}.sock"


def log_name(kind: str) -> str:
    return f"driver-{kind}.log"


def stats_name(kind: str) -> str:
    return f"driver-{kind}.stats"


class DriverProcess:
    """:param stats_fd: a file that is kept up to date with the counters, for the time after a SIGKILL."""

    def __init__(self, channel: Channel, link: GuestLink, loop: EventLoop, stats_fd: int) -> None:
        self._channel: Channel | None = channel
        self._link = link
        self._loop = loop
        self._stats_fd = stats_fd
        self._noting = False
        self._driver: Driver | None = None
        self._still = False

    def serve(self, factory: Callable[..., Driver], report: sandbox.Report) -> None:
        """Until the guest is gone or the host says so."""
        loop = self._loop
        self._driver = factory(self._link, loop, self._report)
        assert self._channel is not None
        loop.add_reader(self._channel.fileno(), self._one_message)
        loop.add_reader(self._link.fileno(), self._look_at_link)
        loop.on_activity = self._note_stats_soon
        self._send({"event": "ready", "sandbox": report.to_json()})
        try:
            loop.run()
        except LinkClosed:
            LOG.info("the guest has ended")

    def _look_at_link(self) -> None:
        if not self._link.alive():
            LOG.info("the domain process is gone")
            self._loop.stop()

    def _one_message(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            message, fds = channel.receive()
        except BlockingIOError:
            return
        except BadMessage as exc:
            LOG.warning("host: %s", exc)
            return
        except ChannelClosed:
            self._detach()
            return
        self._send({"id": message.get("id"), **self._answer(message, fds)})
        if self._still:
            self._stand_still()

    def _stand_still(self) -> None:
        """Nothing of the guest is touched; what the host asks for meanwhile is done afterwards."""
        later: list[tuple[Message, list[int]]] = []
        while self._still and (channel := self._channel) is not None:
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN)
            poll.register(self._link.fileno(), select.POLLIN)
            ready = dict(poll.poll())
            if self._link.fileno() in ready and not self._link.alive():
                break
            if channel.fileno() not in ready:
                continue
            try:
                message, fds = channel.receive()
            except (BlockingIOError, BadMessage) as exc:
                LOG.warning("host: %s", exc)
            except ChannelClosed:
                self._detach()
            else:
                if message.get("op") in _AT_ONCE:
                    self._send({"id": message.get("id"), **self._answer(message, fds)})
                else:
                    later.append((message, fds))
        self._still = False
        for message, fds in later:
            self._send({"id": message.get("id"), **self._answer(message, fds)})

    def _answer(self, message: Message, fds: list[int]) -> Message:
        """Descriptors belong to the driver as soon as it is told of them."""
        op = str(message.get("op"))
        verbs: dict[str, Callable[[], dict[str, Any]]] = {
            "connect": lambda: self._connect(int(message["devid"]), message["config"], fds),
            "update": lambda: self._update(int(message["devid"]), message["device"]),
            "finish": lambda: self._finish(int(message["devid"])),
            "disconnect": lambda: self._disconnect(int(message["devid"])),
            "leave": lambda: self._disconnect(int(message["devid"]), leaves=True),
            "track": lambda: self._track(int(message["devid"]), fds),
            "written": lambda: self._written(int(message["devid"]), fds),
            "stats": self._stats,
            "quit": self._quit,
            "boundary": lambda: self._boundary(int(message["epoch"]), still=bool(message.get("still"))),
            "go_on": self._go_on,
            "hold": lambda: self._commit(lambda driver: driver.hold()),
            "release": lambda: self._commit(lambda driver: driver.release(int(message["epoch"]))),
            "let_out": lambda: self._commit(lambda driver: driver.let_out()),
            "discard": lambda: self._commit(lambda driver: driver.discard()),
        }
        verb = verbs.get(op)
        if verb is None:
            channels.close_all(fds)
            return {"error": HostFailure(f"unknown op {op!r}").to_json()}
        try:
            return {"result": verb()}
        except (DeviceBroken, LinkError) as exc:
            if isinstance(exc, LinkClosed):
                raise
            return {"result": {"broken": str(exc)}}
        except (KeyError, TypeError, ValueError, OSError) as exc:
            LOG.exception("op %s failed", op)
            return {"result": {"broken": f"{op}: {type(exc).__name__}: {exc}; see driver log"}}

    def _connect(self, devid: int, config: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._the_driver().connect(devid, config, fds)
        # What the file says of this number is an earlier device's.
        self._note_stats()
        return {}

    def _update(self, devid: int, device: dict[str, Any]) -> dict[str, Any]:
        self._the_driver().update(devid, device)
        return {}

    def _finish(self, devid: int) -> dict[str, Any]:
        """The answer has the device's counters, if more may come."""
        driver = self._the_driver()
        if not isinstance(driver, Finishing):
            return {}
        driver.finish(devid)
        return {"stats": driver.stats().get(devid, {})}

    def _disconnect(self, devid: int, *, leaves: bool = False) -> dict[str, Any]:
        """The answer has the device's last counters."""
        driver = self._the_driver()
        counters = driver.stats().get(devid, {})
        if leaves and isinstance(driver, Leaving):
            driver.leave(devid)
        else:
            driver.disconnect(devid)
        self._note_stats()  # told here, and not once more when this process dies
        return {"stats": counters}

    def _track(self, devid: int, fds: list[int]) -> dict[str, Any]:
        self._recording(fds).track(devid, fds[0] if fds else None)
        return {}

    def _written(self, devid: int, fds: list[int]) -> dict[str, Any]:
        return {"known": self._recording(fds).written(devid, fds[0])}

    def _recording(self, fds: list[int]) -> Recording:
        driver = self._the_driver()
        if not isinstance(driver, Recording):
            channels.close_all(fds)
            raise DeviceBroken("this driver does not record what is written")
        return driver

    def _boundary(self, epoch: int, *, still: bool) -> dict[str, Any]:
        """The answer has all counters."""
        self._commit(lambda driver: driver.boundary(epoch))
        self._still = still
        return self._stats()

    def _go_on(self) -> dict[str, Any]:
        self._still = False
        return {}

    def _commit(self, what: Callable[[Committing], None]) -> dict[str, Any]:
        """No effect on a driver that sends nothing out."""
        driver = self._the_driver()
        if isinstance(driver, Committing):
            what(driver)
        return {}

    def _stats(self) -> dict[str, Any]:
        return {"stats": {str(devid): counters for devid, counters in self._the_driver().stats().items()}}

    def _quit(self) -> dict[str, Any]:
        self._still = False
        self._loop.stop()
        return {}

    def _note_stats_soon(self) -> None:
        """An idle driver wakes for nothing."""
        if not self._noting:
            self._noting = True
            self._loop.call_later(STATS_EVERY, self._note_stats_now)

    def _note_stats_now(self) -> None:
        self._noting = False
        self._note_stats()

    def _note_stats(self) -> None:
        text = json.dumps(self._stats()["stats"], separators=(",", ":")).encode()
        if len(text) <= STATS_BYTES:
            os.pwrite(self._stats_fd, text.ljust(STATS_BYTES), 0)

    def _the_driver(self) -> Driver:
        assert self._driver is not None
        return self._driver

    def _report(self, devid: int, what: str, detail: str) -> None:
        self._send({"event": "report", "devid": devid, "what": what, "detail": detail[:500]})

    def _send(self, message: Message) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(message)
        except BlockingIOError:
            LOG.warning("the host does not read")
            self._detach()
        except ChannelClosed:
            self._detach()

    def _detach(self) -> None:
        """The host process is gone; the guest goes on."""
        channel, self._channel = self._channel, None
        if channel is not None:
            LOG.info("the host process is gone")
            self._loop.remove_reader(channel.fileno())
            channel.close()


class BoundedLog(io.TextIOBase):
    """Writes to descriptor 2 until `limit` bytes are written, then nothing: a guest must not fill the disk."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def write(self, text: str) -> int:
        data = text.encode(errors="replace")[: self._left]
        self._left -= len(data)
        if data:
            os.write(2, data)
        return len(text)


def _link(order: DriverOrder, fds: Sequence[int], *, required: bool) -> tuple[GuestLink, str]:
    """The link, and what its sandbox lacks."""
    if order.link:
        made: GuestLink = registry.attribute(order.link)(*fds)
        return made, ""
    sock, buffer, memory, memory_ro = fds
    return guarded_link.connect(sock, buffer, memory, memory_ro, required=required)


def run_child(
    order: DriverOrder, fds: Sequence[int], directory: Path, *, sandbox_required: bool, log_level: int
) -> NoReturn:
    """The forked child's whole life. `fds`: as `OWN_FDS` says."""
    code = 1
    try:
        gc.enable()
        sandbox.close_other_fds([0, 1, 2, *fds])
        own_surroundings(f"reeve-{order.kind}{order.domid}", fds[1], log_level)
        os.close(fds[1])
        stream = BoundedLog(order.log_bytes)
        logging.basicConfig(
            level=log_level, stream=stream, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        listener = channels.listen(directory / socket_name(order.kind), socket.SOCK_SEQPACKET, backlog=4)
        factory = registry.attribute(order.factory)
        channel, loop = channels.from_fd(fds[0]), EventLoop()
        link, unguarded = _link(order, fds[OWN_FDS:], required=sandbox_required)
        process = DriverProcess(channel, link, loop, fds[2])
        report = sandbox.restrict(max_file_size=sandbox.NO_LIMIT, max_open_files=MAX_OPEN_FILES)
        report = sandbox.lock_down(report, required=sandbox_required, profile=seccomp.DRIVER)
        if unguarded:
            report = dataclasses.replace(report, missing=(*report.missing, unguarded))
        channel.setblocking(False)
        process.serve(factory, report)
        listener.close()
        code = 0
    except BaseException:
        LOG.exception("driver process failed")
    finally:
        sys.stderr.flush()
        os._exit(code)
