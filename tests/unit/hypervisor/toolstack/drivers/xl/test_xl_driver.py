"""What the driver makes of a host where others act too, and of one that fails. The rest is in the contract suite."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from fake_xen import Complaint
from xl_rig import Rig

from hypervisor import errors
from hypervisor.toolstack.api import DomainState, DomainType, Toolstack
from hypervisor.toolstack.drivers import xl
from hypervisor.toolstack.drivers.xl import records, runner
from hypervisor.toolstack.drivers.xl.sweep import sweep


def one_line(error: errors.ToolstackError) -> None:
    assert error.message and "\n" not in error.message


@pytest.mark.parametrize("kind", list(DomainType))
def test_every_type_of_domain(rig: Rig, kind: DomainType) -> None:
    spec = rig.spec(type=kind)
    info = rig.toolstack.create(spec)
    assert (info.type, info.state) == (kind, DomainState.PAUSED)
    assert rig.machine.find(spec.uuid).config["type"] == kind.value


def test_a_host_without_hardware_support_has_pv_only(rig: Rig) -> None:
    text = rig.machine.do_info().replace("pv hvm hap", "pv")
    rig.machine.faults["info"] = lambda _: text
    names = {item.value for item in rig.toolstack.capabilities()}
    assert "pv" in names and not {"hvm", "pvh"} & names
    with pytest.raises(errors.Unsupported, match="type pvh"):
        rig.toolstack.create(rig.spec(type=DomainType.PVH))


def test_the_marker_is_dom0s_alone_and_no_domid_is_stored(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec())
    with rig.machine.store() as store:
        for name, value in (("uuid", info.uuid), ("owner", "unit")):
            path = f"/local/domain/{info.domid}/reeve/{name}"
            assert store.read(path) == value and store.perms(path) == "n0"
    record = rig.toolstack._host.record(info.uuid)
    assert "domid" not in str(record.to_json()) and records.Record.from_json(record.to_json()) == record


def test_what_others_made_is_listed_and_left_alone(rig: Rig) -> None:
    spec = rig.spec()
    with rig.machine.changed:
        rig.machine.add(rig.config(spec) | {"name": "it has spaces"}, "r")
    (info,) = rig.toolstack.list_domains()
    assert (info.uuid, info.name, info.owner, info.state) == (spec.uuid, "it has spaces", "", DomainState.RUNNING)
    for verb in ("destroy", "pause", "shutdown", "reset", "open_console"):
        with pytest.raises(errors.NotOurs) as caught:
            getattr(rig.toolstack, verb)(spec.uuid)
        one_line(caught.value)
    assert not rig.machine.find(spec.uuid).gone


def test_one_that_another_thread_of_ours_has_just_dealt_with(rig: Rig) -> None:
    """Looked at before, with its record gone since: it is not shown as it was."""
    info = rig.toolstack.create(rig.spec())
    machine = rig.machine

    def listed(args: list[str]) -> str:
        del machine.faults["list"]
        with machine.changed:
            machine.end(machine.domains[info.domid], 3)
            text = machine.do_list(*args)
            machine.do_destroy(str(info.domid))
        rig.toolstack._host.records.delete(info.uuid)
        return text

    machine.faults["list"] = listed
    with pytest.raises(errors.DomainNotFound):
        rig.toolstack.get_domain(info.uuid)


def test_a_record_alone_is_no_proof(rig: Rig) -> None:
    """Somebody destroyed our domain and made another one with its UUID."""
    spec = rig.spec()
    domid = rig.toolstack.create(spec).domid
    with rig.machine.changed:
        rig.machine.do_destroy(str(domid))
        rig.machine.add(rig.config(spec), "r")
    with pytest.raises(errors.NotOurs, match="no marker"):
        rig.toolstack.destroy(spec.uuid)
    assert rig.toolstack.get_domain(spec.uuid).owner == ""


def test_one_destroyed_behind_our_back_is_gone(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec())
    with rig.machine.changed:
        rig.machine.do_destroy(str(info.domid))
    assert rig.toolstack.list_domains() == []
    with pytest.raises(errors.DomainNotFound):
        rig.toolstack.pause(info.uuid)


def test_one_renamed_behind_our_back_is_known_by_its_uuid(rig: Rig) -> None:
    spec = rig.spec()
    rig.toolstack.create(spec)
    rig.machine.find(spec.uuid).name = "other"
    info = rig.toolstack.get_domain(spec.uuid)
    assert (info.name, info.owner) == ("other", "unit") and spec.name in info.detail
    rig.toolstack.destroy(spec.uuid)
    assert rig.toolstack.list_domains() == []


def test_names_of_a_domain_on_its_way(rig: Rig) -> None:
    spec = rig.spec()
    rig.toolstack.create(spec)
    rig.machine.find(spec.uuid).name = f"{spec.name}--migratedaway"
    info = rig.toolstack.get_domain(spec.uuid)
    assert info.name == spec.name and "xl migrate" in info.detail
    with rig.machine.changed:  # within one host both halves have the UUID
        arriving = rig.machine.add(rig.config(spec) | {"name": f"{spec.name}--incoming"})
    (info,) = rig.toolstack.list_domains()
    assert (info.domid, info.name) == (arriving.domid, spec.name)
    with pytest.raises(errors.NameInUse):
        rig.toolstack.create(rig.spec(name=spec.name))


def test_an_unreadable_record_makes_a_domain_unknown_and_no_other(rig: Rig) -> None:
    first, second = rig.spec(), rig.spec()
    rig.toolstack.create(first)
    rig.toolstack.create(second)
    (rig.folder / "state" / f"{first.uuid}.json").write_text("{")
    states = {info.uuid: info.state for info in rig.toolstack.list_domains()}
    assert states == {first.uuid: DomainState.UNKNOWN, second.uuid: DomainState.PAUSED}
    with pytest.raises(errors.HostFailure, match="restore it from a backup"):
        rig.toolstack.destroy(first.uuid)


def test_two_agents_on_one_host(rig: Rig) -> None:
    uuid = rig.toolstack.create(rig.spec()).uuid
    other = rig.connect("another-state")
    try:
        with pytest.raises(errors.HostFailure, match="another agent") as caught:
            other.create(rig.spec())
        one_line(caught.value)
        assert str(rig.folder / "state") in caught.value.message
        with pytest.raises(errors.HostFailure, match="another agent"):
            other.pause(uuid)
        assert [info.uuid for info in other.list_domains()] == [uuid], "looking is free"
    finally:
        other.close()
    same = rig.connect()
    same.destroy(uuid)
    same.close()


def says(text: str, status: int = 1) -> Callable[[list[str]], str]:
    def fault(_args: list[str]) -> NoReturn:
        raise Complaint(text, status)

    return fault


@pytest.mark.parametrize(
    ("verb", "fault", "error"),
    [
        ("list", lambda _: "Segmentation fault, or is it", errors.HostFailure),
        ("list", lambda _: "Name  ID   Mem VCPUs\tState\tTime(s)\nnonsense\n", errors.HostFailure),
        ("list", lambda _: "\0" * 5000 + "\n", errors.HostFailure),
        ("info", lambda _: "host: x\n", errors.HostFailure),
        ("list", says("xenstore: Connection refused\ncannot init xl context"), errors.HostUnavailable),
        ("create", says("libxl: error: libxl_create.c:1: cannot add disk devices"), errors.HostFailure),
        ("create", says("libxl: error: libxl_dom.c:1: xc_dom_parse_image failed"), errors.KernelInvalid),
        ("create", says("write: No space left on device"), errors.HostFailure),
    ],
)
def test_faults_of_xl(rig: Rig, verb: str, fault: Callable[[list[str]], str], error: type[Exception]) -> None:
    rig.machine.faults[verb] = fault
    with pytest.raises(errors.ToolstackError) as caught:
        rig.toolstack.create(rig.spec())
    assert type(caught.value) is error
    one_line(caught.value)
    assert rig.machine.domains == {}
    if verb == "create":
        assert rig.toolstack._host.records.uuids() == [], "and no record of what is not there"


def test_an_xl_that_hangs_is_killed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = rig.folder / "pid"
    hanging = rig.folder / "hanging"
    hanging.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 1000\n")
    hanging.chmod(0o755)
    toolstack = xl.create({**rig.settings, "xl": str(hanging), "state_dir": str(rig.folder / "state")})
    for seconds in (0.3, 3.0, 30.0):  # it has to get so far as to say who it is
        for method in (runner.Runner.attempt, runner.Runner.run):
            monkeypatch.setattr(method, "__kwdefaults__", {"timeout": seconds, "give_up": None})
        with pytest.raises(errors.OperationTimeout, match="xl list did not end in time"):
            toolstack.list_domains()
        if pid_file.exists() and pid_file.read_text().strip():
            break
    toolstack.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_no_xenstored(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec())
    rig.xenstored.stop()
    try:
        assert rig.toolstack.get_domain(info.uuid).state is DomainState.UNKNOWN, "which does not mean gone"
        for act in (rig.toolstack.destroy, rig.toolstack.pause, lambda _: rig.toolstack.create(rig.spec())):
            with pytest.raises(errors.HostUnavailable, match="xenstored") as caught:
                act(info.uuid)
            one_line(caught.value)
    finally:
        rig.xenstored.start()


def test_a_full_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rig.toolstack.create(rig.spec())
    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(errors.HostFailure, match="No space left on device: free space") as caught:
        rig.toolstack.create(rig.spec())
    one_line(caught.value)
    assert len(rig.toolstack.list_domains()) == len(rig.toolstack._host.records.uuids()) == 1
    assert not list((rig.folder / "state").glob("*.new"))


def test_an_end_reaches_listeners_without_a_look(rig: Rig) -> None:
    heard = rig.listen()
    info = rig.toolstack.create(rig.spec(""))
    rig.toolstack.unpause(info.uuid)
    with rig.machine.changed:
        rig.machine.end(rig.machine.find(info.uuid), 0)
    rig.until(lambda: [event.kind for event in heard][-2:] == ["shutdown", "destroyed"], "the end to be told")
    assert rig.machine.domains == {}


def test_a_console_that_is_closed_leaves_no_process(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec(""))
    console = rig.toolstack.open_console(info.uuid)
    process: subprocess.Popen[bytes] = console._process  # type: ignore[attr-defined]
    console.close()
    assert process.returncode in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_console_ends_by_no_byte_that_is_typed(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec())
    console = rig.toolstack.open_console(info.uuid)
    try:
        console.write(b"\x1d")
        console.write(b"one\x1d two\r")
        rig.until(lambda: rig.machine.find(info.uuid).typed == "one two\r", "it to be typed as it is, but for that")
    finally:
        console.close()


def test_the_log_of_an_earlier_domain_of_that_name_is_not_shown(rig: Rig) -> None:
    Path(rig.machine.folder / "guest-same.log").write_text("another's secret\n")
    info = rig.toolstack.create(rig.spec(name="same"))
    rig.toolstack.unpause(info.uuid)
    log = rig.toolstack.console_log(info.uuid)
    assert b"up" in log and b"secret" not in log


def test_settings(tmp_path: Path) -> None:
    for wrong in ({"xll": "x"}, {"networks": "default"}, {"networks": "=br"}):
        with pytest.raises(errors.SpecInvalid) as caught:
            xl.create({**wrong, "state_dir": str(tmp_path)})
        one_line(caught.value)


def test_what_it_lacks_is_refused_by_name(rig: Rig) -> None:
    assert isinstance(rig.toolstack, Toolstack)
    for call in (
        lambda: rig.toolstack.template_create("x", "name", ident="i"),
        lambda: rig.toolstack.clone("name", rig.spec()),
        lambda: rig.toolstack.migration_offer("x"),
    ):
        with pytest.raises(errors.Unsupported, match="it lacks") as caught:
            call()
        one_line(caught.value)
    with pytest.raises(errors.TemplateNotFound):
        rig.toolstack.template_remove("name")
    assert rig.toolstack.template_list() == rig.toolstack.migration_list() == []


def test_shares_reach_xen_and_count_from_the_start(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec(weight=512, cap=50))
    domain = rig.machine.find(info.uuid)
    assert (domain.weight, domain.cap) == (512, 50)
    rig.toolstack.set_scheduling(info.uuid, 128, 0)
    assert (domain.weight, domain.cap) == (128, 0)
    text = rig.machine.do_info().replace("credit2", "rtds")
    rig.machine.faults["info"] = lambda _: text
    with pytest.raises(errors.Unsupported, match="rtds") as caught:
        rig.toolstack.set_scheduling(info.uuid, 256, 0)
    one_line(caught.value)
    assert rig.toolstack.get_spec(info.uuid).weight == 128


def test_a_size_that_xl_refuses_is_in_no_spec(rig: Rig) -> None:
    info = rig.toolstack.create(rig.spec(max_vcpus=2, max_memory_mib=32))
    for verb in ("vcpu-set", "mem-set"):
        rig.machine.faults[verb] = says("libxl: error: libxl_mem.c:1: it will not have it")
    for call in (lambda: rig.toolstack.set_vcpus(info.uuid, 2), lambda: rig.toolstack.set_memory(info.uuid, 32)):
        with pytest.raises(errors.HostFailure, match="will not have it"):
            call()
    spec = rig.toolstack.get_spec(info.uuid)
    assert (spec.vcpus, spec.memory_mib) == (1, 16)


def test_one_that_cannot_start_anew_hides_no_other(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    kept, ended = rig.toolstack._life.create(rig.spec()), rig.toolstack._life.create(rig.spec("reboot"))
    rig.machine.faults["create"] = says("libxl: error: libxl_dom.c:1: xc_dom_parse_image failed")
    rig.toolstack.unpause(ended.uuid)
    assert [info.uuid for info in rig.toolstack.list_domains()] == [kept.uuid]
    assert rig.toolstack.host_info().domains == 1 and ended.uuid in caplog.text
    del rig.machine.faults["create"]
    sweep(rig.toolstack._host, rig.toolstack._life)
    assert rig.toolstack.get_domain(ended.uuid).state is DomainState.RUNNING
