"""Specs and infos of the toolstack API: what is accepted, what is refused, and their JSON forms."""

from __future__ import annotations

import dataclasses
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.api import (
    MAX_VCPUS,
    DomainInfo,
    DomainSpec,
    DomainState,
    DomainType,
    HostInfo,
    KernelBoot,
    OnEvent,
    ShutdownReason,
)

UUID = "12345678-1234-4234-8234-1234567890ab"
GOOD = DomainSpec(uuid=UUID, name="web", boot=KernelBoot("/boot/vmlinuz"), memory_mib=64)
NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=63)

specs = st.builds(
    DomainSpec,
    uuid=st.uuids().map(str),
    name=NAMES,
    boot=st.builds(
        KernelBoot,
        kernel=st.text(min_size=1),
        ramdisk=st.none() | st.text(min_size=1),
        cmdline=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200),
    ),
    memory_mib=st.integers(1, 1 << 20),
    vcpus=st.integers(1, MAX_VCPUS),
    type=st.sampled_from(DomainType),
    on_poweroff=st.sampled_from(OnEvent),
    on_reboot=st.sampled_from(OnEvent),
    on_crash=st.sampled_from(OnEvent),
    owner=st.text(),
    metadata=st.dictionaries(st.text(), st.text(), max_size=3).map(lambda d: tuple(sorted(d.items()))),
)


@given(specs)
def test_a_good_spec_survives_its_json_form(spec: DomainSpec) -> None:
    spec.validate()
    assert DomainSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_zero_maxima_mean_the_boot_values() -> None:
    assert (GOOD.effective_max_vcpus, GOOD.effective_max_memory_mib) == (1, 64)
    larger = dataclasses.replace(GOOD, max_vcpus=4, max_memory_mib=128)
    assert (larger.effective_max_vcpus, larger.effective_max_memory_mib) == (4, 128)


@pytest.mark.parametrize("name", ["a", "9", "A.b_c-d", "n" * 63])
def test_names_that_are_accepted(name: str) -> None:
    dataclasses.replace(GOOD, name=name).validate()


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a b", "a/b", "ä", "a\n", "a\0", "n" * 64])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(SpecInvalid, match="name"):
        dataclasses.replace(GOOD, name=name).validate()


@pytest.mark.parametrize("uuid", ["", "x", UUID.upper(), UUID.replace("-", ""), f"{{{UUID}}}", f"urn:uuid:{UUID}"])
def test_uuids_that_are_refused(uuid: str) -> None:
    with pytest.raises(SpecInvalid, match="uuid"):
        dataclasses.replace(GOOD, uuid=uuid).validate()


def test_the_command_line_is_counted_in_bytes() -> None:
    dataclasses.replace(GOOD, boot=KernelBoot("/k", cmdline="x" * 1023)).validate()
    with pytest.raises(SpecInvalid, match="1023"):
        dataclasses.replace(GOOD, boot=KernelBoot("/k", cmdline="ä" * 512)).validate()


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD.to_json(), **fields}


ILL_TYPED = [
    changed(extra=1),
    changed(memory_mib="64"),
    changed(memory_mib=True),
    changed(memory_mib=64.0),
    changed(vcpus=None),
    changed(uuid=5),
    changed(name=["web"]),
    changed(owner=None),
    changed(boot=None),
    changed(boot="/boot/vmlinuz"),
    changed(boot={"kernel": 1}),
    changed(boot={"kernel": "/k", "ramdisk": 5}),
    changed(boot={"kernel": "/k", "cmdline": []}),
    changed(boot={"kernel": "/k", "extra": 1}),
    changed(boot={}),
    changed(type="lxc"),
    changed(on_crash="explode"),
    changed(metadata=5),
    {"uuid": UUID},
    {},
]


@pytest.mark.parametrize("data", ILL_TYPED, ids=lambda data: json.dumps(data)[-40:])
def test_ill_typed_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid) as caught:
        DomainSpec.from_json(data)
    assert "\n" not in caught.value.message


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(SpecInvalid, match=r"'memory'.*memory_mib"):
        DomainSpec.from_json(changed(memory=64))


@pytest.mark.parametrize("reason", [None, *ShutdownReason])
def test_domain_info_survives_its_json_form(reason: ShutdownReason | None) -> None:
    info = DomainInfo(
        uuid=UUID,
        name="web",
        domid=3,
        state=DomainState.SHUTDOWN,
        vcpus=1,
        memory_mib=64,
        shutdown_reason=reason,
        metadata=(("a", "b"),),
    )
    assert DomainInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_host_info_survives_its_json_form() -> None:
    info = HostInfo("node1", "fake", "1", 4, 1024, 512, 2, ("pv", "smp"), (("engine", "fast"),))
    assert HostInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
