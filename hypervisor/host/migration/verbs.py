"""The verbs ``migration.…`` of the control socket (`hypervisor.host.verbs`): arguments taken apart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hypervisor.errors import ProtocolError
from hypervisor.host.migration.service import Migrations
from hypervisor.host.table import DomainTable
from hypervisor.toolstack.api import MigrationMode, MigrationOffer, MigrationOptions, MigrationTicket

Entry = tuple[Callable[..., Awaitable[Any]], dict[str, tuple[type, ...]]]


class MigrationVerbs:
    """:ivar table: handler and arguments by verb."""

    def __init__(self, domains: DomainTable, migrations: Migrations) -> None:
        self._domains = domains
        self._migrations = migrations
        ident: dict[str, tuple[type, ...]] = {"ident": (str,)}
        about = {**ident, "token": (str,), "peer": (str,)}
        self.table: dict[str, Entry] = {
            "migration.offer": (self._offer, {"uuid": (str,)}),
            "migration.prepare": (self._prepare, {**about, "offer": (dict,), "owner": (str,), "mode": (str,)}),
            "migration.start": (self._start, {**about, "uuid": (str,), "ticket": (dict,), "options": (dict,)}),
            "migration.status": (self._status, ident),
            "migration.list": (self._list, {}),
            "migration.cancel": (self._migrations.cancel, ident),
            "migration.resolve": (self._resolve, {**ident, "keep": (int,)}),
            "migration.takeover": (self._takeover, {**ident, "force": (int,)}),
            "migration.forget": (self._forget, ident),
        }

    async def _offer(self, uuid: str) -> dict[str, Any]:
        domain = self._domains.get(uuid)
        async with domain.lock:
            return await self._migrations.offer(domain)

    async def _prepare(
        self, offer: dict[str, Any], ident: str, token: str, owner: str, mode: str, peer: str
    ) -> dict[str, Any]:
        if mode not in tuple(MigrationMode):
            raise ProtocolError(f"mode {mode[:40]!r} of migration.prepare: give one of {', '.join(MigrationMode)}")
        asked = MigrationOffer.from_json(offer)
        return await self._migrations.prepare(
            asked, ident=ident, token=token, owner=owner, mode=MigrationMode(mode), peer=peer
        )

    async def _start(
        self, uuid: str, ident: str, token: str, ticket: dict[str, Any], options: dict[str, Any], peer: str
    ) -> None:
        given: dict[str, Any] = {
            "ident": ident,
            "token": token,
            "ticket": MigrationTicket.from_json(ticket),
            "options": MigrationOptions.from_json(options),
            "peer": peer,
        }
        domain = self._domains.find(uuid)
        if domain is None:
            await self._migrations.start(None, uuid, **given)
            return
        async with domain.lock:
            await self._migrations.start(domain, uuid, **given)

    async def _status(self, ident: str) -> dict[str, Any]:
        return self._migrations.status(ident)

    async def _list(self) -> list[dict[str, Any]]:
        return self._migrations.list()

    async def _resolve(self, ident: str, keep: int) -> None:
        await self._migrations.resolve(ident, keep=bool(keep))

    async def _takeover(self, ident: str, force: int) -> None:
        await self._migrations.takeover(ident, force=bool(force))

    async def _forget(self, ident: str) -> None:
        self._migrations.forget(ident)
