"""Who takes what of this host: what Placement says, compared with the domains and claims that there are.

A domain's UUID is the consumer. This agent writes what a consumer has at its own provider and nothing else of it, so
that during a migration the consumer has an allocation at both hosts, each written by the agent that counts the domain,
and afterwards at the one where it runs; whichever agent dies, the other's part is right. Consumers carry marks
(project, user and consumer type). One without them is a scheduler's or another program's and is never touched.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Mapping
from typing import Any

from agent.placement.client import Client, Consumer, Resources
from agent.placement.errors import PlacementError
from agent.placement.inventory import CLASSES, MEMORY_MB, VCPU
from agent.resources import Share

LOG = logging.getLogger(__name__)

CONSUMER_TYPE = "REEVE_DOMAIN"


class Kind(enum.StrEnum):
    """What is wrong with a consumer."""

    ORPHAN = "orphan"
    """Placement has an allocation and there is no such domain."""
    MISSING = "missing"
    """There is a domain and Placement has no allocation."""
    AMOUNT = "amount"
    """Both, and the amounts differ."""


class Mended(enum.StrEnum):
    """What `Allocations.mend` came to."""

    WRITTEN = "written"
    REMOVED = "removed"
    RIGHT = "right"
    """It had become right meanwhile."""
    FOREIGN = "foreign"
    """Its marks are not ours: left as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """:ivar found: what the consumer has at this provider, :ivar wanted: what it should have; empty for nothing."""

    consumer: str
    kind: Kind
    found: Resources
    wanted: Resources

    def to_json(self) -> dict[str, Any]:
        return {
            "consumer": self.consumer,
            "kind": self.kind.value,
            "found": dict(self.found),
            "wanted": dict(self.wanted),
        }


def row(share: Share) -> dict[str, int]:
    """A domain's part of the host; Placement has no zeros."""
    return {name: amount for name, amount in ((VCPU, share.vcpus), (MEMORY_MB, share.memory_mib)) if amount > 0}


def compare(found: Mapping[str, Resources], shares: Mapping[str, Share]) -> list[Difference]:
    """In the order in which they are best mended: what frees something first, since what grows may need it.

    Of what a domain has, only our classes count: a scheduler may have given it a disk, too.
    """
    wanted = {uuid: made for uuid, share in shares.items() if (made := row(share))}
    differences = []
    for uuid in found.keys() | wanted.keys():
        is_now, should = found.get(uuid, {}), wanted.get(uuid, {})
        counted = {name: amount for name, amount in is_now.items() if name in CLASSES} if should else is_now
        if counted != should:
            kind = Kind.ORPHAN if not should else Kind.AMOUNT if is_now else Kind.MISSING
            differences.append(Difference(uuid, kind, is_now, should))
    return sorted(differences, key=lambda item: (_growth(item), item.consumer))


def _growth(item: Difference) -> int:
    return item.wanted.get(MEMORY_MB, 0) - item.found.get(MEMORY_MB, 0)


class Allocations:
    """:param provider: this host's, by its UUID.

    :param project: with `user` and the consumer type the mark of what is ours.
    """

    def __init__(self, client: Client, provider: str, *, project: str, user: str) -> None:
        self._client = client
        self._provider = provider
        self._project = project
        self._user = user

    def found(self) -> dict[str, Resources]:
        """What each consumer has at this provider."""
        return self._client.allocations(self._provider)

    def differences(self, shares: Mapping[str, Share]) -> list[Difference]:
        return compare(self.found(), shares)

    def own(self, consumer: Consumer) -> bool:
        """Whether an agent of Reeve wrote it; at our provider that was this one."""
        marks = (consumer.project, consumer.user, consumer.type)
        return marks == (self._project, self._user, CONSUMER_TYPE)

    def foreign(self, difference: Difference) -> bool:
        """Whether the consumer is one that we must not touch."""
        consumer = self._client.consumer(difference.consumer)
        return bool(consumer.allocations) and not self.own(consumer)

    def mend(self, difference: Difference) -> Mended:
        """Give the consumer what it should have here; what it has elsewhere stays.

        :raises PlacementError: ``placement.over_capacity``, ``placement.conflict`` (others were quicker each time), …
        """
        outcome = self._client.repeat(lambda: self._attempt(difference))
        if outcome in (Mended.WRITTEN, Mended.REMOVED):
            text = ", ".join(f"{name} {amount}" for name, amount in sorted(difference.wanted.items()))
            LOG.info("Placement: domain %s has %s here", difference.consumer, text or "nothing")
        return outcome

    def _attempt(self, difference: Difference) -> Mended:
        consumer = self._client.consumer(difference.consumer)
        if consumer.allocations and not self.own(consumer):
            return Mended.FOREIGN
        here = dict(consumer.allocations.get(self._provider, {}))
        made = {name: amount for name, amount in here.items() if name not in CLASSES} | dict(difference.wanted)
        if not difference.wanted:
            made = {}
        if here == made:
            return Mended.RIGHT
        left = {uuid: resources for uuid, resources in consumer.allocations.items() if uuid != self._provider}
        if made:
            left[self._provider] = made
        marked = Consumer(left, self._project, self._user, CONSUMER_TYPE, consumer.generation)
        self._client.set_consumer(difference.consumer, marked)
        return Mended.WRITTEN if difference.wanted else Mended.REMOVED


@dataclasses.dataclass(slots=True)
class Outcome:
    """Of a round of mending.

    :ivar foreign: differences of consumers that are not ours. :ivar failed: (difference, why).
    """

    mended: list[tuple[Difference, Mended]] = dataclasses.field(default_factory=list)
    foreign: list[Difference] = dataclasses.field(default_factory=list)
    failed: list[tuple[Difference, PlacementError]] = dataclasses.field(default_factory=list)


def mend_all(allocations: Allocations, differences: list[Difference]) -> Outcome:
    """One that fails does not keep the others from being mended, unless Placement is gone."""
    outcome = Outcome()
    for difference in differences:
        try:
            done = allocations.mend(difference)
        except PlacementError as exc:
            if exc.fatal:
                raise
            outcome.failed.append((difference, exc))
            continue
        if done is Mended.FOREIGN:
            outcome.foreign.append(difference)
        else:
            outcome.mended.append((difference, done))
    return outcome
