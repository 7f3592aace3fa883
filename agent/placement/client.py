"""Placement's API, as much of it as a host needs.

One version of it is asked for. What somebody else changed meanwhile is a `Conflict`: whoever asked reads again and
decides again, with `repeat`, a bounded number of times.

Source: the Placement API reference; the calls are those of nova's report client.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from agent.keystone import Asks
from agent.placement import answers
from agent.placement.auth import Auth
from agent.placement.errors import Conflict, PlacementError

T = TypeVar("T")

VERSION = "1.38"
"""The first that knows consumer types; Placement of OpenStack Xena, 2021."""
ATTEMPTS = 4
PAUSE = 0.25
"""Most seconds before the second attempt; twice as many before each further one."""

Resources = Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Provider:
    uuid: str
    name: str
    generation: int


@dataclasses.dataclass(frozen=True, slots=True)
class Consumer:
    """What one consumer has, at all providers; without `allocations` there is none.

    :ivar generation: None for one that is not there.
    """

    allocations: Mapping[str, Resources] = dataclasses.field(default_factory=dict)
    project: str = ""
    user: str = ""
    type: str = ""
    generation: int | None = None


class Client:
    """For one thread at a time.

    :param endpoint: Placement's URL; "" for what `auth` knows.
    :param wait: waits so many seconds, or shorter; True to give up.
    """

    def __init__(
        self,
        http: Asks,
        auth: Auth,
        endpoint: str = "",
        *,
        wait: Callable[[float], bool] = lambda seconds: False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._http = http
        self._auth = auth
        self._endpoint = endpoint
        self._wait = wait
        self._chance = chance

    def repeat(self, attempt: Callable[[], T]) -> T:
        """Do it again, with a pause of random length, while others change the same. :raises Conflict: at last."""
        for number in range(ATTEMPTS - 1):
            try:
                return attempt()
            except Conflict:
                if self._wait(self._chance() * PAUSE * 2**number):
                    raise
        return attempt()

    def provider(self, uuid: str) -> Provider | None:
        status, found = self._ask("GET", f"/resource_providers/{uuid}", good=(200, 404))
        return None if status == 404 else _provider(answers.checked(answers.PROVIDER, found, "the provider"), uuid)

    def provider_named(self, name: str) -> Provider | None:
        _, found = self._ask("GET", f"/resource_providers?name={quote(name, safe='')}")
        items = answers.checked(answers.PROVIDERS, found, "providers")["resource_providers"]
        return next((_provider(item) for item in items if item["name"] == name), None)

    def create_provider(self, uuid: str, name: str) -> Provider:
        """:raises Conflict: the UUID is there. :raises PlacementError: ``placement.name_taken``."""
        _, found = self._ask("POST", "/resource_providers", {"uuid": uuid, "name": name})
        return _provider(answers.checked(answers.PROVIDER, found, "the new provider"), uuid)

    def rename_provider(self, uuid: str, name: str) -> None:
        """:raises PlacementError: ``placement.name_taken``."""
        self._ask("PUT", f"/resource_providers/{uuid}", {"name": name})

    def inventories(self, uuid: str) -> tuple[int, dict[str, Any]]:
        """The provider's generation, and its inventory by resource class."""
        _, found = self._ask("GET", f"/resource_providers/{uuid}/inventories")
        found = answers.checked(answers.INVENTORIES, found, "inventories")
        return found["resource_provider_generation"], found["inventories"]

    def set_inventories(self, uuid: str, generation: int, inventories: Mapping[str, Any]) -> None:
        """All of them. :raises Conflict: another generation."""
        body = {"resource_provider_generation": generation, "inventories": inventories}
        self._ask("PUT", f"/resource_providers/{uuid}/inventories", body)

    def traits(self, uuid: str) -> tuple[int, set[str]]:
        _, found = self._ask("GET", f"/resource_providers/{uuid}/traits")
        found = answers.checked(answers.TRAITS, found, "traits")
        return found["resource_provider_generation"], set(found["traits"])

    def create_trait(self, name: str) -> None:
        """Quiet when it is there."""
        self._ask("PUT", f"/traits/{name}", good=(201, 204))

    def set_traits(self, uuid: str, generation: int, traits: Iterable[str]) -> None:
        """:raises Conflict: another generation."""
        body = {"resource_provider_generation": generation, "traits": sorted(traits)}
        self._ask("PUT", f"/resource_providers/{uuid}/traits", body)

    def aggregates(self, uuid: str) -> tuple[int, set[str]]:
        _, found = self._ask("GET", f"/resource_providers/{uuid}/aggregates")
        found = answers.checked(answers.AGGREGATES, found, "aggregates")
        return found["resource_provider_generation"], set(found["aggregates"])

    def set_aggregates(self, uuid: str, generation: int, aggregates: Iterable[str]) -> None:
        """:raises Conflict: another generation."""
        body = {"resource_provider_generation": generation, "aggregates": sorted(aggregates)}
        self._ask("PUT", f"/resource_providers/{uuid}/aggregates", body)

    def allocations(self, uuid: str) -> dict[str, Resources]:
        """What each consumer has at this provider."""
        _, found = self._ask("GET", f"/resource_providers/{uuid}/allocations")
        found = answers.checked(answers.PROVIDER_ALLOCATIONS, found, "the provider's allocations")
        return {consumer: row["resources"] for consumer, row in found["allocations"].items()}

    def consumer(self, uuid: str) -> Consumer:
        _, found = self._ask("GET", f"/allocations/{uuid}")
        found = answers.checked(answers.CONSUMER, found, f"consumer {uuid}")
        if not found["allocations"]:
            return Consumer()
        return Consumer(
            {provider: row["resources"] for provider, row in found["allocations"].items()},
            found["project_id"],
            found["user_id"],
            found["consumer_type"],
            found["consumer_generation"],
        )

    def set_consumer(self, uuid: str, wanted: Consumer) -> None:
        """All that it has, at all providers; without any it is gone.

        :raises Conflict: another generation, or another change at one of its providers.
        :raises PlacementError: ``placement.over_capacity``: a provider has not got so much.
        """
        body = {
            "allocations": {provider: {"resources": dict(row)} for provider, row in wanted.allocations.items()},
            "project_id": wanted.project,
            "user_id": wanted.user,
            "consumer_type": wanted.type,
            "consumer_generation": wanted.generation,
        }
        self._ask("PUT", f"/allocations/{uuid}", body)

    def _ask(
        self, method: str, path: str, body: object = None, good: tuple[int, ...] = (200, 201, 204)
    ) -> tuple[int, Any]:
        for again in (False, True):
            base = self._endpoint or self._auth.endpoint(self._http)
            if not base:
                raise PlacementError(
                    "placement.unreachable",
                    "no Placement is known: set [placement] endpoint, or auth_url of a Keystone whose catalogue has it",
                )
            headers = {"OpenStack-API-Version": f"placement {VERSION}", **self._auth.headers(self._http)}
            status, _, found = self._http.ask(method, base.rstrip("/") + path, headers, body)
            if status == 401 and not again and self._auth.refused():
                continue  # the token was revoked before its time
            break
        if status not in good:
            raise _failure(f"{method} {path.partition('?')[0]}", status, found)
        return status, found


