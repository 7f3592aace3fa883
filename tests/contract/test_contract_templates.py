"""Templates, and domains that begin from them, on drivers with `Capability.TEMPLATES`."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator

import pytest
from kit import OWNER, POWEROFF, SUSPENDS, WAITS, Bench, assert_readable

from hypervisor.errors import (
    DomainExists,
    DomainNotFound,
    NameInUse,
    OperationTimeout,
    SpecInvalid,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
    WrongState,
)
from hypervisor.toolstack.api import Capability, DomainInfo, DomainSpec, DomainState, OnEvent, TemplateInfo
from hypervisor.toolstack.devices import DiskSpec, NicSpec

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def guest(bench: Bench) -> Iterator[DomainInfo]:
    bench.needs(Capability.TEMPLATES)
    yield bench.booted(SUSPENDS, metadata=(("colour", "blue"),))
    for info in bench.toolstack.list_domains():
        bench.toolstack.destroy(info.uuid)
    for template in bench.toolstack.template_list():
        bench.toolstack.template_remove(template.name)


def make(bench: Bench, guest: DomainInfo, *, keep_running: bool = False) -> TemplateInfo:
    name = f"t-{uuid.uuid4().hex[:8]}"
    return bench.toolstack.template_create(guest.uuid, name, ident=str(uuid.uuid4()), keep_running=keep_running)


def begin(bench: Bench, template: TemplateInfo, **fields: object) -> DomainSpec:
    ident = str(uuid.uuid4())
    values: dict[str, object] = {"uuid": ident, "name": f"c-{ident[:8]}", "owner": OWNER, **fields}
    spec = dataclasses.replace(template.spec, **values)  # type: ignore[arg-type]
    bench.guests[spec.uuid] = SUSPENDS
    return spec


def test_a_template_of_a_domain(bench: Bench, guest: DomainInfo) -> None:
    toolstack, spec = bench.toolstack, bench.toolstack.get_spec(guest.uuid)
    made = make(bench, guest)
    assert toolstack.list_domains() == []
    assert (made.bits, made.users, made.downtime_ms) == (64, (), 0)
    assert made.spec == dataclasses.replace(spec, owner="", max_vcpus=spec.effective_max_vcpus,
                                            max_memory_mib=spec.effective_max_memory_mib)  # fmt: skip
    assert made.pages > 0 and made.bytes > 0 and abs(made.created_at - time.time()) < 60
    assert toolstack.template_get(made.name) == made and toolstack.template_list() == [made]
    toolstack.template_remove(made.name)
    assert toolstack.template_list() == []
    for missing in (toolstack.template_get, toolstack.template_remove):
        with pytest.raises(TemplateNotFound) as caught:
            missing(made.name)
        assert_readable(caught.value)


def test_domains_begin_from_it(bench: Bench, guest: DomainInfo) -> None:
    toolstack, template = bench.toolstack, make(bench, guest)
    specs = [begin(bench, template) for _ in range(3)]
    for spec in specs:
        info = toolstack.clone(template.name, spec)
        assert (info.uuid, info.name, info.state, info.owner) == (spec.uuid, spec.name, DomainState.PAUSED, OWNER)
        assert toolstack.get_spec(spec.uuid) == spec and info.domid != guest.domid
        toolstack.unpause(spec.uuid)
    for spec in specs:
        bench.answers(spec.uuid)
    assert toolstack.template_get(template.name).users == tuple(sorted(spec.uuid for spec in specs))
    with pytest.raises(TemplateInUse) as caught:
        toolstack.template_remove(template.name)
    assert_readable(caught.value)
    toolstack.reset(specs[0].uuid)  # from its kernel
    for spec in specs[1:]:
        toolstack.destroy(spec.uuid)
    toolstack.template_remove(template.name)
    assert toolstack.get_domain(specs[0].uuid).state is DomainState.RUNNING


def test_one_that_goes_on(bench: Bench, guest: DomainInfo) -> None:
    toolstack, template = bench.toolstack, make(bench, guest, keep_running=True)
    now = toolstack.get_domain(guest.uuid)
    assert (now.state, now.domid) == (DomainState.RUNNING, guest.domid) and template.downtime_ms > 0
    spec = begin(bench, template)
    toolstack.clone(template.name, spec)
    toolstack.unpause(spec.uuid)
    bench.answers(spec.uuid)
    bench.answers(guest.uuid)
    toolstack.template_remove(template.name, force=True)
    bench.answers(spec.uuid)
    with pytest.raises(TemplateNotFound):
        toolstack.clone(template.name, begin(bench, template))


def test_what_cannot_begin(bench: Bench, guest: DomainInfo) -> None:
    toolstack, template = bench.toolstack, make(bench, guest, keep_running=True)
    sizes = {"memory_mib": template.spec.memory_mib + 1, "max_memory_mib": 0}, {"vcpus": 2, "max_vcpus": 0}
    wrong = [(SpecInvalid, fields) for fields in (*sizes, {"max_vcpus": 3})]
    taken: list[tuple[type[Exception], dict[str, object]]] = [
        (DomainExists, {"uuid": guest.uuid}), (NameInUse, {"name": guest.name}), (SpecInvalid, {"name": "-"}),
    ]  # fmt: skip
    for error, fields in (*wrong, *taken):
        with pytest.raises(error) as caught:
            toolstack.clone(template.name, begin(bench, template, **fields))
        assert_readable(caught.value)  # type: ignore[arg-type]
    for name in ("nothing", "../x", "", "."):
        with pytest.raises((TemplateNotFound, SpecInvalid)):
            toolstack.clone(name, begin(bench, template))
    assert [info.uuid for info in toolstack.list_domains()] == [guest.uuid]
    bench.answers(guest.uuid)


def test_what_no_template_is_made_of(bench: Bench, guest: DomainInfo) -> None:
    toolstack, there = bench.toolstack, make(bench, guest, keep_running=True)
    for name in ("../x", "/x", "", ".hidden", "a" * 64, "a\0b"):
        with pytest.raises(SpecInvalid) as caught:
            toolstack.template_create(guest.uuid, name, ident=NOBODY)
        assert_readable(caught.value)
    with pytest.raises(TemplateExists):
        toolstack.template_create(guest.uuid, there.name, ident=NOBODY)
    toolstack.pause(guest.uuid)
    with pytest.raises(WrongState):
        make(bench, guest)
    toolstack.unpause(guest.uuid)
    bench.answers(guest.uuid)
    ended = bench.start(POWEROFF, on_poweroff=OnEvent.PRESERVE)
    toolstack.wait(ended.uuid, frozenset({DomainState.SHUTDOWN}), bench.kit.boot_timeout)
    with pytest.raises(WrongState):
        make(bench, ended)
    with pytest.raises(DomainNotFound):
        toolstack.template_create(NOBODY, "x", ident=NOBODY)
    deaf = bench.booted(WAITS)
    with pytest.raises(OperationTimeout):
        toolstack.template_create(deaf.uuid, "x", ident=NOBODY, timeout=0.3)
    assert toolstack.get_domain(deaf.uuid).state is DomainState.RUNNING
    assert toolstack.template_list() == [there]


def test_its_domain_comes_back_as_it_was_on_other_disks(bench: Bench, guest: DomainInfo) -> None:
    """What a snapshot is made of, and as often as it is wanted."""
    bench.needs(Capability.DISK)
    toolstack, disk = bench.toolstack, DiskSpec("xvda", bench.image())
    one = bench.booted(SUSPENDS, disks=(disk,), metadata=(("colour", "red"),))
    before, template = toolstack.get_spec(one.uuid), make(bench, one)
    for _ in range(2):
        other = dataclasses.replace(disk, path=bench.image())
        info = toolstack.clone(template.name, dataclasses.replace(template.spec, owner=OWNER, disks=(other,)))
        assert (info.uuid, info.name, info.state, info.owner) == (one.uuid, one.name, DomainState.PAUSED, OWNER)
        now = toolstack.get_spec(one.uuid)
        assert (now.disks, now.metadata, now.boot) == ((other,), before.metadata, before.boot)
        toolstack.unpause(one.uuid)
        bench.answers(one.uuid)
        toolstack.destroy(one.uuid)


def test_devices_of_the_guest_must_be_there(bench: Bench, guest: DomainInfo) -> None:
    bench.needs(Capability.DISK)
    bench.needs(Capability.NIC)
    toolstack = bench.toolstack
    disk, nic = DiskSpec("xvda", bench.image()), NicSpec(0, "00:16:3e:01:02:03")
    one = bench.booted(SUSPENDS, disks=(disk,), nics=(nic,))
    with pytest.raises(WrongState):
        make(bench, one, keep_running=True)
    template = make(bench, one)
    for fields in ({"disks": ()}, {"nics": ()}):
        with pytest.raises(SpecInvalid) as caught:
            toolstack.clone(template.name, begin(bench, template, **fields))
        assert_readable(caught.value)
    own = dataclasses.replace(disk, path=bench.image()), dataclasses.replace(nic, mac="00:16:3e:01:02:04")
    spec = begin(bench, template, disks=own[:1], nics=own[1:])
    toolstack.clone(template.name, spec)
    assert [(device.kind, device.id) for device in toolstack.list_devices(spec.uuid)] == [
        ("disk", "xvda"),
        ("nic", "0"),
    ]
