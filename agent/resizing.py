"""Cold resize: a domain is stopped, redefined and started; the old size is kept until that is confirmed or reverted.

What waits for an answer is in the domain's own metadata (`Pending`), because the world and not the journal says
what there is: it comes and goes with the domain, and survives a lost journal. The steps here are those that
``resize`` and ``revert_resize`` share. While they are at work the domain's stored spec says that nothing is
destroyed when the guest ends, whichever way it does: `RedefineStep` writes that, `SettleStep` takes it back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from typing import ClassVar, Self

from agent.api import Check, Context, Host, InstructionError, JsonDict, Step, own_domain
from hypervisor.errors import DomainNotFound, HostFailure, MemoryTooSmall, OperationTimeout, Unsupported
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, OnEvent

PENDING_KEY = "reeve.resize"
SIZES = ("vcpus", "max_vcpus", "memory_mib", "max_memory_mib", "weight", "cap")
"""Fields of a spec that a resize may change and a revert puts back."""

_ENDED = (DomainState.SHUTDOWN, DomainState.CRASHED)
_SETTLED = (DomainState.RUNNING, DomainState.PAUSED, *_ENDED)


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A cold resize that nobody has confirmed or reverted yet.

    :ivar since: seconds since the epoch; `confirm_by` when it counts as confirmed, 0 for never.
    :ivar old: the `SIZES` before.
    """

    since: float
    confirm_by: float
    old: JsonDict

    def open(self, now: float | None = None) -> bool:
        """Whether it can still be reverted."""
        return not self.confirm_by or (time.time() if now is None else now) < self.confirm_by

    def applied(self, spec: DomainSpec) -> DomainSpec:
        """`spec` with this noted in it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return dataclasses.replace(spec, metadata=tuple(sorted((*without_pending(spec).metadata, (PENDING_KEY, text)))))

    @classmethod
    def of(cls, metadata: Iterable[tuple[str, str]]) -> Self | None:
        """What a domain's metadata says; None when it says nothing, or nothing that can be read."""
        text = dict(metadata).get(PENDING_KEY)
        if text is None:
            return None
        try:
            pending = cls(**json.loads(text))
            sizes = {name: int(pending.old[name]) for name in SIZES}
            return dataclasses.replace(
                pending, since=float(pending.since), confirm_by=float(pending.confirm_by), old=sizes
            )
        except (ValueError, TypeError, KeyError):
            return None


def without_pending(spec: DomainSpec) -> DomainSpec:
    return dataclasses.replace(spec, metadata=tuple(item for item in spec.metadata if item[0] != PENDING_KEY))


def sizes(spec: DomainSpec) -> JsonDict:
    """The `SIZES` of a spec, its maxima spelt out."""
    spelt = {"max_vcpus": spec.effective_max_vcpus, "max_memory_mib": spec.effective_max_memory_mib}
    return {name: spelt.get(name, getattr(spec, name)) for name in SIZES}


def held_mib(info: DomainInfo) -> int:
    """Host memory a domain has or may take at any time."""
    return max(info.memory_mib, info.memory_target_mib)


@dataclasses.dataclass(frozen=True)
class RedefineStep(Step):
    """:ivar spec: what counts from the next start; `old` what counted before. JSON forms of `DomainSpec`."""

    name: ClassVar[str] = "redefine"
    title: ClassVar[str] = "write down what it is to be"

    uuid: str
    spec: JsonDict
    old: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.redefine(self.uuid, DomainSpec.from_json(self.spec))
        return None

    def check(self, ctx: Context) -> Check:
        done = ctx.host.toolstack.get_spec(self.uuid) == DomainSpec.from_json(self.spec)
        return Check.DONE if done else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.redefine(self.uuid, DomainSpec.from_json(self.old))


@dataclasses.dataclass(frozen=True)
class SettleStep(RedefineStep):
    name: ClassVar[str] = "settle"
    title: ClassVar[str] = "let its end mean again what it meant"

    def undo(self, ctx: Context) -> None:
        """What `RedefineStep` put there goes with that step."""


