"""Toolstack.create: paused, marked, all or nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit import OWNER, Bench, newc

from hypervisor import errors
from hypervisor.toolstack.api import MAX_VCPUS, Capability, DomainSpec, DomainState, DomainType, KernelBoot

MANY_MIB = 1 << 30  # a petabyte: no host has it


def test_a_new_domain_is_paused_and_marked(bench: Bench) -> None:
    spec = bench.spec(metadata=(("project", "p1"), ("user", "u1")))
    before = time.time()
    info = bench.toolstack.create(spec)
    assert info.state is DomainState.PAUSED
    assert (info.uuid, info.name, info.owner) == (spec.uuid, spec.name, OWNER)
    assert (info.vcpus, info.memory_mib, info.type) == (1, spec.memory_mib, DomainType.PV)
    assert info.metadata == spec.metadata
    assert info.domid > 0
    assert info.shutdown_reason is None
    assert before - 1 <= info.created_at <= time.time() + 1


def test_get_domain_and_get_spec_know_it(bench: Bench) -> None:
    spec = bench.spec(metadata=(("k", "v"),))
    info = bench.toolstack.create(spec)
    found = bench.toolstack.get_domain(spec.uuid)
    assert dataclasses.replace(found, cpu_time_ns=0) == dataclasses.replace(info, cpu_time_ns=0)
    assert bench.toolstack.get_spec(spec.uuid) == spec


def test_no_guest_code_runs_before_unpause(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    assert bench.toolstack.console_log(info.uuid) == b""
    assert bench.toolstack.get_domain(info.uuid).state is DomainState.PAUSED


def test_create_takes_memory_from_the_host(bench: Bench) -> None:
    before = bench.toolstack.host_info()
    bench.toolstack.create(bench.spec())
    after = bench.toolstack.host_info()
    assert before.memory_free_mib - after.memory_free_mib >= bench.kit.memory_mib
    assert after.domains == before.domains + 1


def test_a_uuid_in_use_is_refused(bench: Bench) -> None:
    first = bench.toolstack.create(bench.spec())
    bench.refused(errors.DomainExists, bench.spec(uuid=first.uuid))
    assert bench.toolstack.get_domain(first.uuid).name == first.name


def test_a_name_in_use_is_refused(bench: Bench) -> None:
    first = bench.toolstack.create(bench.spec())
    bench.refused(errors.NameInUse, bench.spec(name=first.name))
    assert bench.toolstack.get_domain(first.uuid).state is DomainState.PAUSED


def test_of_many_creates_with_one_uuid_one_wins(bench: Bench) -> None:
    spec = bench.spec()

    def attempt(number: int) -> str:
        try:
            bench.toolstack.create(dataclasses.replace(spec, name=f"{spec.name}-{number}"))
        except errors.DomainExists:
            return "refused"
        return "made"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(attempt, range(4)))
    assert outcomes == ["made", "refused", "refused", "refused"]
    assert [info.uuid for info in bench.toolstack.list_domains()] == [spec.uuid]


def test_more_memory_than_the_host_has_is_refused(bench: Bench) -> None:
    error = bench.refused(errors.InsufficientMemory, bench.spec(memory_mib=MANY_MIB))
    assert str(MANY_MIB) in error.message


def test_memory_that_other_domains_hold_is_refused(bench: Bench) -> None:
    free = bench.toolstack.host_info().memory_free_mib
    bench.toolstack.create(bench.spec())
    bench.refused(errors.InsufficientMemory, bench.spec(memory_mib=free))


def test_more_vcpus_than_the_host_has_are_refused(bench: Bench) -> None:
    cpus = bench.toolstack.host_info().cpus
    if cpus >= MAX_VCPUS:
        pytest.skip("this host has as many CPUs as a domain may have vCPUs")
    bench.refused(errors.InsufficientVcpus, bench.spec(vcpus=cpus + 1))


def test_a_domain_type_the_driver_has_not_is_unsupported(bench: Bench) -> None:
    if Capability.HVM in bench.toolstack.capabilities():
        pytest.skip("this driver has every domain type")
    bench.refused(errors.Unsupported, bench.spec(type=DomainType.HVM))


def _cmdline(text: str) -> Callable[[DomainSpec], DomainSpec]:
    return lambda spec: dataclasses.replace(spec, boot=dataclasses.replace(spec.boot, cmdline=text))


def _with(**fields: object) -> Callable[[DomainSpec], DomainSpec]:
    return lambda spec: dataclasses.replace(spec, **fields)  # type: ignore[arg-type]


BAD_SPECS = {
    "uuid in capitals": _with(uuid="ABCDEF00-0000-0000-0000-000000000001"),
    "uuid is no uuid": _with(uuid="../../etc"),
    "no name": _with(name=""),
    "name with a slash": _with(name="a/b"),
    "name starts with a dash": _with(name="-a"),
    "name too long": _with(name="n" * 64),
    "no vcpus": _with(vcpus=0),
    "too many vcpus": _with(vcpus=MAX_VCPUS + 1),
    "max_vcpus below vcpus": _with(vcpus=2, max_vcpus=1),
    "no memory": _with(memory_mib=0),
    "negative memory": _with(memory_mib=-1),
    "max_memory below memory": _with(max_memory_mib=1),
    "no kernel": _with(boot=KernelBoot(kernel="")),
    "cmdline too long": _cmdline("x" * 1024),
    "cmdline with NUL": _cmdline("a\0b"),
}


@pytest.mark.parametrize("spoil", BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_an_unusable_spec_is_refused(bench: Bench, spoil: Callable[[DomainSpec], DomainSpec]) -> None:
    error = bench.refused(errors.SpecInvalid, spoil(bench.spec()))
    assert not error.retryable


@pytest.mark.parametrize("content", [None, b"", b"#!/bin/sh\necho no kernel\n" * 100, b"\x7fELX" + bytes(4096)])
def test_a_file_that_is_no_kernel_is_refused(bench: Bench, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "kernel"
    if content is not None:
        path.write_bytes(content)
    error = bench.refused(errors.KernelInvalid, bench.spec(boot=KernelBoot(kernel=str(path))))
    assert str(path) in error.message


def test_a_folder_is_no_kernel(bench: Bench, tmp_path: Path) -> None:
    bench.refused(errors.KernelInvalid, bench.spec(boot=KernelBoot(kernel=str(tmp_path))))


def test_a_kernel_without_xen_notes_is_refused(bench: Bench) -> None:
    if bench.kit.no_notes is None:
        pytest.skip(f"the {bench.kit.name} kit has no kernel without Xen notes")
    error = bench.refused(errors.KernelNotXen, bench.spec(boot=bench.kit.no_notes))
    assert bench.kit.no_notes.kernel in error.message


@pytest.mark.parametrize("content", [None, b""])
def test_a_ramdisk_that_is_not_there_is_refused(bench: Bench, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ramdisk"
    if content is not None:
        path.write_bytes(content)
    spec = bench.spec()
    boot = dataclasses.replace(spec.boot, ramdisk=str(path))
    error = bench.refused(errors.RamdiskInvalid, dataclasses.replace(spec, boot=boot))
    assert str(path) in error.message


def test_memory_too_small_for_kernel_and_ramdisk_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "ramdisk"
    path.write_bytes(newc("big", bytes(8 << 20)))
    spec = bench.spec(memory_mib=4)
    boot = dataclasses.replace(spec.boot, ramdisk=str(path))
    bench.refused(errors.MemoryTooSmall, dataclasses.replace(spec, boot=boot))


def test_after_a_refusal_the_same_uuid_and_name_can_be_used(bench: Bench, tmp_path: Path) -> None:
    spec = bench.spec()
    bench.refused(errors.KernelInvalid, dataclasses.replace(spec, boot=KernelBoot(kernel=str(tmp_path / "missing"))))
    assert bench.toolstack.create(spec).uuid == spec.uuid
