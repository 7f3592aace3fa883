"""Resize: what a driver does at once, what becomes part of the spec, and what counts from the next start.

Whether a guest follows is its own affair; a kit whose guest follows names it `FOLLOWS`.
"""

from __future__ import annotations

import dataclasses

import pytest
from kit import FOLLOWS, OBEYS, POWEROFF, WAITS, Bench, assert_readable

from hypervisor.errors import DomainNotFound, InsufficientMemory, InsufficientVcpus, SpecInvalid, WrongState
from hypervisor.toolstack.api import Capability, DomainInfo, DomainState, OnEvent

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def sized(bench: Bench) -> DomainInfo:
    """A running domain that may have two vCPUs and twice its memory; it has one, and the kit's memory."""
    bench.needs(Capability.RESIZE)
    return bench.start(WAITS, max_vcpus=2, max_memory_mib=2 * bench.kit.memory_mib)


def test_what_a_domain_may_have_is_told(bench: Bench, sized: DomainInfo) -> None:
    info = bench.toolstack.get_domain(sized.uuid)
    assert (info.vcpus, info.max_vcpus) == (1, 2)
    assert (info.memory_target_mib, info.max_memory_mib) == (bench.kit.memory_mib, 2 * bench.kit.memory_mib)


def test_a_guest_follows_up_and_down(bench: Bench) -> None:
    bench.needs(Capability.RESIZE)
    mib = bench.kit.memory_mib
    uuid = bench.booted(FOLLOWS, max_vcpus=2, max_memory_mib=2 * mib).uuid
    for vcpus, memory_mib in ((2, 2 * mib), (1, mib)):
        bench.toolstack.set_vcpus(uuid, vcpus)
        bench.toolstack.set_memory(uuid, memory_mib)

        def followed(vcpus: int = vcpus, memory_mib: int = memory_mib) -> bool:
            info = bench.toolstack.get_domain(uuid)
            return info.vcpus == vcpus and abs(info.memory_mib - memory_mib) <= 1

        bench.until(followed, f"{vcpus} vCPUs and {memory_mib} MiB")


def test_vcpus_become_part_of_the_spec(bench: Bench, sized: DomainInfo) -> None:
    bench.toolstack.set_vcpus(sized.uuid, 2)
    spec = bench.toolstack.get_spec(sized.uuid)
    assert (spec.vcpus, spec.max_vcpus) == (2, 2)
    bench.toolstack.set_vcpus(sized.uuid, 1)
    spec = bench.toolstack.get_spec(sized.uuid)
    assert (spec.vcpus, spec.max_vcpus) == (1, 2)


def test_memory_becomes_part_of_the_spec_and_is_taken_at_once(bench: Bench, sized: DomainInfo) -> None:
    mib = bench.kit.memory_mib
    free = bench.toolstack.host_info().memory_free_mib
    bench.toolstack.set_memory(sized.uuid, 2 * mib)
    spec, info = bench.toolstack.get_spec(sized.uuid), bench.toolstack.get_domain(sized.uuid)
    assert (spec.memory_mib, spec.max_memory_mib, info.memory_target_mib) == (2 * mib, 2 * mib, 2 * mib)
    assert bench.toolstack.host_info().memory_free_mib <= free - mib + 1
    bench.toolstack.set_memory(sized.uuid, mib)
    spec = bench.toolstack.get_spec(sized.uuid)
    assert (spec.memory_mib, spec.max_memory_mib) == (mib, 2 * mib)


@pytest.mark.parametrize("value", [0, -1, 3, 33])
def test_vcpus_out_of_range(bench: Bench, sized: DomainInfo, value: int) -> None:
    with pytest.raises(SpecInvalid) as caught:
        bench.toolstack.set_vcpus(sized.uuid, value)
    assert_readable(caught.value)
    assert bench.toolstack.get_spec(sized.uuid).vcpus == 1


@pytest.mark.parametrize("factor", [-1, 0, 3])
def test_memory_out_of_range(bench: Bench, sized: DomainInfo, factor: int) -> None:
    with pytest.raises(SpecInvalid) as caught:
        bench.toolstack.set_memory(sized.uuid, factor * bench.kit.memory_mib)
    assert_readable(caught.value)
    assert bench.toolstack.get_spec(sized.uuid).memory_mib == bench.kit.memory_mib


def test_memory_that_the_host_has_not_got(bench: Bench) -> None:
    bench.needs(Capability.RESIZE)
    info = bench.start(WAITS, max_memory_mib=2 * bench.toolstack.host_info().memory_total_mib)
    with pytest.raises(InsufficientMemory) as caught:
        bench.toolstack.set_memory(info.uuid, bench.toolstack.host_info().memory_total_mib + 1)
    assert_readable(caught.value)
    assert bench.toolstack.get_spec(info.uuid).memory_mib == bench.kit.memory_mib


