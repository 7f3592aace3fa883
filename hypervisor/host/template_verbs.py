"""The verbs ``template.…`` of the control socket (`hypervisor.host.verbs`)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from hypervisor.host.table import Domain
from hypervisor.host.templates import Templates
from hypervisor.toolstack.api import DomainSpec

Entry = tuple[Callable[..., Awaitable[Any]], dict[str, tuple[type, ...]]]


class TemplateVerbs:
    """:param holding: a domain, under its lock. :ivar table: handler and arguments by verb."""

    def __init__(
        self, templates: Templates, holding: Callable[[str], contextlib.AbstractAsyncContextManager[Domain]]
    ) -> None:
        self._templates = templates
        self._holding = holding
        name: dict[str, tuple[type, ...]] = {"name": (str,)}
        about = {**name, "uuid": (str,), "ident": (str,), "keep_running": (int,), "timeout": (int, float)}
        self.table: dict[str, Entry] = {
            "template.create": (self._create, about),
            "template.list": (self._list, {}),
            "template.get": (self._get, name),
            "template.remove": (self._remove, {**name, "force": (int,)}),
            "template.clone": (self._clone, {**name, "spec": (dict,)}),
        }

    async def _create(self, uuid: str, name: str, ident: str, keep_running: int, timeout: float) -> dict[str, Any]:
        async with self._holding(uuid) as domain:
            made = await self._templates.create(
                domain, name, ident=ident, keep_running=bool(keep_running), timeout=timeout
            )
            return made.to_json()

    async def _list(self) -> list[dict[str, Any]]:
        return [info.to_json() for info in self._templates.all()]

    async def _get(self, name: str) -> dict[str, Any]:
        return self._templates.get(name).to_json()

    async def _remove(self, name: str, force: int) -> None:
        await self._templates.remove(name, force=bool(force))

    async def _clone(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        domain = await self._templates.clone(name, DomainSpec.from_json(spec))
        return (await domain.info()).to_json()
