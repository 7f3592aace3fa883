"""Taking domains over from a host process that is gone.

A domain process answers at its own socket with its identity and its descriptors. What
the record says and what the process says must agree; then the domain is ours again.

* No process listens: the domain's end was not seen. It is CRASHED, with that as detail.
* A process listens but says nothing (it is stopped, or busy): UNKNOWN, until it speaks.
* A half-made domain is removed, and one that has gone to another host; one that was being restarted is restarted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from hypervisor.errors import HostFailure, HypervisorBug, ToolstackError
from hypervisor.host import channel as channels
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.host.handles import Handles
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.process import KILL_TIMEOUT, ProcessHold
from hypervisor.host.records import DomainRecord, Phase
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import DomainState
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

IDENTITY_TIMEOUT = 5.0
"""Seconds the start of the host process waits for all domains; after that they are UNKNOWN until they speak."""

RETRIES, RETRY_AFTER = 20, 0.2


@dataclasses.dataclass(slots=True)
class Contact:
    """A domain process that listens: `pid` is who made the socket, by the kernel's word.

    :ivar task: what waits for its identity.
    """

    pid: int
    pidfd: int
    sock: socket.socket
    task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Quiet when it is closed: whoever ends it and whoever waited for it may both come to this."""
        self.sock.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def gone(self, timeout: float = 0.0) -> bool:
        """:param timeout: seconds to wait for its end."""
        pidfd = self.pidfd
        if pidfd < 0:
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """:raises HostFailure: it does not go."""
        self.kill()
        gone = await asyncio.to_thread(self.gone, KILL_TIMEOUT)
        if self.task is not None and not self.task.done():
            self.task.cancel()
        else:
            self.close()
        if not gone:
            raise HostFailure(f"process {self.pid} does not end: it hangs in the host's kernel")


def contact(directory: Path) -> Contact | None:
    """Connect to a domain's own socket; None when nobody listens there."""
    try:
        sock = channels.connect(directory / channels.DOMAIN_SOCKET, socket.SOCK_SEQPACKET, timeout=1.0)
    except OSError as exc:
        LOG.info("%s: no process (%s)", directory.name, exc)
        return None
    pid = channels.peer(sock)[0]
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return Contact(pid, pidfd, sock)


class Fate(enum.Enum):
    """What becomes of a domain of which there is a record."""

    ADOPT = "adopt"
    HOLD = "hold"  # adopt it, but it must not run, and nobody serves its devices
    REMOVE = "remove"  # it is not, or no longer, this host's


def serve(life: Lifecycle, domain: Domain) -> None:
    """Look after the devices and the size of one that is adopted, and may run."""
    assert domain.devices is not None
    domain.held = False
    domain.devices.adopt()
    life.resizer.begin(domain)


