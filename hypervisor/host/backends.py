"""What serves a domain from the host process: xenstore and console."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Any

from hypervisor.devices.console import ConsoleRing
from hypervisor.errors import HostFailure, WrongState
from hypervisor.host.process import ProcessHold
from hypervisor.host.runtime import CONSOLE_PORT, STORE_PORT
from hypervisor.host.settings import HostSettings
from hypervisor.host.table import Domain
from hypervisor.xenstore import domain_nodes
from hypervisor.xenstore.errors import Invalid, NotFound, XenstoreError
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.journal import StateDamaged, open_server
from hypervisor.xenstore.path import domain_path
from hypervisor.xenstore.ring import XenstoreRing
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.transport_unix import UnixServer

LOG = logging.getLogger(__name__)

STORE_FILE = "xenstore"


class HostBackends:
    """xenstored and the consoles of one host.

    :raises HostFailure: the saved xenstore cannot be used.
    """

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        path = settings.state_dir / STORE_FILE
        try:
            self.server = open_server(path)
        except StateDamaged as exc:
            raise HostFailure(str(exc)) from exc
        except OSError as exc:
            raise HostFailure(f"xenstore state {path} cannot be opened: {exc.strerror}; correct its rights") from exc
        loop = asyncio.get_running_loop()
        self.handle = Handle(self.server, loop.call_soon)
        domain_nodes.prepare_host(self.handle)
        self._unix: UnixServer | None = None
        self._attached: dict[int, DomainBackends] = {}
        self.server.ring_mapper = self._introduce

    async def start(self, known: frozenset[int]) -> None:
        """Open the socket for tools. :param known: domids that are served; what is of others is forgotten."""
        for domid in self.server.domains:
            if domid not in known:
                LOG.info("xenstore: domain %d is gone", domid)
                self._forget(domid)
        path = self._settings.xenstored_socket
        self._unix = UnixServer(self.server, path)
        try:
            await self._unix.start()
        except OSError as exc:
            self._unix = None
            raise HostFailure(f"xenstored's socket {path} cannot be made: {exc}; set xenstored_socket") from exc

    async def stop(self) -> None:
        if self._unix is not None:
            await self._unix.stop()

    def attach(self, domain: Domain, boot: dict[str, object], *, adopted: bool) -> DomainBackends:
        """:raises HostFailure: the rings are not where the domain process says, or xenstore refuses the nodes."""
        domain.boot = boot
        backends = DomainBackends(self.server, self.handle, domain, boot, adopted=adopted)
        self._attached[domain.record.domid] = backends
        backends.on_close = lambda: self._attached.pop(backends.domid, None)
        return backends

    def _introduce(self, domid: int, _gfn: int, port: int) -> None:
        """A tool's INTRODUCE. As in Xen, the page is the one that the domain was built with."""
        if domid not in self._attached:
            raise NotFound(f"there is no domain {domid}")
        self._attached[domid].introduce(port)

    def _forget(self, domid: int) -> None:
        uuid = (self.handle.read(f"{domain_path(domid)}/vm") or "").rpartition("/")[2]
        self.server.release(domid)
        domain_nodes.remove(self.handle, domid, uuid or "none")


