"""A driver with a simulated host: no guest code runs, everything else keeps the toolstack API.

Settings (all optional): ``state_dir`` (a folder shared by every process that gives the same one, and
kept when they die; without it everything ends with the process), ``cpus``, ``memory_mib``, ``hostname``, ``networks``
(names with spaces between them; ``default`` alone unless given), ``first_domid``. Hosts with state folders on one
machine can send each other domains.

What the simulated guest does is in `hypervisor.toolstack.drivers._fake_guest`. Tests steer the host
through the methods below ``test hooks``; injected faults are kept in the state folder, so that one
process can arrange what happens to another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from hypervisor.errors import (
    DomainExists,
    HostUnavailable,
    InsufficientMemory,
    InsufficientVcpus,
    NameInUse,
    SpecInvalid,
    ToolstackError,
    Unsupported,
    WrongState,
    from_json,
)
from hypervisor.toolstack.api import (
    Capability,
    Console,
    DomainEvent,
    DomainInfo,
    DomainSpec,
    DomainState,
    DomainType,
    HostInfo,
    ShutdownReason,
)
from hypervisor.toolstack.drivers import _fake_guest as guest
from hypervisor.toolstack.drivers._fake_console import FakeConsole, follow_events
from hypervisor.toolstack.drivers._fake_moving import MovingVerbs
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store
from hypervisor.toolstack.drivers._files import check_files
from hypervisor.toolstack.info import still

DRIVER_VERSION = "1"
CAPABILITIES = frozenset(
    {
        Capability.PV,
        Capability.SMP,
        Capability.CONSOLE,
        Capability.REBOOT,
        Capability.ADOPTION,
        Capability.DISK,
        Capability.NIC,
        Capability.HOTPLUG,
        Capability.RESIZE,
        Capability.DISK_RESIZE,
        Capability.SYSRQ,
        Capability.DUMP_CORE,
        Capability.SAVE,
        Capability.TEMPLATES,
    },
)
WITH_FOLDER = frozenset({Capability.LIVE_MIGRATION, Capability.STANDBY})
"""What it can do besides when its state is in a folder, where other hosts find it."""
_SETTINGS = {"state_dir", "cpus", "memory_mib", "hostname", "networks", "first_domid"}


def create(settings: Mapping[str, str]) -> FakeToolstack:
    """The driver's factory (entry point ``reeve.drivers``: ``fake``)."""
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise SpecInvalid(f"fake driver: unknown setting {unknown[0]!r}: known are {', '.join(sorted(_SETTINGS))}")
    try:
        cpus = int(settings.get("cpus", "8"))
        memory_mib = int(settings.get("memory_mib", "16384"))
        first_domid = int(settings.get("first_domid", "1"))
    except ValueError as exc:
        raise SpecInvalid(f"fake driver: cpus, memory_mib and first_domid are numbers: {exc}") from exc
    return FakeToolstack(
        settings.get("state_dir") or None,
        cpus=cpus,
        memory_mib=memory_mib,
        hostname=settings.get("hostname", ""),
        networks=settings.get("networks", "default").split(),
        first_domid=first_domid,
    )