def _provider(item: dict[str, Any], uuid: str = "") -> Provider:
    if uuid and item["uuid"] != uuid:
        raise PlacementError("placement.bad_answer", f"Placement answers about provider {item['uuid']}, not {uuid}")
    return Provider(item["uuid"], item["name"], item["generation"])


def _failure(what: str, status: int, found: object) -> PlacementError:
    """By the status and the error's code, which Placement promises not to change."""
    code, detail = _said(found)
    text = f"Placement refuses {what} (status {status}): {detail or 'see its log'}"
    if status in (401, 403):
        return PlacementError("placement.auth_failed", f"{text}: see [placement] auth")
    if status == 406:
        return PlacementError("placement.refused", f"Placement does not know version {VERSION} of its API: upgrade it")
    if status == 409 and code == "placement.duplicate_name":
        return PlacementError("placement.name_taken", text)
    if status == 409 and code == "placement.concurrent_update":
        return Conflict(text)
    if status == 409 and "Unable to allocate inventory" in detail:
        return PlacementError("placement.over_capacity", text)
    if status == 404 and "/resource_providers/" in what:
        return PlacementError("placement.no_provider", text, retryable=True)
    return PlacementError("placement.refused", text, retryable=status >= 500 or status == 429)


def _said(found: object) -> tuple[str, str]:
    """Code and detail of the first error of an answer, in one short line."""
    errors = found.get("errors") if isinstance(found, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return "", ""
    detail = "".join(char for char in str(first.get("detail", ""))[:2000] if char.isprintable() or char.isspace())
    detail = " ".join(detail.split()).removeprefix("There was a conflict when trying to complete your request. ")
    return str(first.get("code", ""))[:100], detail[:300]
