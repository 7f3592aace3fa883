"""What the source says of a domain before it moves, and what must hold on the target."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping
from typing import Any

from hypervisor.errors import (
    HostFailure,
    MigrationNotTransparent,
    MigrationRefused,
    SpecInvalid,
    WrongState,
)
from hypervisor.host import disk_mirror, protocol
from hypervisor.host.ledger import PAGES_PER_MIB
from hypervisor.host.records import LAST_DOMID, DomainRecord, Phase, RunSizes
from hypervisor.host.runtime import BuildRequest, RuntimeFacts
from hypervisor.host.settings import HostSettings
from hypervisor.host.table import Domain
from hypervisor.memory import layout
from hypervisor.toolstack.api import DomainSpec, DomainState, MigrationOffer

DRIVER = "embedded"
STATE = 2
"""Form of all that goes over: raised when two releases could misunderstand each other."""


@dataclasses.dataclass(frozen=True, slots=True)
class Detail:
    """What `MigrationOffer.detail` has.

    :ivar base_mfn: of the extent; `frames` its length, `committed` what of it may be filled.
    :ivar facts: of the guest, for the domain process (`hypervisor.host.runtime.BuildRequest.incoming`).
    :ivar linear_page_tables: whether it may have them.
    :ivar disks: sizes by ``disk/id``, bytes. :ivar images: `disk_mirror.offers` of those that can be copied.
    """

    base_mfn: int
    frames: int
    committed: int
    run: RunSizes
    facts: Mapping[str, Any]
    linear_page_tables: bool
    disks: Mapping[str, int]
    images: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "run": dataclasses.asdict(self.run)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Detail:
        """:raises SpecInvalid: it is none."""
        try:
            made = cls(**{**data, "run": RunSizes(**data["run"])})
            made._check()
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise SpecInvalid(f"migration offer: detail makes no sense ({exc}): let the source offer it anew") from None
        return made

    def _check(self) -> None:
        numbers = (self.base_mfn, self.frames, self.committed, *dataclasses.astuple(self.run), *self.disks.values())
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a number that is none")
        run, pages = self.run, self.run.max_memory_mib * PAGES_PER_MIB
        if not (0 < run.vcpus <= run.max_vcpus and 0 < run.memory_mib <= run.max_memory_mib):
            raise ValueError("sizes of no domain")
        if self.frames != layout.total_frames(pages) or not 0 < self.committed <= self.frames:
            raise ValueError("frames that do not fit its size")
        if not isinstance(self.facts, dict) or not isinstance(self.linear_page_tables, bool):
            raise ValueError("facts of no guest")


def build_of(settings: HostSettings, facts: RuntimeFacts) -> str:
    """What must be equal on both hosts: release, runtime, engine and its version, form of the state."""
    try:
        unicorn = importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        unicorn = "none"
    path = dict(facts.detail).get("engine_path", "")
    engine = settings.engine or "default"
    return f"reeve {protocol.version()}, {facts.name}, engine {engine} {path} unicorn {unicorn}, state {STATE}"


async def make(domain: Domain, settings: HostSettings, facts: RuntimeFacts) -> MigrationOffer:
    """:raises ToolstackError: it cannot be offered now."""
    record, process = domain.record, domain.process
    assert process is not None and record.claim is not None and domain.devices is not None
    said = await process.request("migration_facts")
    try:
        about = {**said["facts"]}
        if int(said["pages"]) != record.claim.frames:
            raise ValueError("its extent")
    except (KeyError, TypeError, ValueError) as exc:
        raise HostFailure(f"the domain process does not say what it holds ({exc}): see domain.log") from exc
    sizes = {f"disk/{info.id}": info.size_bytes for info in await domain.devices.list() if info.kind == "disk"}
    detail = Detail(
        base_mfn=record.claim.base_mfn,
        frames=record.claim.frames,
        committed=record.claim.committed,
        run=record.run,
        facts=about,
        linear_page_tables=settings.linear_page_tables,
        disks=sizes,
        images=await disk_mirror.offers(domain.devices.all("disk")),
    )
    return MigrationOffer(
        driver=DRIVER,
        build=build_of(settings, facts),
        spec=record.spec,
        domid=record.domid,
        memory_mib=max(record.run.memory_mib, -(-record.claim.committed // PAGES_PER_MIB)),
        vcpus=record.run.vcpus,
        running=record.state is DomainState.RUNNING,
        detail=detail.to_json(),
    )


def check_driver(offer: MigrationOffer) -> None:
    """:raises MigrationRefused: it comes from another kind of host."""
    if offer.driver != DRIVER:
        raise MigrationRefused(f"a domain of driver {offer.driver[:40]!r} cannot come to driver {DRIVER!r}: save it")


def check_live(offer: MigrationOffer, build: str, taken: frozenset[int]) -> None:
    """:raises MigrationNotTransparent: it can only come as an image."""
    if offer.build != build:
        raise MigrationNotTransparent(
            f"the hosts differ (there: {offer.build[:200]}; here: {build}): move it as an image, or upgrade one of them"
        )
    if not 0 < offer.domid <= LAST_DOMID or offer.domid in taken:
        raise MigrationNotTransparent(f"domid {offer.domid} is in use here: move it as an image")


def check_disks(detail: Detail, sizes: Mapping[str, int], elsewhere: frozenset[str]) -> None:
    """:param elsewhere: keys of disks that are not here.

    :raises MigrationRefused: an image here is not the one there.
    """
    for key, size in detail.disks.items():
        if key not in elsewhere and sizes.get(key, 0) != size:
            raise MigrationRefused(
                f"{key.replace('/', ' ')} has {size} bytes on the source and {sizes.get(key, 0)} here: "
                "is it the same image, on storage that both hosts share?"
            )


def check_ours(domain: Domain, verb: str) -> None:
    """:raises WrongState: it is on its way already."""
    if domain.record.migration:
        raise WrongState(
            f"domain {domain.uuid} is in the hands of migration {domain.record.migration}, cannot {verb} it: "
            "wait for its end, or cancel it"
        )


def new_record(offer: MigrationOffer, detail: Detail, ident: str, owner: str) -> DomainRecord:
    """Of the half that is to arrive."""
    return DomainRecord(
        spec=dataclasses.replace(offer.spec, owner=owner),
        domid=offer.domid,
        phase=Phase.ARRIVING,
        state=DomainState.PAUSED,
        created_at=time.time(),
        run=detail.run,
        migration=ident,
    )


def request_of(offer: MigrationOffer, detail: Detail, spec: DomainSpec, settings: HostSettings) -> BuildRequest:
    """The domain process that takes the guest. Sizes are those of its run: the spec may have been changed since."""
    run = detail.run
    sizes = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return BuildRequest(
        spec=dataclasses.replace(spec, **sizes),
        domid=offer.domid,
        base_mfn=detail.base_mfn,
        nr_pages=run.memory_mib * PAGES_PER_MIB,
        max_pages=run.max_memory_mib * PAGES_PER_MIB,
        cache_dir=settings.cache_dir,
        engine=settings.engine,
        linear_page_tables=detail.linear_page_tables,
        fast_path=settings.fast_path,
        cpu_policy=settings.cpu_policy,
        incoming=dict(detail.facts),
    )
