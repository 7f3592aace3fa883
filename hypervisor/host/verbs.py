"""The verbs of the control socket: an explicit table, arguments checked by type. Nothing else can be called."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from hypervisor.cpu import policy
from hypervisor.errors import DomainNotFound, HostFailure, ProtocolError
from hypervisor.host import inside, protocol
from hypervisor.host.control import ConsolePort
from hypervisor.host.device_specs import KINDS, with_device
from hypervisor.host.ledger import PAGES_PER_MIB
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.migration.offer import check_ours
from hypervisor.host.migration.service import Migrations
from hypervisor.host.migration.verbs import MigrationVerbs
from hypervisor.host.records import Phase
from hypervisor.host.sandbox import Report
from hypervisor.host.saving import Saving
from hypervisor.host.table import Devices, Domain
from hypervisor.host.template_verbs import TemplateVerbs
from hypervisor.host.templates import Templates
from hypervisor.toolstack.api import Capability, DomainEvent, DomainSpec, DomainState, HostInfo
from hypervisor.toolstack.devices import DiskSpec, NicSpec

MAX_WAIT = 24 * 3600.0

Handler = Callable[..., Awaitable[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Verb:
    """:ivar args: name to type (or types); all are required."""

    handler: Handler
    args: dict[str, tuple[type, ...]]


class Verbs:
    """The service behind the control socket."""

    def __init__(self, lifecycle: Lifecycle, sandbox: Report, migrations: Migrations) -> None:
        self._life = lifecycle
        self._table = lifecycle.table
        self._sandbox = sandbox
        self._saving = Saving(lifecycle)
        templates = Templates(lifecycle, self._saving)
        templates.sweep()
        uuid: dict[str, tuple[type, ...]] = {"uuid": (str,)}
        self._verbs = {
            "host.info": Verb(self._host_info, {}),
            "domain.list": Verb(self._list, {}),
            "domain.get": Verb(self._get, uuid),
            "domain.spec": Verb(self._spec, uuid),
            "domain.create": Verb(self._create, {"spec": (dict,)}),
            "domain.unpause": Verb(self._locked(lifecycle.unpause), uuid),
            "domain.pause": Verb(self._locked(lifecycle.pause), uuid),
            "domain.shutdown": Verb(self._locked(self._shutdown), uuid),
            "domain.reboot": Verb(self._locked(self._reboot), uuid),
            "domain.reset": Verb(self._locked(lifecycle.reset), uuid),
            "domain.destroy": Verb(self._locked(lifecycle.destroy), uuid),
            "domain.wait": Verb(self._wait, {**uuid, "states": (list,), "timeout": (int, float)}),
            "domain.set_vcpus": Verb(self._set_vcpus, {**uuid, "vcpus": (int,)}),
            "domain.set_memory": Verb(self._set_memory, {**uuid, "memory_mib": (int,)}),
            "domain.set_scheduling": Verb(self._set_scheduling, {**uuid, "weight": (int,), "cap": (int,)}),
            "domain.redefine": Verb(self._redefine, {**uuid, "spec": (dict,)}),
            "domain.stats": Verb(self._stats, uuid),
            "device.list": Verb(self._device_list, uuid),
            "device.attach": Verb(self._device_attach, {**uuid, "kind": (str,), "spec": (dict,)}),
            "device.detach": Verb(
                self._device_detach,
                {**uuid, "kind": (str,), "id": (str,), "timeout": (int, float), "force": (int,)},
            ),
            "device.resize": Verb(self._device_resize, {**uuid, "id": (str,), "size_bytes": (int,)}),
            "domain.sysrq": Verb(self._sysrq, {**uuid, "key": (str,)}),
            "domain.dump_core": Verb(self._dump_core, {**uuid, "path": (str,)}),
            "domain.save": Verb(self._save, {**uuid, "path": (str,), "keep_running": (int,), "timeout": (int, float)}),
            "domain.restore": Verb(self._restore, {"path": (str,), "owner": (str,), "name": (str,), "uuid": (str,)}),
            "console.log": Verb(self._console_log, {**uuid, "max_bytes": (int,)}),
            **{name: Verb(*found) for name, found in MigrationVerbs(lifecycle.table, migrations).table.items()},
            **{name: Verb(*found) for name, found in TemplateVerbs(templates, self._holding).table.items()},
        }

    async def call(self, verb: str, args: dict[str, Any]) -> Any:
        """:raises ProtocolError: no such verb, or arguments that are not its own."""
        found = self._verbs.get(verb)
        if found is None:
            raise ProtocolError(f"unknown verb {verb[:60]!r}: known are {', '.join(sorted(self._verbs))}")
        for name in args:
            if name not in found.args:
                raise ProtocolError(f"{verb} has no argument {name[:60]!r}")
        for name, types in found.args.items():
            if name not in args:
                raise ProtocolError(f"{verb} needs the argument {name!r}")
            if not isinstance(args[name], types) or isinstance(args[name], bool):
                raise ProtocolError(f"{name} of {verb} is no {' or '.join(kind.__name__ for kind in types)}")
        return await found.handler(**args)

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        return self._table.subscribe(listener)

    def console(self, uuid: str) -> ConsolePort:
        return self._made(uuid).console

    # -- handlers -------------------------------------------------------------------------------------------------

    async def _host_info(self) -> dict[str, Any]:
        facts = await self._life.zygote.start()
        ledger = self._life.ledger
        detail = {
            **dict(facts.detail),
            "runtime": facts.name,
            "seccomp": "yes" if self._sandbox.seccomp else "no",
            "landlock": str(self._sandbox.landlock),
            "sandbox": "; ".join(self._sandbox.missing) or "complete",
            "pid": str(os.getpid()),
            "zygote_pid": str(self._life.zygote.pid),
            "state_dir": str(self._life.settings.state_dir),
            "xenstored_socket": str(self._life.settings.xenstored_socket),
            "cpu_features": " ".join(policy.Choice.parse(self._life.settings.cpu_policy).certain),
            "migration": "\n".join(self._life.settings.migration_files),
        }
        capabilities = set(facts.capabilities)
        if not self._life.settings.can_migrate:
            capabilities -= {Capability.LIVE_MIGRATION, Capability.STANDBY}
        return HostInfo(
            hostname=socket.gethostname(),
            driver="embedded",
            driver_version=protocol.version(),
            cpus=self._life.settings.effective_cpus,
            memory_total_mib=ledger.total // PAGES_PER_MIB,
            memory_free_mib=ledger.free // PAGES_PER_MIB,
            domains=len(self._table.made()),
            capabilities=tuple(sorted(capabilities)),
            detail=tuple(sorted(detail.items())),
        ).to_json()

    async def _list(self) -> list[dict[str, Any]]:
        infos = await asyncio.gather(*(domain.info() for domain in self._table.made()))
        return [info.to_json() for info in infos]

    async def _get(self, uuid: str) -> dict[str, Any]:
        domain = await self._settled(uuid)
        return (await domain.info()).to_json()

    async def _spec(self, uuid: str) -> dict[str, Any]:
        return (await self._settled(uuid)).record.spec.to_json()

    async def _create(self, spec: dict[str, Any]) -> dict[str, Any]:
        domain = await self._life.create(DomainSpec.from_json(spec))
        return (await domain.info()).to_json()

    async def _shutdown(self, domain: Domain) -> None:
        self._life.request_shutdown(domain, "poweroff")

    async def _reboot(self, domain: Domain) -> None:
        self._life.request_shutdown(domain, "reboot")

    async def _wait(self, uuid: str, states: list[Any], timeout: float) -> dict[str, Any] | None:
        try:
            wanted = frozenset(DomainState(state) for state in states)
        except ValueError as exc:
            raise ProtocolError(f"states of domain.wait: {exc}: give {', '.join(DomainState)}") from None
        if not 0 <= timeout <= MAX_WAIT:
            raise ProtocolError(f"timeout of domain.wait is {timeout}: give 0 to {MAX_WAIT:g} seconds")
        domain = await self._table.wait(uuid, wanted, timeout)
        return (await domain.info()).to_json() if domain is not None else None

    async def _console_log(self, uuid: str, max_bytes: int) -> dict[str, Any]:
        domain = await self._settled(uuid)
        data = domain.console.tail(min(max_bytes, protocol.CONSOLE_LOG_MAX))
        return {"data": base64.b64encode(data).decode()}

    async def _sysrq(self, uuid: str, key: str) -> None:
        async with self._holding(uuid) as domain:
            inside.sysrq(domain, key)

    async def _dump_core(self, uuid: str, path: str) -> None:
        async with self._holding(uuid) as domain:
            await inside.dump_core(domain, path)

    async def _save(self, uuid: str, path: str, keep_running: int, timeout: float) -> dict[str, Any]:
        async with self._holding(uuid) as domain:
            info = await self._saving.save(domain, path, keep_running=bool(keep_running), timeout=timeout)
            return info.to_json()

    async def _restore(self, path: str, owner: str, name: str, uuid: str) -> dict[str, Any]:
        domain = await self._saving.restore(path, owner=owner, name=name, uuid=uuid)
        return (await domain.info()).to_json()

    # -- resize ---------------------------------------------------------------------------------------------------

    async def _set_vcpus(self, uuid: str, vcpus: int) -> None:
        async with self._holding(uuid) as domain:
            self._life.check_alive(domain, "change the vCPUs of")
            self._life.resizer.set_vcpus(domain, vcpus)

    async def _set_memory(self, uuid: str, memory_mib: int) -> None:
        async with self._holding(uuid) as domain:
            self._life.check_alive(domain, "change the memory of")
            await self._life.resizer.set_memory(domain, memory_mib)

    async def _set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        async with self._holding(uuid) as domain:
            await self._life.resizer.set_scheduling(domain, weight, cap)

    async def _redefine(self, uuid: str, spec: dict[str, Any]) -> None:
        new = DomainSpec.from_json(spec)
        async with self._holding(uuid) as domain:
            self._life.check(new, await self._life.zygote.start())
            self._life.resizer.redefine(domain, new)

    async def _stats(self, uuid: str) -> dict[str, Any]:
        """What is known, and what the domain process said besides."""
        domain = await self._settled(uuid)
        info = await domain.info()
        told = {name: value for name, value in domain.stats.items() if isinstance(value, int | str)}
        return {
            **told,
            "state": info.state,
            "cpu_time_ns": info.cpu_time_ns,
            "vcpus": info.vcpus,
            "max_vcpus": info.max_vcpus,
            "memory_mib": info.memory_mib,
            "memory_target_mib": info.memory_target_mib,
            "max_memory_mib": info.max_memory_mib,
            "resident_mib": domain.process.handles.resident_bytes() >> 20 if domain.process is not None else 0,
            "weight": domain.record.spec.weight,
            "cap": domain.record.spec.cap,
            "devices": [device.to_json() for device in await self._devices(domain).list()],
        }

    # -- devices --------------------------------------------------------------------------------------------------

    async def _device_list(self, uuid: str) -> list[dict[str, Any]]:
        return [info.to_json() for info in await self._devices(await self._settled(uuid)).list()]

    async def _device_attach(self, uuid: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        device = _kind(kind).from_json(spec)
        async with self._holding(uuid) as domain:
            self._life.check_alive(domain, "attach devices to")
            self._life.check_size(with_device(domain.record.spec, device))
            return (await self._devices(domain).attach(kind, device)).to_json()

    async def _device_detach(self, uuid: str, kind: str, id: str, timeout: float, force: int) -> None:
        _kind(kind)
        if not 0 <= timeout <= MAX_WAIT:
            raise ProtocolError(f"timeout of device.detach is {timeout}: give 0 to {MAX_WAIT:g} seconds")
        domain = await self._settled(uuid)
        check_ours(domain, "detach devices from")
        # Not under the domain's lock: it may take as long as the guest pleases.
        self._life.check_alive(domain, "detach devices from")
        await self._devices(domain).detach(kind, id, timeout, force=bool(force))

    async def _device_resize(self, uuid: str, id: str, size_bytes: int) -> dict[str, Any]:
        async with self._holding(uuid) as domain:
            self._life.check_known(domain)
            return (await self._devices(domain).resize(id, size_bytes)).to_json()

    def _devices(self, domain: Domain) -> Devices:
        assert domain.devices is not None
        return domain.devices

    # -- finding --------------------------------------------------------------------------------------------------

    def _made(self, uuid: str) -> Domain:
        domain = self._table.get(uuid)
        if domain.record.phase is Phase.BUILDING:
            raise DomainNotFound(f"domain {uuid} is still being made: try again")
        return domain

    async def _settled(self, uuid: str) -> Domain:
        """The domain, after a create that is at work has ended."""
        domain = self._table.get(uuid)
        if domain.record.phase is Phase.BUILDING:
            async with domain.lock:
                domain = self._table.get(uuid)
        return domain

    def _locked(self, act: Callable[[Domain], Awaitable[None]]) -> Handler:
        """One verb at a time on a domain; a verb that waited looks the domain up again."""

        async def handler(uuid: str) -> None:
            async with self._holding(uuid) as domain:
                await act(domain)

        return handler

    @contextlib.asynccontextmanager
    async def _holding(self, uuid: str) -> AsyncIterator[Domain]:
        domain = self._table.get(uuid)
        async with domain.lock:
            if self._table.get(uuid) is not domain:
                raise HostFailure(f"domain {uuid} was replaced meanwhile: look at it and try again")
            check_ours(domain, "change")
            yield domain


def _kind(kind: str) -> type[DiskSpec] | type[NicSpec]:
    if kind not in KINDS:
        raise ProtocolError(f"kind {kind[:40]!r} of device is not known: give {' or '.join(KINDS)}")
    return KINDS[kind]