class DomainBackends:
    """The rings of one domain process."""

    def __init__(
        self, server: Server, handle: Handle, domain: Domain, boot: dict[str, object], *, adopted: bool
    ) -> None:
        assert domain.process is not None
        self._server = server
        self._handle = handle
        self._domain = domain
        self._process: ProcessHold = domain.process
        self.domid = self._domid = domain.record.domid
        self.on_close: Callable[[], object] = lambda: None
        self._asked = ""
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            store = _page(undo, domain, boot, "store_mfn")
            console = _page(undo, domain, boot, "console_mfn")
            try:
                if not (adopted and handle.exists(domain_path(self._domid))):
                    domain_nodes.lay_out(handle, _nodes(domain, boot))
                self._store = self._new_ring(store)
                self._page = store
                self._serve_store(undo)
            except XenstoreError as exc:
                raise HostFailure(f"xenstore refuses domain {self._domid}: {exc}") from exc
            self._console = self._serve_console(undo, console)
            self._undo = undo.pop_all()

    def request_shutdown(self, reason: str) -> None:
        """:raises WrongState: its nodes are gone."""
        try:
            domain_nodes.request_shutdown(self._handle, self._domid, reason)
            self._asked = reason
        except NotFound:
            raise WrongState(f"domain {self._domain.uuid} has no control/shutdown node: destroy or reset it") from None

    def withdraw_shutdown(self) -> bool:
        path, self._asked = f"{domain_path(self._domid)}/control/shutdown", ""
        if self._handle.read(path) not in domain_nodes.SHUTDOWN_REASONS:
            return False
        self._handle.write(path, "")
        return True

    def request_sysrq(self, key: str) -> None:
        """:raises WrongState: its nodes are gone."""
        try:
            domain_nodes.request_sysrq(self._handle, self._domid, key)
        except NotFound:
            raise WrongState(f"domain {self._domain.uuid} has no control/sysrq node: destroy or reset it") from None

    def notice(self) -> str:
        """A guest takes a request by emptying its node (`domain_nodes.shutdown_acknowledged`)."""
        waiting = self._handle.read(f"{domain_path(self._domid)}/control/shutdown")
        if waiting in domain_nodes.SHUTDOWN_REASONS:
            return f"asked to {waiting}, and has not taken the request"
        return f"asked to {self._asked}, and has taken the request" if self._asked and waiting == "" else ""

    def set_vcpus(self, vcpus: int, max_vcpus: int) -> None:
        home = domain_path(self._domid)
        with self._handle.transaction():
            for number in range(max_vcpus):
                path = f"{home}/cpu/{number}/availability"
                value = "online" if number < vcpus else "offline"
                if self._handle.read(path) != value:
                    self._handle.write(path, value)

    def set_memory_target(self, kib: int) -> None:
        self._handle.write(f"{domain_path(self._domid)}/memory/target", str(kib))

    def introduce(self, port: int) -> None:
        """Serve its xenstore ring from the beginning, also after a RELEASE. :raises Invalid: another port."""
        if port != STORE_PORT:
            raise Invalid(f"domain {self._domid} has its xenstore port {STORE_PORT}, not {port}")
        if not self._server.is_introduced(self._domid):
            self._store.close()
            self._store = self._new_ring(self._page)
        self._store.reset()

    def ended(self) -> None:
        """The guest runs no more: take what it printed last, tell the watchers of @releaseDomain."""
        self._console.on_notify()
        self._server.domain_shutdown(self._domid)

    def detach(self) -> None:
        """The domain is gone, with all that is its own in xenstore."""
        with contextlib.suppress(NotFound):
            self._server.release(self._domid)
        self._close()
        try:
            domain_nodes.remove(self._handle, self._domid, self._domain.uuid)
        except XenstoreError as exc:
            LOG.error("nodes of domain %d: %s", self._domid, exc)

    def let_go(self) -> None:
        """The domain lives on without this host process."""
        self._domain.record.console = self._console.save()
        self._close()

    def _close(self) -> None:
        self.on_close()
        self._undo.close()  # the console ring hands out what was printed last
        self._domain.console.disconnect()

    def _new_ring(self, page: memoryview) -> XenstoreRing:
        loop = asyncio.get_running_loop()
        return XenstoreRing(self._server, self._domid, page, lambda: self._process.ring(STORE_PORT), loop.call_later)

    def _serve_store(self, undo: contextlib.ExitStack) -> None:
        undo.callback(lambda: self._store.close())
        undo.callback(self._process.unlisten, STORE_PORT)
        self._process.listen(STORE_PORT, lambda: self._store.on_notify())

    def _serve_console(self, undo: contextlib.ExitStack, page: memoryview) -> ConsoleRing:
        hub = self._domain.console
        loop = asyncio.get_running_loop()
        ring = ConsoleRing(
            page,
            lambda: self._process.ring(CONSOLE_PORT),
            hub.open_log(),
            loop.call_later,
            state=self._domain.record.console or None,
            label=f"console of domain {self._domid}",
        )
        undo.callback(ring.close)
        undo.callback(self._process.unlisten, CONSOLE_PORT)
        hub.connect(ring)
        self._process.listen(CONSOLE_PORT, ring.on_notify)
        return ring


def _page(undo: contextlib.ExitStack, domain: Domain, boot: dict[str, object], name: str) -> memoryview:
    mfn, claim, process = boot.get(name), domain.record.claim, domain.process
    assert claim is not None and process is not None
    if not isinstance(mfn, int):
        raise HostFailure(f"the domain process did not say its {name}: see domain.log")
    try:
        page = process.handles.map_page(mfn - claim.base_mfn)
    except (ValueError, OSError) as exc:
        raise HostFailure(f"{name} of the domain cannot be mapped: {exc}") from exc
    undo.callback(page.close)
    view = memoryview(page)
    undo.callback(view.release)
    return view


def _nodes(domain: Domain, boot: dict[str, Any]) -> domain_nodes.DomainNodes:
    spec, run = domain.record.spec, domain.record.run
    return domain_nodes.DomainNodes(
        domid=domain.record.domid,
        uuid=spec.uuid,
        name=spec.name,
        memory_kib=run.memory_mib * 1024,
        max_memory_kib=run.max_memory_mib * 1024,
        vcpus=run.vcpus,
        max_vcpus=run.max_vcpus,
        store_port=STORE_PORT,
        store_mfn=boot["store_mfn"],
        console_port=CONSOLE_PORT,
        console_mfn=boot["console_mfn"],
        owner=spec.owner,
        kernel=spec.boot.kernel,
        ramdisk=spec.boot.ramdisk or "",
        cmdline=spec.boot.cmdline,
        template=domain.record.template,
        generation=secrets.token_hex(16),
        start_time=domain.record.created_at,
    )
