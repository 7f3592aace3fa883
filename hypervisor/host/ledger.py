"""Who owns which machine frames of this host.

Each domain gets one contiguous extent of machine frames, unique on the host, so
that a foreign mapping or a grant names one frame and no other. Extents cost
nothing by themselves; what is limited is the *commitment*: the frames a domain
may really fill. The sum of all commitments never exceeds the host's total.

A domain that moves to another host takes its frame numbers along, so its extent must be free there. That is left to
chance, and chance is helped: extents that may lie anywhere are put at a random place of the wide space. What
must lie low (see `WIDE_MFN`) is put as low as it goes.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypervisor.errors import HostFailure, HypervisorBug, InsufficientMemory
from hypervisor.memory import layout
from hypervisor.types import Mfn

PAGES_PER_MIB = 256

WIDE_MFN = 1 << 20
"""Frames from here on have machine addresses beyond 4 GiB, which are of no use to 32-bit guests."""
ALIGN = 512
"""Wide extents begin at multiples of so many frames: the M2P of each then fills its pages."""


class ExtentTaken(Exception):
    """The frames that were asked for are not free; the message says whose they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """One owner's extent.

    :ivar owner: UUID of the domain; one owner may hold two claims while it is rebuilt, hence `serial`.
    :ivar frames: length of the extent in machine frames.
    :ivar committed: of these, what counts against the host's total.
    """

    serial: int
    owner: str
    base_mfn: Mfn
    frames: int
    committed: int

    @property
    def end_mfn(self) -> int:
        return self.base_mfn + self.frames

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Claim:
        return cls(
            serial=int(data["serial"]),
            owner=str(data["owner"]),
            base_mfn=Mfn(int(data["base_mfn"])),
            frames=int(data["frames"]),
            committed=int(data["committed"]),
        )