class FakeToolstack(MovingVerbs):
    """A `hypervisor.toolstack.api.Toolstack` over a simulated host.

    :param state_dir: where the host's state lives; None keeps it in this object only.
    :param cpus: host CPUs; a domain may have at most so many vCPUs.
    :param memory_mib: memory all domains share, MiB.
    """

    name = "fake"

    def __init__(
        self,
        state_dir: str | None = None,
        *,
        cpus: int = 8,
        memory_mib: int = 16384,
        hostname: str = "",
        networks: Iterable[str] = ("default",),
        first_domid: int = 1,
    ) -> None:
        self.cpus = cpus
        self.networks = frozenset(networks)
        self.memory_mib = memory_mib
        self.hostname = hostname or socket.gethostname()
        self.state_dir = state_dir
        self.store = Store(state_dir, memory_mib, first_domid)

    # what there is

    def capabilities(self) -> frozenset[Capability]:
        return CAPABILITIES | (WITH_FOLDER if self.state_dir is not None else frozenset())

    def host_info(self) -> HostInfo:
        with self._verb("host_info"):
            domains = [domain for domain in self.store.domains() if not domain.hidden]
            return HostInfo(
                hostname=self.hostname,
                driver=self.name,
                driver_version=DRIVER_VERSION,
                cpus=self.cpus,
                memory_total_mib=self.memory_mib,
                memory_free_mib=self.store.free_mib(),
                domains=len(domains),
                capabilities=tuple(sorted(item.value for item in self.capabilities())),
            )

    def list_domains(self) -> list[DomainInfo]:
        with self._verb("list_domains"):
            return [domain.info() for domain in self.store.domains() if not domain.hidden]

    def get_domain(self, uuid: str) -> DomainInfo:
        with self._verb("get_domain"):
            domain = self.store.get(uuid)
            guest.looked_at(self.store, domain)
            return domain.info()

    def get_spec(self, uuid: str) -> DomainSpec:
        with self._verb("get_spec"):
            return self.store.get(uuid).spec

    # verbs

    def create(self, spec: DomainSpec) -> DomainInfo:
        with self._verb("create"):
            spec.validate()
            if spec.type is not DomainType.PV:
                raise Unsupported(f"type {spec.type.value} is not something the fake driver has: give type pv")
            self.check_room(spec)
            check_files(spec)
            devices = self.new_devices(spec)
            domain = FakeDomain(spec=spec, domid=self.store.next_domid(), created_at=time.time(), devices=devices)
            self.store.put(domain)
            self.store.emit("created", spec.uuid)
            return domain.info()

    def unpause(self, uuid: str) -> None:
        with self._verb("unpause"):
            domain = self._live(uuid, "unpause")
            if domain.state is DomainState.PAUSED:
                domain.state = DomainState.RUNNING
                domain.cpu_time_ns += 1_000_000
                self.store.put(domain)
                self.store.emit("unpaused", uuid)
                guest.run(self.store, domain)

    def pause(self, uuid: str) -> None:
        with self._verb("pause"):
            domain = self._live(uuid, "pause")
            if domain.state is DomainState.RUNNING:
                domain.state = DomainState.PAUSED
                self.store.put(domain)
                self.store.emit("paused", uuid)

    def shutdown(self, uuid: str) -> None:
        with self._verb("shutdown"):
            self._request(uuid, "poweroff")

    def reboot(self, uuid: str) -> None:
        with self._verb("reboot"):
            self._request(uuid, "reboot")

    def reset(self, uuid: str) -> None:
        with self._verb("reset"):
            domain = self._readable(uuid)
            guest.restart(self.store, domain)
        if domain.state is DomainState.CRASHED:
            raise InsufficientMemory(f"domain {uuid}: {domain.detail}: ask for less memory")

    def destroy(self, uuid: str) -> None:
        with self._verb("destroy"):
            self._readable(uuid)
            self.store.delete(uuid)
            self.store.emit("destroyed", uuid)

    def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> DomainInfo | None:
        deadline = time.monotonic() + timeout
        with self._verb("wait"):
            pass
        with self.store.changed:
            while True:
                domain = self.store.find(uuid)
                if domain is None:
                    return None
                info = domain.info()
                if info.state in states:
                    return info
                left = deadline - time.monotonic()
                if left <= 0:
                    raise still(uuid, info.state, states, timeout)
                self.store.wait_change(left)

    # console and events

    def console_log(self, uuid: str, max_bytes: int = 65536) -> bytes:
        with self._verb("console_log"):
            self.store.get(uuid)
            kept = self.store.console(uuid)
            return kept[0][-max_bytes:] if kept and max_bytes > 0 else b""

    def open_console(self, uuid: str) -> Console:
        with self._verb("open_console"):
            self.store.get(uuid)
            return FakeConsole(self.store, uuid, self._typed)

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        with self._verb("subscribe"):
            return follow_events(self.store, listener)

    def close(self) -> None:
        self.store.close()

    # test hooks

    def inject_error(self, verb: str, error: ToolstackError, times: int = 1, when: str = "before") -> None:
        """Make the next `times` calls of `verb` (``*``: any) raise `error`.

        With `when` ``after`` the verb does its work first: the caller sees a failure of something that happened.
        """
        self._inject(verb, {"kind": "error", "when": when, "times": times, "error": error.to_json()})

    def inject_delay(self, verb: str, seconds: float, times: int = 1, when: str = "before") -> None:
        self._inject(verb, {"kind": "delay", "when": when, "times": times, "seconds": seconds})

    def inject_kill(self, verb: str, when: str = "before") -> None:
        """Let the next process that calls `verb` die by SIGKILL at that point; needs a shared state folder."""
        self._inject(verb, {"kind": "kill", "when": when, "times": 1})

    def clear_faults(self) -> None:
        with self.store.transaction():
            self.store.clear_faults()

    def crash(self, uuid: str, detail: str = "injected crash") -> None:
        """The guest crashes."""
        with self.store.transaction():
            guest.end(self.store, self.store.get(uuid), ShutdownReason.CRASH, detail)

    def guest_exit(self, uuid: str, reason: ShutdownReason = ShutdownReason.POWEROFF) -> None:
        """The guest ends by itself."""
        with self.store.transaction():
            guest.end(self.store, self.store.get(uuid), reason)

    def guest_print(self, uuid: str, data: bytes) -> None:
        with self.store.transaction():
            self.store.print(uuid, data)

    def set_readable(self, uuid: str, readable: bool) -> None:
        """False: the domain is there but nothing can be learnt of it; its state is ``UNKNOWN``."""
        with self.store.transaction():
            domain = self.store.get(uuid)
            domain.readable = readable
            self.store.put(domain)

    def add_foreign(self, spec: DomainSpec) -> DomainInfo:
        """A domain somebody else made: running, with no owner, and no file checks."""
        with self.store.transaction():
            foreign = dataclasses.replace(spec, owner="")
            domain = FakeDomain(spec=foreign, domid=self.store.next_domid(), created_at=time.time())
            domain.state = DomainState.RUNNING
            self.store.put(domain)
            return domain.info()

    # inside

    def _inject(self, verb: str, doc: dict[str, object]) -> None:
        if doc["when"] not in ("before", "after"):
            raise ValueError(f"when is {doc['when']!r}: give before or after")
        with self.store.transaction():
            self.store.add_fault(verb, doc)

    @contextlib.contextmanager
    def _verb(self, verb: str) -> Iterator[None]:
        self._suffer(verb, "before")
        with self.store.transaction():
            yield
        self._suffer(verb, "after")

    def _suffer(self, verb: str, when: str) -> None:
        for fault in self.store.take_faults(verb, when):
            if fault["kind"] == "delay":
                time.sleep(fault["seconds"])
            elif fault["kind"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise from_json(fault["error"])

    def _readable(self, uuid: str) -> FakeDomain:
        domain = self.store.get(uuid)
        if not domain.readable:
            raise HostUnavailable(f"domain {uuid} cannot be read just now: try again")
        if domain.migration:
            raise WrongState(
                f"domain {uuid} is in the hands of migration {domain.migration}: wait for it, cancel or resolve it"
            )
        return domain

    def _live(self, uuid: str, verb: str) -> FakeDomain:
        domain = self._readable(uuid)
        if domain.ended:
            raise WrongState(f"domain {uuid} is {domain.state.value}, cannot {verb} it: reset or destroy it")
        return domain

    def _request(self, uuid: str, request: str) -> None:
        domain = self._live(uuid, request)
        domain.request = request
        self.store.put(domain)
        if domain.state is DomainState.RUNNING:
            guest.run(self.store, domain)

    def _typed(self, uuid: str, data: bytes) -> None:
        with self.store.transaction():
            domain = self.store.get(uuid)
            self.store.set_input(uuid, self.store.typed_input(uuid) + data)
            if domain.state is DomainState.RUNNING:
                guest.run(self.store, domain)

    def check_room(self, spec: DomainSpec, memory_mib: int = 0) -> None:
        """:param memory_mib: when it is not what the spec says."""
        memory_mib = memory_mib or spec.memory_mib
        domains = self.store.domains()
        for domain in domains:
            if domain.uuid == spec.uuid:
                raise DomainExists(
                    f"uuid {spec.uuid} is in use by domain {domain.spec.name!r}: destroy it or give another"
                )
            if domain.spec.name == spec.name:
                raise NameInUse(f"name {spec.name!r} is in use by domain {domain.uuid}: destroy it or give another")
        if spec.effective_max_vcpus > self.cpus:
            raise InsufficientVcpus(
                f"{spec.effective_max_vcpus} vCPUs asked for, the host has {self.cpus}: give at most {self.cpus}"
            )
        free = self.store.free_mib()
        if memory_mib > free:
            raise InsufficientMemory(
                f"{memory_mib} MiB asked for, {free} MiB of {self.memory_mib} MiB are free: ask for less or"
                " destroy a domain"
            )
