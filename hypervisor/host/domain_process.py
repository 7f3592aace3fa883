"""A domain process: one guest, alone with its memory.

It is forked by the zygote, builds the guest, gives up its rights (`sandbox`) and
runs it. It outlives the host process: when the channel breaks the guest goes on, and
whoever connects to its own socket (``<state>/domains/<uuid>/sock``) next is its host.
After the guest has ended the process stays, holding memory and the reason, until it
is killed: so the end of a domain is provable even if nobody looked.

Messages from the host: ``{"id", "op"}`` with op ``commit``, ``pause``, ``unpause``, ``stats``, ``limit_memory``,
``set_cap``, ``link``, ``unlink`` (`hypervisor.devices.link`), ``hold``, ``release``, ``core`` (for core dumps),
``save``, ``saved`` and ``resume`` (of a guest that has suspended itself), and those of `hypervisor.host.moving`; the
answer is ``{"id", "result"}`` or ``{"id", "error"}``. Events to the host: ``built``, ``failed``, ``ended`` and, first
thing on a new connection, ``identity`` with the descriptors of `Handles`.
"""

from __future__ import annotations

import functools
import gc
import logging
import mmap
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypervisor.errors import HostFailure, ToolstackError, WrongState
from hypervisor.host import channel as channels
from hypervisor.host import moving, sandbox
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.host.domain_verbs import DomainVerbs
from hypervisor.host.frozen import freezer, open_pagemap
from hypervisor.host.guest_link import GuestLinks
from hypervisor.host.handles import Handles, answer, ring
from hypervisor.host.moving import MigrationPart
from hypervisor.host.neighbours import Neighbours, neighbours_of
from hypervisor.host.poller import Poller
from hypervisor.host.runtime import BuildRequest, Ended, Guest, Runtime, Template
from hypervisor.host.saving_thread import Saving
from hypervisor.host.surroundings import own_surroundings
from hypervisor.stages import stage
from hypervisor.toolstack.api import DomainState, ShutdownReason

LOG = logging.getLogger(__name__)