class Ledger:
    """Machine frames of one host.

    :param total: frames that may be committed altogether.
    :param chance: where wide extents go.
    """

    def __init__(
        self,
        total: int,
        *,
        first_mfn: int = layout.FIRST_MFN,
        end_mfn: int = layout.MAX_MFN,
        chance: random.Random | None = None,
    ) -> None:
        self.total = total
        self._chance = chance or random.SystemRandom()
        self._first = first_mfn
        self._end = end_mfn
        self._claims: list[Claim] = []  # ordered by base_mfn
        self._serial = 0

    @property
    def committed(self) -> int:
        return sum(claim.committed for claim in self._claims)

    @property
    def free(self) -> int:
        """Frames that may still be committed; 0 when adopted domains already hold more than the total."""
        return max(0, self.total - self.committed)

    def claims(self) -> tuple[Claim, ...]:
        return tuple(self._claims)

    def claim(self, owner: str, frames: int, committed: int, *, wide: bool = False) -> Claim:
        """Reserve an extent.

        :param wide: it may lie anywhere, and shall lie where chance puts it; otherwise as low as it goes.
        :raises InsufficientMemory: the host cannot commit so much; nothing is reserved.
        :raises HostFailure: no hole in the machine address space is long enough.
        """
        self._check_commitment(frames, committed)
        base = self._somewhere(frames) if wide else None
        if base is None:
            base = self._first_fit(frames)
        if base is None:
            raise HostFailure(
                f"no {frames} machine frames in a row are free on this host: end a domain or lower max_memory_mib"
            )
        return self._give(owner, base, frames, committed)

    def claim_at(self, owner: str, base_mfn: int, frames: int, committed: int) -> Claim:
        """Reserve just this extent, for a domain that comes with its frame numbers.

        :raises InsufficientMemory: the host cannot commit so much. :raises ExtentTaken: another has some of it, or it
            lies outside the machine address space. Nothing is reserved.
        """
        self._check_commitment(frames, committed)
        if base_mfn < self._first or base_mfn + frames > self._end:
            raise ExtentTaken(f"machine frames {base_mfn:#x} to {base_mfn + frames:#x} are none of this host's")
        index = bisect.bisect_right(self._claims, base_mfn, key=lambda held: held.end_mfn)
        if index < len(self._claims) and self._claims[index].base_mfn < base_mfn + frames:
            raise ExtentTaken(f"machine frames of domain {self._claims[index].owner} lie in its place")
        return self._give(owner, base_mfn, frames, committed)

    def _check_commitment(self, frames: int, committed: int) -> None:
        if not 0 < committed <= frames:
            raise HypervisorBug(f"claim of {committed} committed frames in an extent of {frames}")
        self.check_free(committed)

    def check_free(self, committed: int) -> None:
        """:raises InsufficientMemory: the host cannot commit so many frames."""
        if committed > self.free:
            raise InsufficientMemory(
                f"the domain needs {_mib_up(committed)} MiB with its overhead and the host has "
                f"{self.free // PAGES_PER_MIB} of {self.total // PAGES_PER_MIB} MiB left: "
                "give it less memory, end another domain, or raise memory_mib of the host process"
            )

    def _give(self, owner: str, base: int, frames: int, committed: int) -> Claim:
        self._serial += 1
        claim = Claim(self._serial, owner, Mfn(base), frames, committed)
        self._insert(claim)
        return claim

    @contextmanager
    def claiming(self, owner: str, frames: int, committed: int) -> Iterator[Claim]:
        """A claim that is released again if the body fails."""
        claim = self.claim(owner, frames, committed)
        try:
            yield claim
        except BaseException:
            self.release(claim)
            raise

    def adopt(self, claim: Claim) -> Claim:
        """Take over the extent of a domain that already runs; it may exceed the total, but overlap nothing.

        :raises HypervisorBug: the extent overlaps another or lies outside the machine address space.
        """
        if claim.base_mfn < self._first or claim.end_mfn > self._end or not 0 < claim.committed <= claim.frames:
            raise HypervisorBug(f"extent {claim} is not one of this host's")
        self._serial += 1
        own = dataclasses.replace(claim, serial=self._serial)
        self._insert(own)
        return own

    def release(self, claim: Claim) -> None:
        """:raises HypervisorBug: the claim is not held."""
        try:
            self._claims.remove(claim)
        except ValueError:
            raise HypervisorBug(f"release of {claim}, which is not held") from None

    def recommit(self, claim: Claim, committed: int) -> Claim:
        """Let an owner fill more or less of its extent.

        :raises InsufficientMemory: the host cannot commit so much more. :raises HypervisorBug: the claim is not held.
        """
        if claim not in self._claims or not 0 < committed <= claim.frames:
            raise HypervisorBug(f"{committed} frames to be committed of {claim}")
        if committed - claim.committed > self.free:
            raise InsufficientMemory(
                f"the domain needs {_mib_up(committed - claim.committed)} MiB more and the host has "
                f"{self.free // PAGES_PER_MIB} of {self.total // PAGES_PER_MIB} MiB left: "
                "ask for less, end another domain, or raise memory_mib of the host process"
            )
        changed = dataclasses.replace(claim, committed=committed)
        self._claims[self._claims.index(claim)] = changed
        return changed

    def owner_of(self, mfn: int) -> str | None:
        """UUID of the domain whose extent holds `mfn`."""
        index = bisect.bisect_right(self._claims, mfn, key=lambda claim: claim.base_mfn) - 1
        if index >= 0 and mfn < self._claims[index].end_mfn:
            return self._claims[index].owner
        return None

    def save(self) -> dict[str, Any]:
        return {"total": self.total, "serial": self._serial, "claims": [claim.to_json() for claim in self._claims]}

    @classmethod
    def restore(cls, data: dict[str, Any]) -> Ledger:
        ledger = cls(int(data["total"]))
        for item in data["claims"]:
            ledger._insert(Claim.from_json(item))
        ledger._serial = int(data["serial"])
        return ledger

    def _first_fit(self, frames: int) -> int | None:
        base = self._first
        for claim in self._claims:
            if claim.base_mfn - base >= frames:
                return base
            base = claim.end_mfn
        return base if self._end - base >= frames else None

    def _somewhere(self, frames: int) -> int | None:
        """A random multiple of `ALIGN` beyond `WIDE_MFN`; every one that is possible is as likely."""
        holes: list[tuple[int, int]] = []  # first possible place and how many there are
        base = max(self._first, WIDE_MFN)
        for end, after in [*((claim.base_mfn, claim.end_mfn) for claim in self._claims), (self._end, self._end)]:
            first = -(-base // ALIGN) * ALIGN
            if end - first >= frames:
                holes.append((first, (end - first - frames) // ALIGN + 1))
            base = max(base, after)
        if not holes:
            return None
        number = self._chance.randrange(sum(count for _, count in holes))
        for first, count in holes:
            if number < count:
                return first + number * ALIGN
            number -= count
        raise HypervisorBug("a place beyond all holes")

    def _insert(self, claim: Claim) -> None:
        index = bisect.bisect_left(self._claims, claim.base_mfn, key=lambda held: held.base_mfn)
        before = self._claims[index - 1] if index else None
        after = self._claims[index] if index < len(self._claims) else None
        if (before and before.end_mfn > claim.base_mfn) or (after and claim.end_mfn > after.base_mfn):
            raise HypervisorBug(f"extent {claim} overlaps {before if before else after}")
        self._claims.insert(index, claim)


def _mib_up(frames: int) -> int:
    return -(-frames // PAGES_PER_MIB)
