"""attach_disk, attach_nic, detach_disk, detach_nic, block_list, network_list, and create with devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent.journal import StepState
from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.devices import DeviceInfo
from hypervisor.toolstack.drivers.fake import FakeToolstack

NOBODY = "00000000-0000-0000-0000-000000000001"
MAC = "00:16:3e:00:00:01"
VERBS: list[tuple[str, dict[str, Any]]] = [
    ("attach_disk", {"disk": {"id": "xvda", "path": "/x"}}),
    ("attach_nic", {"nic": {"id": 0}}),
    ("detach_disk", {"id": "xvda"}),
    ("detach_nic", {"id": 0}),
]


def device(rig: Rig, uuid: str, ident: str = "xvda") -> DeviceInfo | None:
    return next((item for item in rig.toolstack.list_devices(uuid) if item.id == ident), None)


@pytest.mark.parametrize(("verb", "args"), VERBS)
def test_foreign_and_unknown_domains(rig: Rig, verb: str, args: dict[str, Any]) -> None:
    rig.refused("domain.not_ours", verb, {"uuid": rig.foreign(), **args})
    rig.refused("domain.not_found", verb, {"uuid": NOBODY, **args})
    rig.refused("instruction.bad_args", verb, {"uuid": NOBODY})
    rig.refused("instruction.bad_args", verb, args)


def test_a_disk_comes_and_goes(rig: Rig) -> None:
    uuid = rig.create()
    disk = {"id": "xvdb", "path": rig.image(), "readonly": True, "limits": {"iops": 100}}
    reply = rig.run("attach_disk", {"uuid": uuid, "disk": disk})
    assert reply.ok and reply.result is not None
    assert [step["name"] for step in reply.steps] == ["attach", "connect"]
    made = reply.result["device"]
    assert (made["kind"], made["id"], made["state"], made["size_bytes"]) == ("disk", "xvdb", "connected", 1 << 20)
    assert made["spec"]["limits"]["iops"] == 100 and rig.toolstack.get_spec(uuid).disks[0].readonly
    # The same again is quiet, another under its id is not.
    assert rig.ok("attach_disk", {"uuid": uuid, "disk": disk})["device"]["state"] == "connected"
    rig.refused("device.exists", "attach_disk", {"uuid": uuid, "disk": {**disk, "readonly": False}})
    gone = rig.ok("detach_disk", {"uuid": uuid, "id": "xvdb"})
    assert gone == {"uuid": uuid, "id": "xvdb", "state": "detached", "forced": False}
    assert rig.toolstack.get_spec(uuid).disks == ()
    assert "it has none" in rig.refused("device.not_found", "detach_disk", {"uuid": uuid, "id": "xvdb"})["message"]


def test_a_nic_gets_a_number_and_a_mac(rig: Rig) -> None:
    uuid = rig.create()
    first = rig.ok("attach_nic", {"uuid": uuid, "nic": {}})["device"]["spec"]
    second = rig.ok("attach_nic", {"uuid": uuid, "nic": {"addresses": ["192.0.2.7"]}})["device"]["spec"]
    assert (first["id"], second["id"]) == (0, 1) and first["mac"] != second["mac"]
    assert first["mac"].startswith("00:16:3e:") and second["addresses"] == ["192.0.2.7"]
    rig.ok("detach_nic", {"uuid": uuid, "id": 0})
    assert rig.ok("attach_nic", {"uuid": uuid, "nic": {}})["device"]["id"] == "0"


BAD_DISKS = [
    ("instruction.bad_args", {"id": "sda"}),
    ("instruction.bad_args", {"id": "xvdz"}),
    ("instruction.bad_args", {"path": "relative"}),
    ("instruction.bad_args", {"format": "vmdk"}),
    ("instruction.bad_args", {"limits": {"iops": -1}}),
    ("instruction.bad_args", {"readonly": "yes"}),
    ("instruction.bad_args", {"owner": "me"}),
    ("image.invalid", {"path": "/nowhere/disk.img"}),
    ("image.invalid", {"format": "qcow2"}),
    ("image.in_use", {"path": "TAKEN"}),
    ("device.exists", {"id": "xvda"}),
]


@pytest.mark.parametrize(("code", "change"), BAD_DISKS)
def test_bad_disks_leave_nothing(rig: Rig, code: str, change: dict[str, Any]) -> None:
    taken = rig.image("taken.img")
    rig.create("other", disks=[{"id": "xvda", "path": taken}])
    uuid = rig.create(disks=[{"id": "xvda", "path": rig.image("root.img")}])
    before = rig.toolstack.get_spec(uuid)
    disk = {"id": "xvdb", "path": rig.image()} | change
    if disk["path"] == "TAKEN":
        disk["path"] = taken
    assert rig.refused(code, "attach_disk", {"uuid": uuid, "disk": disk})["undone"] is True
    assert rig.toolstack.get_spec(uuid) == before


BAD_NICS = [
    ("instruction.bad_args", {"mac": "zz:16:3e:00:00:01"}),
    ("instruction.bad_args", {"mac": MAC.upper().replace("E", "F")}),
    ("instruction.bad_args", {"id": 8}),
    ("instruction.bad_args", {"queues": 0}),
    ("domain.spec_invalid", {"mac": "01:00:5e:00:00:01"}),
    ("domain.spec_invalid", {"addresses": ["not an address"]}),
    ("device.exists", {"mac": MAC}),
    ("network.unknown", {"network": "moon"}),
]


@pytest.mark.parametrize(("code", "change"), BAD_NICS)
def test_bad_nics_leave_nothing(rig: Rig, code: str, change: dict[str, Any]) -> None:
    rig.create("other", nics=[{"mac": MAC}])
    uuid = rig.create()
    assert rig.refused(code, "attach_nic", {"uuid": uuid, "nic": change})["undone"] is True
    assert rig.toolstack.get_spec(uuid).nics == ()
    # The same at creation.
    args = {"name": "third", "memory_mib": 64, "kernel": str(rig.kernel), "nics": [change]}
    assert rig.refused(code, "create", args)["undone"] is True
    assert len(rig.toolstack.list_domains()) == 2


def test_a_guest_that_keeps_its_disk(rig: Rig) -> None:
    uuid = rig.create(cmdline="fake.devices=keep", disks=[{"id": "xvda", "path": rig.image()}])
    args = {"uuid": uuid, "id": "xvda", "wait_seconds": 0.05}
    error = rig.refused("domain.timeout", "detach_disk", args)
    assert (error["retryable"], error["undone"]) == (True, True) and device(rig, uuid) is not None
    assert rig.ok("detach_disk", args | {"force": True})["forced"] is True
    assert device(rig, uuid) is None


def test_a_guest_that_takes_no_device_up_is_no_failure(rig: Rig) -> None:
    uuid = rig.create(cmdline="fake.devices=ignore")
    disk = {"id": "xvda", "path": rig.image()}
    result = rig.ok("attach_disk", {"uuid": uuid, "disk": disk, "wait_seconds": 0.05})
    assert result["device"]["state"] == "connecting"
    rig.toolstack.pause(uuid)
    nic = rig.ok("attach_nic", {"uuid": uuid, "nic": {}, "wait_seconds": 3600})  # nobody runs: nobody is waited for
    assert nic["device"]["state"] == "connecting"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [HostUnavailable("away"), HostFailure("broken")])
def test_a_driver_that_fails_leaves_what_was(rig: Rig, error: Any, when: str) -> None:
    """Also when it fails after the work was done."""
    uuid = rig.create()
    disk = {"id": "xvda", "path": rig.image()}
    rig.toolstack.inject_error("attach_disk", error, when=when)
    assert rig.refused(error.code, "attach_disk", {"uuid": uuid, "disk": disk})["undone"] is True
    assert device(rig, uuid) is None
    rig.ok("attach_disk", {"uuid": uuid, "disk": disk})
    rig.toolstack.inject_error("detach_device", error, when=when)
    assert rig.refused(error.code, "detach_disk", {"uuid": uuid, "id": "xvda"})["undone"] is True
    assert device(rig, uuid) is not None


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("verb", ["attach_disk", "detach_disk"])
def test_interrupted_steps_resume(rig: Rig, verb: str, done: bool) -> None:
    disk = {"id": "xvda", "path": rig.image()}
    uuid = rig.create(disks=[disk] if verb == "detach_disk" else [])
    args = {"uuid": uuid, "disk": disk} if verb == "attach_disk" else {"uuid": uuid, "id": "xvda"}
    plan = rig.verbs[verb].plugin.plan(args, rig.host)
    ident = rig.accept(verb, args)
    rig.journal.planned(ident, plan.to_json(), uuid)
    rig.journal.step(ident, 0, plan.steps[0].name, StepState.BEGUN)
    if done:
        plan.steps[0].run(rig.executor._work(rig.journal.entry(ident), rig.verbs[verb], plan).ctx)  # type: ignore[arg-type]
    rig.executor.run(ident)
    assert rig.reply(ident).ok
    assert (device(rig, uuid) is not None) == (verb == "attach_disk")


def test_lists(rig: Rig) -> None:
    one = rig.create("one", disks=[{"id": "xvda", "path": rig.image()}], nics=[{}])
    rig.create("two", nics=[{}, {}])
    disks, nics = rig.ok("block_list")["devices"], rig.ok("network_list")["devices"]
    assert [(item["name"], item["id"], item["own"]) for item in disks] == [("one", "xvda", True)]
    assert [(item["name"], item["id"]) for item in nics] == [("one", "0"), ("two", "0"), ("two", "1")]
    assert len(rig.ok("network_list", {"uuid": one})["devices"]) == 1
    rig.refused("domain.not_found", "block_list", {"uuid": NOBODY})


def test_create_with_devices_and_a_loader(rig: Rig) -> None:
    disk = {"id": "xvda", "path": rig.image()}
    base = {"name": "web", "memory_mib": 64}
    rig.refused("image.not_found", "create", base | {"loader": "pv-grub", "disks": [disk]})
    Path(rig.host.settings["grub_x86_64"]).write_bytes(b"\x7fELF" + bytes(100))
    rig.refused("instruction.bad_args", "create", base | {"loader": "pv-grub"})
    for other in ({"kernel": str(rig.kernel)}, {"image": "debian"}, {"ramdisk": "/r"}):
        rig.refused("instruction.bad_args", "create", base | {"loader": "pv-grub", "disks": [disk]} | other)
    result = rig.ok(
        "create", base | {"loader": "pv-grub", "disks": [disk], "nics": [{"mac": MAC}], "weight": 512, "cap": 50}
    )
    spec = rig.toolstack.get_spec(result["domain"]["uuid"])
    assert spec.boot.kernel == rig.host.settings["grub_x86_64"] and spec.boot.ramdisk is None
    assert (spec.disks[0].id, spec.nics[0].mac, spec.weight, spec.cap) == ("xvda", MAC, 512, 50)


def test_devices_that_clash_at_creation(rig: Rig) -> None:
    disk = {"id": "xvda", "path": rig.image()}
    base = {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)}
    for clash in ({"disks": [disk, disk]}, {"disks": [disk, {**disk, "id": "xvdb"}]}, {"nics": [{"mac": MAC}] * 2}):
        rig.refused("domain.spec_invalid", "create", base | clash)
    rig.refused("image.invalid", "create", base | {"disks": [{"id": "xvda", "path": "/nowhere"}]})
    assert rig.toolstack.list_domains() == []


def test_a_driver_without_devices_says_so(tmp_path: Path) -> None:
    class Bare(FakeToolstack):
        def attach_disk(self, uuid: str, disk: Any) -> Any:
            self._lacks(next(iter(self.capabilities())))

    rig = make_rig(tmp_path, Bare(None))
    uuid = rig.create()
    error = rig.refused("driver.unsupported", "attach_disk", {"uuid": uuid, "disk": {"id": "xvda", "path": "/x"}})
    assert error["undone"] is True