class DomainProcess(DomainVerbs):
    """:param sandbox_required: refuse to run without seccomp."""

    def __init__(
        self,
        request: BuildRequest,
        handles: Handles,
        channel: Channel,
        directory: Path,
        runtime: Runtime,
        *,
        sandbox_required: bool,
        sources: Sequence[int] = (),
    ) -> None:
        self.request = request
        self.handles = handles
        self.directory = directory
        self.runtime = runtime
        self.sandbox_required = sandbox_required
        self._sources = sources
        self.state = DomainState.PAUSED
        self.ended: Ended | None = None
        self._host: Channel | None = channel
        self._lock = threading.Lock()  # guards _host, state and ended
        self._guest: Guest | None = None
        self._report = sandbox.Report(False, 0)
        self._listener: socket.socket | None = None
        self._held = False
        self._poller = Poller()
        self._links: GuestLinks | None = None
        self._neighbours: Neighbours | None = None
        self._migration: MigrationPart | None = None
        self._saving: Saving | None = None

    def main(self) -> None:
        """Returns only if the domain never came to life; otherwise the process ends by a signal from the host."""
        try:
            guest = self._build()
        except ToolstackError as exc:
            self._send({"event": "failed", "error": exc.to_json()})
            return
        except MemoryError:
            error = HostFailure("the host ran out of memory while it built the domain: free some and try again")
            self._send({"event": "failed", "error": error.to_json()})
            return
        except Exception as exc:
            LOG.exception("building failed")
            error = HostFailure(f"building the domain failed: {type(exc).__name__}: {exc}; see the host process's log")
            self._send({"event": "failed", "error": error.to_json()})
            return
        if not self._committed():
            return
        gc.collect()
        gc.freeze()
        stage("collected")
        threading.Thread(target=self._serve, name="channel", daemon=True).start()
        try:
            ended = guest.run()
        except Exception as exc:
            LOG.exception("the machine failed")
            ended = Ended(ShutdownReason.CRASH, f"hypervisor error: {type(exc).__name__}: {exc}; see domain.log")
        self._finish(ended)
        threading.Event().wait()

    def _build(self) -> Guest:
        self._listener = channels.listen(self.directory / channels.DOMAIN_SOCKET, socket.SOCK_SEQPACKET, backlog=4)
        memory = mmap.mmap(self.handles.memory, 0)
        log, pagemap = moving.open_log(), open_pagemap()
        sealed: list[sandbox.Report] = []
        seal = functools.partial(self._seal, sealed)
        if self.request.template:
            template = Template(self._sources[0], self._sources[1], self.handles.memory)
            guest = self.runtime.clone(self.request, memory, self._notify_host, seal, template)
        elif self.request.image:
            guest = self.runtime.restore(self.request, memory, self._notify_host, seal, self._sources[0])
        else:
            guest = self.runtime.build(self.request, memory, self._notify_host, seal)
        self._guest = guest
        target = guest.link_target()
        saver = guest.saver()
        if saver is not None and target is not None:
            freeze = freezer(target, guest.boot, self.handles.memory, pagemap)
            self._saving = Saving(saver, self.handles.memory, self._send, freeze)
            saver.watch(self._suspended)
        if target is not None:
            self._links = GuestLinks(target, self._poller)
            self._neighbours = neighbours_of(target, self.handles.memory, self._poller, self._ask_for)
            self._migration = moving.part(guest.moving(), log, target.writable, self._neighbours)
        report = sealed[0] if sealed else sandbox.restrict()
        stage("linked")
        self._report = sandbox.lock_down(report, required=self.sandbox_required, profile=moving.profile(log))
        stage("locked")
        return guest

    def _seal(self, sealed: list[sandbox.Report]) -> None:
        sealed.append(sandbox.restrict())

    def _committed(self) -> bool:
        """Wait for the host's word. Without it the domain was never made, so there is nothing to keep alive."""
        assert self._guest is not None and self._host is not None
        host = self._host
        try:
            host.send({"event": "built", "boot": self._guest.boot, "sandbox": self._report.to_json()})
            while True:
                message, fds = host.receive()
                channels.close_all(fds)
                if message.get("op") == "commit":
                    break
                error = WrongState("the domain is still being made: try again")
                host.send({"id": message.get("id"), "error": error.to_json()})
        except (ChannelClosed, BadMessage) as exc:
            LOG.warning("the host went away before the domain was made: %s", exc)
            return False
        host.setblocking(False)
        self._send({"id": message.get("id"), "result": {}})
        return True

    def _notify_host(self, port: int) -> None:
        bell = self.handles.to_host.get(port)
        if bell is not None:  # any other port of domain 0 is a driver's, and none is bound to it now
            ring(bell)

    def _ask_for(self, domid: int) -> bool:
        """Have the host introduce a neighbour; False: no host is there."""
        self._send({"event": "neighbour", "domid": domid})
        return self._host is not None

    def _finish(self, ended: Ended) -> None:
        LOG.info("guest ended: %s %s", ended.reason, ended.detail)
        if self._neighbours is not None:
            self._neighbours.end()
        with self._lock:
            self.ended = ended
            self.state = DomainState.CRASHED if ended.reason is ShutdownReason.CRASH else DomainState.SHUTDOWN
        if self._links is not None:
            self._poller.call(self._links.guest_ended)
        self._send({"event": "ended", **_ended_json(ended)})

    def _suspended(self) -> None:
        """In the guest's thread, which waits then: the host is told, and says what becomes of it."""
        with self._lock:
            self.ended = Ended(ShutdownReason.SUSPEND)
            self.state = DomainState.SHUTDOWN
        self._send({"event": "ended", **_ended_json(self.ended)})

    # -- the channel thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """An idle domain wakes for nothing."""
        assert self._listener is not None
        self._poller.add(self._listener.fileno(), self._accept)
        for port, bell in self.handles.to_guest.items():
            self._poller.add(bell, functools.partial(self._rung, bell, port))
        with self._lock:
            if self._host is not None:
                self._attend(self._host)
        self._poller.run()

    def _rung(self, bell: int, port: int) -> None:
        if answer(bell):
            self._running_guest().notify(port)

    def _attend(self, host: Channel) -> None:
        self._poller.add(host.fileno(), lambda: self._one_message(host))

    def _one_message(self, host: Channel) -> None:
        try:
            message, fds = host.receive()
        except BlockingIOError:
            return
        except BadMessage as exc:
            LOG.warning("host: %s", exc)
            return
        except ChannelClosed:
            self._detach(host)
            return
        answer = self._answer(message, fds)
        if answer:
            self._send({"id": message.get("id"), **answer})

    def _accept(self) -> None:
        """A host process is back. While one is attached no other is taken."""
        assert self._listener is not None and self._guest is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            LOG.warning("accept: %s", exc)
            return
        if not channels.allowed(channels.peer(sock)[1]) or self._host_is_there():
            sock.close()
            return
        sock.setblocking(False)
        new = Channel(sock)
        with self._lock:
            identity: Message = {
                "event": "identity",
                "request": self.request.to_json(),
                "boot": self._guest.boot,
                "state": self.state,
                "ended": _ended_json(self.ended) if self.ended else None,
                "sandbox": self._report.to_json(),
                "migration": self._migration.state() if self._migration is not None else {},
            }
            try:
                new.send(identity, self.handles.pack())
            except (ChannelClosed, BlockingIOError) as exc:
                LOG.warning("a host connected and left: %s", exc)
                new.close()
                return
            self._host = new
        self._attend(new)

    def _host_is_there(self) -> bool:
        host = self._host
        if host is not None and host.is_closed():
            self._detach(host)
            host = None
        return host is not None

    def _detach(self, host: Channel) -> None:
        with self._lock:
            if self._host is host:
                self._host = None
        self._drop(host)

    def _drop(self, host: Channel) -> None:
        """In the channel thread."""
        self._release()
        self._poller.remove(host.fileno())
        host.close()

    def _send(self, message: Message) -> None:
        with self._lock:
            host = self._host
            if host is None:
                return
            try:
                host.send(message)
                return
            except BlockingIOError:
                LOG.warning("the host does not read: dropping it")
            except ChannelClosed:
                pass
            self._host = None
        self._poller.call(lambda: self._drop(host))


def run_child(
    request: BuildRequest,
    fds: list[int],
    directory: Path,
    runtime: Runtime,
    *,
    sandbox_required: bool,
    log_level: int,
) -> NoReturn:
    """The forked child's whole life. `fds`: channel, log file, `Handles.pack`, and what it comes from."""
    code = 1
    try:
        sandbox.close_other_fds([0, 1, 2, *fds])
        own_surroundings(f"reeve-dom{request.domid}", fds[1], log_level)
        stage("forked")
        process = DomainProcess(
            request,
            Handles.unpack(fds[2 : 2 + Handles.COUNT]),
            channels.from_fd(fds[0]),
            directory,
            runtime,
            sandbox_required=sandbox_required,
            sources=fds[2 + Handles.COUNT :],
        )
        process.main()
        code = 0
    except BaseException:
        LOG.exception("domain process failed")
    finally:
        os._exit(code)


def _ended_json(ended: Ended) -> dict[str, Any]:
    return {"reason": ended.reason, "detail": ended.detail}
