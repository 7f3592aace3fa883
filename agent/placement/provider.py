"""This host's resource provider: that it is there, with the right name, inventory, traits and aggregates.

Each question is asked again when somebody else changed the provider meanwhile (`Client.repeat`). What others have
added (inventories of other classes, traits, aggregates) stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any

from agent.placement import inventory
from agent.placement.client import Client
from agent.placement.errors import PlacementError

LOG = logging.getLogger(__name__)


class Provider:
    """:param uuid: stays as long as the host does. :param name: may change."""

    def __init__(self, client: Client, uuid: str, name: str) -> None:
        self._client = client
        self.uuid = uuid
        self.name = name

    def ensure(self) -> None:
        """Make or rename it. :raises PlacementError: ``placement.name_taken`` by another one, and others."""
        found = self._client.provider(self.uuid)
        if found is not None and found.name == self.name:
            return
        try:
            if found is None:
                self._client.create_provider(self.uuid, self.name)
                LOG.info("made resource provider %s with the name %s", self.uuid, self.name)
            else:
                self._client.rename_provider(self.uuid, self.name)
                LOG.info("resource provider %s is called %s now, not %s", self.uuid, self.name, found.name)
        except PlacementError as exc:
            if exc.code != "placement.name_taken":
                raise
            self._taken(exc)

    def _taken(self, exc: PlacementError) -> None:
        other = self._client.provider_named(self.name)
        if other is None or other.uuid == self.uuid:
            # Made by a request whose answer was lost; the next look sees it.
            raise PlacementError("placement.conflict", exc.message, retryable=True) from exc
        raise PlacementError(
            "placement.name_taken",
            f"another resource provider, {other.uuid}, is called {self.name!r}: set [placement] provider_uuid to it if "
            "it is this host's from before, else another provider_name",
        ) from exc

    def set_inventories(self, wanted: Mapping[str, Any]) -> bool:
        """:returns: whether there was anything to change."""

        def attempt() -> bool:
            generation, found = self._client.inventories(self.uuid)
            whole = inventory.merged(found, wanted)
            if inventory.same(inventory.merged(found, {}) | _known(found), whole):
                return False
            self._client.set_inventories(self.uuid, generation, whole)
            return True

        return self._client.repeat(attempt)

    def set_traits(self, wanted: Set[str]) -> bool:
        def attempt() -> bool:
            generation, found = self._client.traits(self.uuid)
            whole = {trait for trait in found if not inventory.ours(trait)} | wanted
            if whole == found:
                return False
            for trait in sorted(whole - found):
                if trait.startswith("CUSTOM_"):
                    self._client.create_trait(trait)
            self._client.set_traits(self.uuid, generation, whole)
            return True

        return self._client.repeat(attempt)

    def add_aggregates(self, wanted: Set[str]) -> bool:
        def attempt() -> bool:
            generation, found = self._client.aggregates(self.uuid)
            if wanted <= found:
                return False
            self._client.set_aggregates(self.uuid, generation, found | wanted)
            return True

        return bool(wanted) and self._client.repeat(attempt)


def _known(found: Mapping[str, Any]) -> dict[str, Any]:
    """The inventories of our classes, as they are."""
    return {name: row for name, row in found.items() if name in inventory.CLASSES}