class Adoption:
    """:param life: with its table and ledger still empty.

    :param fate: of domains that were on their way to another host, or from one.
    """

    def __init__(self, life: Lifecycle, fate: Callable[[DomainRecord], Fate] = lambda record: Fate.ADOPT) -> None:
        self._life = life
        self._fate = fate
        self._waiting: set[asyncio.Task[None]] = set()
        life.reconnect = self.reconnect

    async def run(self) -> None:
        """Adopt what is there. Domains that do not answer in time stay UNKNOWN and are adopted when they do."""
        for record in list(self._life.records.load()):
            directory = self._life.records.directory(record.spec.uuid)
            if record.phase is Phase.BUILDING or self._fate(record) is Fate.REMOVE:
                self._remove_half_made(record, directory)
            else:
                self._add(record, directory)
        if self._waiting:
            await asyncio.wait(self._waiting, timeout=IDENTITY_TIMEOUT)

    async def reconnect(self, domain: Domain, process: ProcessHold) -> None:
        """Take up the conversation with a living process again whose channel broke."""
        for _ in range(RETRIES):
            await asyncio.sleep(RETRY_AFTER)
            if domain.process is not process or not process.alive:
                return
            found = contact(self._life.records.directory(domain.uuid))
            if found is None:
                continue
            try:
                message, fds = await within(_receive(Channel(found.sock)), IDENTITY_TIMEOUT)
            except (ChannelClosed, BadMessage, TimeoutError):
                found.close()
                continue
            channels.close_all(fds)
            if domain.process is not process or not _same(domain.record, message):
                found.close()
                return
            os.close(found.pidfd)
            process.relink(Channel(found.sock))
            LOG.info("domain %s: connected again", domain.uuid)
            if message.get("ended"):
                self._life.guest_ended(domain, message["ended"])
            return
        LOG.error("domain %s: its process %d does not answer any more", domain.uuid, process.pid)

    def stop(self) -> None:
        for task in self._waiting:
            task.cancel()

    def _remove_half_made(self, record: DomainRecord, directory: Path) -> None:
        LOG.warning("domain %s was on its way when the host process ended: removing it", record.spec.uuid)
        _kill(directory)
        self._life.records.remove(record.spec.uuid)

    def _add(self, record: DomainRecord, directory: Path) -> None:
        domain = self._life.new_domain(record, directory)
        domain.held = self._fate(record) is Fate.HOLD
        self._life.table.add(domain)
        if record.phase is Phase.REMAKING:
            LOG.warning("domain %s was being restarted when the host process ended: restarting it", domain.uuid)
            _kill(directory)
            record.claim = None
            record.phase = Phase.MADE
            self._life.restart(domain, "interrupted restart")
            return
        found = contact(directory) if record.claim is not None else None
        if record.claim is not None:
            try:
                record.claim = self._life.ledger.adopt(record.claim)
            except HypervisorBug as exc:
                LOG.error("domain %s: %s", domain.uuid, exc)
                record.claim = None
        if found is None:
            self._life.lost(domain)
            return
        self._wait_for(domain, found)

    def _wait_for(self, domain: Domain, found: Contact) -> None:
        domain.lost, domain.orphan = True, found
        found.task = asyncio.get_running_loop().create_task(self._identify(domain, found))
        self._waiting.add(found.task)
        found.task.add_done_callback(self._waiting.discard)

    async def _identify(self, domain: Domain, found: Contact) -> None:
        """Wait, without limit, until the process has said who it is."""
        channel = Channel(found.sock)
        try:
            message, fds = await _receive(channel)
        except (ChannelClosed, BadMessage) as exc:
            LOG.warning("domain %s: process %d closed the connection: %s", domain.uuid, found.pid, exc)
            await self._again(domain, found)
            return
        except BaseException:
            found.close()
            raise
        try:
            handles = Handles.unpack(fds)
        except ValueError as exc:
            channels.close_all(fds)
            self._refuse(domain, found, str(exc))
            return
        if not _same(domain.record, message):
            handles.close()
            self._refuse(domain, found, "it says it is another domain")
            return
        domain.process = ProcessHold(found.pid, found.pidfd, channel, handles, self._life.zygote)
        domain.lost, domain.orphan = False, None
        self._take_over(domain, message)

    async def _again(self, domain: Domain, found: Contact) -> None:
        """It did not speak with us: it is gone, or still holds the connection of the host process before us."""
        for _ in range(RETRIES):
            if await asyncio.to_thread(found.gone, RETRY_AFTER):
                found.close()
                domain.orphan = None
                self._life.lost(domain)
                return
            once_more = contact(self._life.records.directory(domain.uuid))
            if once_more is not None:
                found.close()
                self._wait_for(domain, once_more)
                return
        self._refuse(domain, found, "it does not answer")

    def _take_over(self, domain: Domain, message: Message) -> None:
        record = domain.record
        self._life.watch(domain)
        try:
            domain.attachment = self._life.backends.attach(domain, message["boot"], adopted=True)
        except ToolstackError as exc:
            LOG.error("domain %s: its rings cannot be reached: %s", domain.uuid, exc)
        assert domain.devices is not None
        if not domain.held:
            serve(self._life, domain)
        if message.get("ended"):
            self._life.guest_ended(domain, message["ended"])
        elif not record.ended:
            record.state = DomainState(message["state"])
            if record.suspending and domain.attachment is not None and domain.attachment.withdraw_shutdown():
                record.suspending = False
        LOG.info("domain %s (%s) adopted: %s", domain.uuid, record.spec.name, record.state)
        self._life.table.changed()

    def _refuse(self, domain: Domain, found: Contact, why: str) -> None:
        """Not provably ours: leave it alone, and say nothing of its state."""
        LOG.error("domain %s: process %d is not adopted: %s", domain.uuid, found.pid, why)
        domain.record.detail = f"process {found.pid} at its socket is not adopted: {why}"


async def _receive(channel: Channel) -> tuple[Message, list[int]]:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(channel.fileno(), ready.set)
    try:
        while True:
            await ready.wait()
            try:
                return channel.receive()
            except BlockingIOError:
                ready.clear()
    finally:
        loop.remove_reader(channel.fileno())


def _same(record: DomainRecord, message: Message) -> bool:
    try:
        request = message["request"]
        state = DomainState(message["state"])
        return (
            message["event"] == "identity"
            and request["spec"]["uuid"] == record.spec.uuid
            and request["domid"] == record.domid
            and record.claim is not None
            and request["base_mfn"] == record.claim.base_mfn
            and isinstance(message["boot"], dict)
            and isinstance(state, DomainState)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _kill(directory: Path) -> None:
    """End the process that listens in `directory`, if there is one, and see that it is gone."""
    found = contact(directory)
    if found is None:
        return
    try:
        found.kill()
        if not found.gone(KILL_TIMEOUT):
            LOG.error("process %d does not end", found.pid)
    finally:
        found.close()