def test_scheduling_counts_in_every_state(bench: Bench, sized: DomainInfo) -> None:
    bench.toolstack.set_scheduling(sized.uuid, 512, 50)
    spec = bench.toolstack.get_spec(sized.uuid)
    assert (spec.weight, spec.cap) == (512, 50)
    bench.toolstack.pause(sized.uuid)
    bench.toolstack.set_scheduling(sized.uuid, 256, 0)
    for weight, cap in ((0, 0), (65536, 0), (256, -1), (256, 99999)):
        with pytest.raises(SpecInvalid):
            bench.toolstack.set_scheduling(sized.uuid, weight, cap)
    spec = bench.toolstack.get_spec(sized.uuid)
    assert (spec.weight, spec.cap) == (256, 0)


def test_what_ended_is_not_resized(bench: Bench) -> None:
    bench.needs(Capability.RESIZE)
    info = bench.start(POWEROFF, on_poweroff=OnEvent.PRESERVE, max_memory_mib=2 * bench.kit.memory_mib)
    bench.toolstack.wait(info.uuid, frozenset({DomainState.SHUTDOWN}), bench.kit.boot_timeout)
    for call in (bench.toolstack.set_vcpus, bench.toolstack.set_memory):
        with pytest.raises(WrongState):
            call(info.uuid, 1)


def test_nobody_is_not_resized(bench: Bench) -> None:
    bench.needs(Capability.RESIZE)
    spec = bench.spec(uuid=NOBODY)
    for call in (
        lambda: bench.toolstack.set_vcpus(NOBODY, 1),
        lambda: bench.toolstack.set_memory(NOBODY, 1),
        lambda: bench.toolstack.set_scheduling(NOBODY, 256, 0),
        lambda: bench.toolstack.redefine(NOBODY, spec),
        lambda: bench.toolstack.stats(NOBODY),
    ):
        with pytest.raises(DomainNotFound):
            call()


def test_redefine_counts_from_the_next_start(bench: Bench, sized: DomainInfo) -> None:
    toolstack, mib = bench.toolstack, bench.kit.memory_mib
    spec = dataclasses.replace(
        toolstack.get_spec(sized.uuid), memory_mib=2 * mib, max_memory_mib=3 * mib, metadata=(("a", "b"),), weight=9
    )
    toolstack.redefine(sized.uuid, spec)
    info = toolstack.get_domain(sized.uuid)
    assert toolstack.get_spec(sized.uuid) == spec
    run = (info.domid, info.max_memory_mib, info.memory_target_mib)
    assert run == (sized.domid, 2 * mib, mib), "what runs stays as it is"
    assert info.metadata == (("a", "b"),), "metadata counts at once"
    toolstack.reset(sized.uuid)
    info = toolstack.get_domain(sized.uuid)
    assert (info.memory_mib, info.max_memory_mib, info.state) == (2 * mib, 3 * mib, DomainState.RUNNING)


def test_redefine_says_at_once_what_an_end_means(bench: Bench) -> None:
    bench.needs(Capability.RESIZE)
    info = bench.booted(OBEYS, on_poweroff=OnEvent.DESTROY)
    spec = bench.toolstack.get_spec(info.uuid)
    bench.toolstack.redefine(info.uuid, dataclasses.replace(spec, on_poweroff=OnEvent.PRESERVE))
    bench.toolstack.shutdown(info.uuid)
    ended = bench.toolstack.wait(info.uuid, frozenset({DomainState.SHUTDOWN}), bench.kit.boot_timeout)
    assert ended is not None
    bench.toolstack.redefine(info.uuid, spec)  # also of what has ended
    bench.toolstack.reset(info.uuid)
    assert bench.toolstack.get_domain(info.uuid).state is DomainState.RUNNING


def test_redefine_changes_no_identity_and_keeps_to_the_host(bench: Bench, sized: DomainInfo) -> None:
    spec = bench.toolstack.get_spec(sized.uuid)
    for change in ({"name": "other"}, {"owner": "other"}, {"memory_mib": 0}, {"vcpus": 33}):
        with pytest.raises(SpecInvalid):
            bench.toolstack.redefine(sized.uuid, dataclasses.replace(spec, **change))
    cpus = bench.toolstack.host_info().cpus
    if cpus < 32:
        with pytest.raises(InsufficientVcpus):
            bench.toolstack.redefine(sized.uuid, dataclasses.replace(spec, max_vcpus=32))
    assert bench.toolstack.get_spec(sized.uuid) == spec


def test_a_resize_survives_the_host_process(bench: Bench, sized: DomainInfo) -> None:
    bench.needs(Capability.ADOPTION)
    assert bench.kit.restart_host is not None
    bench.toolstack.set_vcpus(sized.uuid, 2)
    bench.toolstack.set_memory(sized.uuid, 2 * bench.kit.memory_mib)
    bench.kit.restart_host()
    info, spec = bench.toolstack.get_domain(sized.uuid), bench.toolstack.get_spec(sized.uuid)
    assert (spec.vcpus, spec.memory_mib) == (2, 2 * bench.kit.memory_mib)
    assert (info.max_vcpus, info.memory_target_mib) == (2, 2 * bench.kit.memory_mib)


def test_stats_have_what_programs_need(bench: Bench, sized: DomainInfo) -> None:
    stats = bench.toolstack.stats(sized.uuid)
    assert {"cpu_time_ns", "vcpus", "memory_mib", "devices"} <= set(stats)
    assert stats["devices"] == [] and stats["memory_mib"] == bench.kit.memory_mib