@dataclasses.dataclass(frozen=True)
class RestartStep(Step):
    """Stop it and start it from its stored spec.

    :ivar domid: of the run that is to end.
    :ivar seconds: what the guest has to stop; `force`: then it is ended without asking.
    :ivar old: JSON form of the spec that it goes back to when this is undone.
    """

    name: ClassVar[str] = "restart"
    title: ClassVar[str] = "stop it and start it anew"

    uuid: str
    domid: int
    seconds: float
    force: bool
    old: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        info = own_domain(ctx.host, self.uuid)
        if info.domid == self.domid:
            self._restart(ctx, info, force=self.force)
        info = ctx.poll(lambda _left: self._settled(ctx), self.seconds + 60.0)
        if info is None or info.state in _ENDED:
            detail = info.detail if info else "it is not settled"
            raise HostFailure(f"domain {self.uuid} did not start again: {detail or info.state.value}")
        return {"domid": info.domid}

    def check(self, ctx: Context) -> Check:
        info = ctx.host.toolstack.get_domain(self.uuid)
        if info.state is DomainState.UNKNOWN:
            return Check.UNKNOWN
        return Check.DONE if info.domid != self.domid and info.state not in _ENDED else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        try:
            info = own_domain(ctx.host, self.uuid)
        except DomainNotFound:
            return
        old = DomainSpec.from_json(self.old)
        ended = info.state in _ENDED
        if info.domid == self.domid and not ended:
            return  # it was asked at most: when it restarts, it is from the old spec
        ctx.host.toolstack.redefine(self.uuid, surviving(old))
        if ended:
            ctx.host.toolstack.reset(self.uuid)
        elif not _runs_as(info, old):
            self._restart(ctx, info, force=False)
        ctx.host.toolstack.redefine(self.uuid, old)

    def _restart(self, ctx: Context, info: DomainInfo, *, force: bool) -> None:
        """:raises OperationTimeout: the guest goes on."""
        toolstack = ctx.host.toolstack
        if info.state not in (*_ENDED, DomainState.PAUSED):
            toolstack.reboot(self.uuid)
            found = ctx.poll(lambda _left: self._ended(ctx, info.domid), self.seconds)
            if found is not None and found.domid != info.domid:
                return
            if found is None and not force:
                raise OperationTimeout(
                    f"domain {self.uuid} still runs {self.seconds:g} s after its guest was asked to restart: wait "
                    "longer, or give force"
                )
        toolstack.reset(self.uuid)

    def _ended(self, ctx: Context, domid: int) -> DomainInfo | None:
        info = ctx.host.toolstack.get_domain(self.uuid)
        if info.domid != domid and info.state is not DomainState.UNKNOWN:
            return info
        return info if info.state in _ENDED else None

    def _settled(self, ctx: Context) -> DomainInfo | None:
        info = ctx.host.toolstack.get_domain(self.uuid)
        return info if info.domid != self.domid and info.state in _SETTLED else None


def _runs_as(info: DomainInfo, spec: DomainSpec) -> bool:
    run = (info.max_vcpus, info.max_memory_mib, info.vcpus, info.memory_target_mib)
    return run == (spec.effective_max_vcpus, spec.effective_max_memory_mib, spec.vcpus, spec.memory_mib)


def surviving(spec: DomainSpec) -> DomainSpec:
    """`spec`, but no end of the guest takes the domain away."""
    return dataclasses.replace(spec, on_poweroff=OnEvent.PRESERVE, on_reboot=OnEvent.RESTART, on_crash=OnEvent.PRESERVE)


def cold_steps(
    info: DomainInfo, now: DomainSpec, new: DomainSpec, *, seconds: float, force: bool
) -> tuple[RedefineStep, RestartStep, SettleStep]:
    """The steps that make `new` of a domain whose stored spec is `now`."""
    between = surviving(new)
    old = now.to_json()
    return (
        RedefineStep(info.uuid, between.to_json(), old),
        RestartStep(info.uuid, info.domid, seconds, force, old),
        SettleStep(info.uuid, new.to_json(), between.to_json()),
    )


def pending_of(info: DomainInfo, what: str) -> Pending:
    """:raises InstructionError: ``resize.none_pending``: nothing waits to be confirmed or reverted."""
    pending = Pending.of(info.metadata)
    if pending is None:
        raise InstructionError(
            "resize.none_pending", f"domain {info.uuid} has no cold resize to {what}: look at its metadata"
        )
    return pending


def least_memory_mib(max_memory_mib: int) -> int:
    """What a Linux guest built for `max_memory_mib` can do with at least, MiB.

    Its page tables and ``struct page`` are made for the maximum. The figures are those of the classic Xen balloon
    driver (``minimum_target`` in linux-2.6.18-xen's drivers/xen/balloon/balloon.c).
    """
    if max_memory_mib < 128:
        return min(max_memory_mib, 8 + max_memory_mib // 2)
    if max_memory_mib < 512:
        return 40 + max_memory_mib // 4
    if max_memory_mib < 2048:
        return 104 + max_memory_mib // 8
    return 296 + max_memory_mib // 32


def check_least(host: Host, info: DomainInfo, memory_mib: int) -> None:
    """:raises MemoryTooSmall: the guest cannot do with that."""
    least = least_memory_mib(info.max_memory_mib or info.memory_mib)
    with contextlib.suppress(Unsupported):
        told = host.toolstack.stats(info.uuid).get("memory_min_mib", 0)
        least = max(least, told if isinstance(told, int) else 0)
    if memory_mib < min(least, info.memory_mib):
        raise MemoryTooSmall(
            f"memory_mib is {memory_mib}: the guest of {info.name} needs {least} MiB at least (it was started for up "
            f"to {info.max_memory_mib} MiB): give more, or resize it cold with a smaller max_memory_mib"
        )
