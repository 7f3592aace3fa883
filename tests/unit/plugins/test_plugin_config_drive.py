"""The config drive of `create`: written before the domain is built, gone with it."""

from __future__ import annotations

import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from iso_reader import read_iso

from agent.api import Check
from agent.configdrive.drives import wanted_drives
from agent.configdrive.steps import WriteDriveStep, drives_of
from hypervisor.errors import HostFailure

UUID = "11111111-2222-3333-4444-555555555555"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJq me@there"
MAC = "00:16:3e:00:00:01"
NIC = {"mac": MAC, "addresses": ["10.0.0.2", "fd00::2"]}
STATIC = {
    "nic": 0,
    "addresses": ["10.0.0.2/24", "fd00::2/64"],
    "gateways": ["10.0.0.1", "fd00::1"],
    "dns": ["10.0.0.3"],
}
DRIVE: dict[str, Any] = {
    "hostname": "web.example",
    "ssh_keys": [KEY],
    "user_data": "#!/bin/sh\ntrue\n",
    "metadata": {"role": "db", "instance-id": "another"},
    "networks": [STATIC],
}


def args(rig: Rig, **changes: Any) -> dict[str, Any]:
    base = {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": str(rig.kernel), "nics": [NIC]}
    return base | {"config_drive": DRIVE} | changes


def drive(rig: Rig) -> Path:
    return drives_of(rig.host).path(UUID)


def test_it_is_written_attached_and_removed_at_destroy(rig: Rig) -> None:
    reply = rig.run("create", args(rig, disks=[{"id": "xvda", "path": rig.image()}]))
    assert reply.ok, reply.error
    assert [step["name"] for step in reply.steps] == ["claim", "config_drive", "build", "start"]
    disk = rig.toolstack.get_spec(UUID).disks[-1]
    assert (disk.id, disk.path, disk.readonly, disk.shared) == ("xvdp", str(drive(rig)), True, False)
    assert stat.S_IMODE(drive(rig).stat().st_mode) == 0o600
    assert stat.S_IMODE(drive(rig).parent.stat().st_mode) == 0o700
    label, files = read_iso(drive(rig))
    assert label == "cidata" and files["user-data"] == b"#!/bin/sh\ntrue\n"
    for text in (UUID, "web.example", KEY, '"role": "db"'):
        assert text.encode() in files["meta-data"]
    for text in (MAC, "10.0.0.2/24", "fd00::2/64", '"gateway4": "10.0.0.1"', '"gateway6": "fd00::1"'):
        assert text.encode() in files["network-config"]
    reply = rig.run("destroy", {"uuid": UUID})
    assert reply.ok and [step["name"] for step in reply.steps] == ["destroy", "remove_drive"]
    assert list(drive(rig).parent.iterdir()) == []
    rig.clean()


def test_a_domain_s_own_name_dhcp_and_the_other_format(rig: Rig) -> None:
    wanted = {"format": "configdrive", "id": "xvdc"}
    rig.ok("create", args(rig, name="web_1", config_drive=wanted))
    assert rig.toolstack.get_spec(UUID).disks[0].id == "xvdc"
    label, files = read_iso(drive(rig))
    assert label == "config-2"
    assert b'"hostname": "web-1"' in files["openstack/latest/meta_data.json"]
    assert b"ipv4_dhcp" in files["openstack/latest/network_data.json"]
    assert MAC.encode() in files["openstack/latest/network_data.json"]


def test_a_saved_domain_finds_its_drive_again(rig: Rig) -> None:
    rig.ok("create", args(rig))
    path = Path(rig.ok("save", {"uuid": UUID, "name": "web.save"})["path"])
    drives_of(rig.host).remove(UUID)
    assert drive(rig).exists()
    other = UUID.replace("1", "2")
    rig.ok("restore", {"uuid": other, "name": "web.save"})
    assert rig.toolstack.get_spec(other).disks[0].path == str(drive(rig))
    path.unlink()
    assert str(drive(rig)) in wanted_drives(rig.toolstack, set())
    rig.ok("destroy", {"uuid": other})
    assert drive(rig).exists() and not wanted_drives(rig.toolstack, set()), "now it is the sweep's"


def test_a_destroy_without_a_drive_has_one_step(rig: Rig) -> None:
    uuid = rig.create()
    assert [step["name"] for step in rig.run("destroy", {"uuid": uuid}).steps] == ["destroy"]


@pytest.mark.parametrize("verb", ["create", "unpause"])
def test_it_goes_when_the_create_is_undone(rig: Rig, verb: str) -> None:
    rig.toolstack.inject_error(verb, HostFailure("injected"))
    rig.refused("host.failure", "create", args(rig))
    assert list(drive(rig).parent.iterdir()) == []
    assert rig.toolstack.list_domains() == []


def context(rig: Rig, instruction: str) -> Any:
    """What `WriteDriveStep` sees of its context."""
    return types.SimpleNamespace(host=rig.host, instruction=instruction)


def test_the_step_looks_at_what_is_there(rig: Rig) -> None:
    """Interrupted before, within and after `run`; and beside a file that another instruction left."""
    plan = rig.verbs["create"].plugin.plan(args(rig), rig.host)
    step = next(step for step in plan.steps if isinstance(step, WriteDriveStep))
    kinds = type(rig.verbs["create"].plugin).step_kinds
    assert type(plan).from_json(plan.to_json(), kinds) == plan
    mine, other = context(rig, "one"), context(rig, "two")
    assert step.check(mine) is Check.NOT_DONE
    step.undo(mine)
    step.run(mine)
    assert step.check(mine) is Check.DONE and step.check(other) is Check.NOT_DONE
    step.run(other)
    assert step.check(mine) is Check.NOT_DONE and step.check(other) is Check.DONE
    half = drive(rig).with_name(drive(rig).name + ".new")
    half.write_bytes(b"half")
    drive(rig).write_bytes(b"short")
    assert step.check(mine) is Check.NOT_DONE
    step.run(mine)
    assert step.check(mine) is Check.DONE
    half.write_bytes(b"half")
    step.undo(mine)
    step.undo(mine)
    assert list(drive(rig).parent.iterdir()) == []


def test_a_drive_that_cannot_be_written_fails_the_create(rig: Rig) -> None:
    drive(rig).parent.write_text("in the way")
    error = rig.refused("host.failure", "create", args(rig))
    assert "config drive" in error["message"] and rig.toolstack.list_domains() == []


def test_a_drive_that_cannot_be_removed_does_not_fail_the_destroy(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.ok("create", args(rig))
    drive(rig).unlink()
    drive(rig).mkdir()
    rig.ok("destroy", {"uuid": UUID})
    assert "cannot be removed" in caplog.text and rig.toolstack.list_domains() == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"config_drive": {"colour": 1}}, "colour"),
    ({"config_drive": {"format": "vfat"}}, "vfat"),
    ({"config_drive": {"id": "sda"}}, "sda"),
    ({"config_drive": {"ssh_keys": ["no key"]}}, "no public key"),
    ({"config_drive": {"ssh_keys": [KEY] * 65}}, "too long"),
    ({"config_drive": {"user_data": "echo"}}, "user data"),
    ({"config_drive": {"hostname": "-"}}, "hostname"),
    ({"config_drive": {}, "name": "web."}, "hostname"),
    ({"config_drive": {"metadata": {"a": 1}}}, "metadata.a"),
    ({"config_drive": {"networks": [{"nic": 1}]}}, "nic 1, which the domain has not"),
    ({"config_drive": {"networks": [{"nic": 0}, {"nic": 0}]}}, "two networks are for nic 0"),
    ({"config_drive": {"networks": [{"addresses": ["10.0.0.2/24"]}]}}, "'nic'"),
    ({"config_drive": {"networks": [{"nic": 0, "addresses": ["10.0.0.9/24"]}]}}, "may not send from 10.0.0.9"),
    ({"config_drive": {"networks": [{"nic": 0, "addresses": ["10.0.0.2"]}]}}, "prefix length"),
    ({"config_drive": {"networks": [{"nic": 0, "gateways": ["10.0.0.1"]}]}}, "gateway 10.0.0.1"),
    ({"config_drive": {"id": "xvda"}, "disks": [{"id": "xvda", "path": "/x"}]}, "xvda is given twice"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    rig: Rig, changes: dict[str, Any], says: str
) -> None:
    reply = rig.run("create", args(rig, **changes))
    assert reply.error is not None and reply.error["code"] in ("instruction.bad_args", "domain.spec_invalid")
    assert says in reply.error["message"] and "\n" not in reply.error["message"]
    assert not drive(rig).parent.exists()
    rig.clean()


def test_no_room_for_another_disk(rig: Rig) -> None:
    disks = [{"id": f"xvd{letter}", "path": f"/{letter}"} for letter in "abcdefghijklmnop"]
    error = rig.refused("instruction.bad_args", "create", args(rig, disks=disks))
    assert "as many disks" in error["message"]
