"""Devices on the pretend Xen host: guests that let go and guests that do not, and what dies or is done by others."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fake_xen import Complaint
from xl_rig import Rig

from hypervisor.errors import (
    DeviceExists,
    DomainNotFound,
    HostFailure,
    ImageInUse,
    NetworkUnknown,
    OperationTimeout,
    SpecInvalid,
    ToolstackError,
    Unsupported,
)
from hypervisor.toolstack.devices import DeviceState, DiskSpec, Limits, NicSpec
from hypervisor.toolstack.drivers.xl.devices import MISSING

MAC = "00:16:3e:00:00:01"
PATIENT = 30.0


class Died(BaseException):
    """The process ended here."""


def disk(rig: Rig, ident: str = "xvda", **fields: object) -> DiskSpec:
    path = rig.folder / f"{ident}.img"
    path.write_bytes(bytes(4096))
    return DiskSpec(ident, str(path), **fields)  # type: ignore[arg-type]


def running(rig: Rig, words: str = "", **fields: object) -> str:
    uuid = rig.toolstack.create(rig.spec(words, **fields)).uuid
    rig.toolstack.unpause(uuid)
    return uuid


def states(rig: Rig, uuid: str) -> list[tuple[str, str, DeviceState]]:
    return [(device.kind, device.id, device.state) for device in rig.toolstack.list_devices(uuid)]


def verbs(rig: Rig) -> list[str]:
    return [call[0] for call in rig.machine.calls]


def test_a_guest_connects_and_lets_go(rig: Rig) -> None:
    uuid = running(rig, disks=(disk(rig),))
    rig.toolstack.attach_nic(uuid, NicSpec(2, MAC, network="other", addresses=("192.0.2.5", "192.0.2.6")))
    assert states(rig, uuid) == [("disk", "xvda", DeviceState.CONNECTED), ("nic", "2", DeviceState.CONNECTED)]
    call = next(call for call in rig.machine.calls if call[0] == "network-attach")
    assert call[2:] == [f"mac={MAC}", "bridge=xenbr1", "devid=2", "ip=192.0.2.5 192.0.2.6"]
    rig.toolstack.detach_device(uuid, "nic", "2", PATIENT)
    rig.toolstack.detach_device(uuid, "disk", "xvda", PATIENT)
    assert states(rig, uuid) == [] and rig.toolstack.get_spec(uuid).disks == ()
    assert ["block-detach", str(rig.machine.find(uuid).domid), "xvda"] in rig.machine.calls, "without force"


def test_a_nic_is_not_taken_from_a_guest_that_keeps_it(rig: Rig) -> None:
    """``xl network-detach`` itself would."""
    uuid = running(rig, "deaf", nics=(NicSpec(0, MAC),))
    with pytest.raises(OperationTimeout):
        rig.toolstack.detach_device(uuid, "nic", "0", 0.2)
    assert states(rig, uuid) == [("nic", "0", DeviceState.CONNECTING)]
    assert "network-detach" not in verbs(rig)
    rig.toolstack.detach_device(uuid, "nic", "0", 0, force=True)
    assert states(rig, uuid) == []


def test_others_act_on_a_domain_while_its_guest_is_asked(rig: Rig) -> None:
    uuid = running(rig, "deaf", disks=(disk(rig),))
    failed: list[ToolstackError] = []

    def detach() -> None:
        try:
            rig.toolstack.detach_device(uuid, "disk", "xvda", PATIENT)
        except ToolstackError as exc:
            failed.append(exc)

    thread = threading.Thread(target=detach)
    thread.start()
    domid = rig.machine.find(uuid).domid
    with rig.machine.devices._store() as store:
        back = f"/local/domain/0/backend/vbd/{domid}/51712"
        rig.until(lambda: store.read(f"{back}/state") == "5", "the guest to be asked")
        assert store.read(f"{back}/online") == "0"
    rig.toolstack.destroy(uuid)
    thread.join(PATIENT)
    assert not thread.is_alive() and [exc.code for exc in failed] == ["domain.not_found"]


def test_an_attach_that_fails_leaves_nothing(rig: Rig) -> None:
    uuid = running(rig, "deaf")

    def half(args: list[str]) -> str:
        with rig.machine.changed:
            rig.machine.do_block_attach(*args)
        raise Complaint("libxl: error: libxl_exec.c:117: block add [123] exited with error status 1")

    rig.machine.faults["block-attach"] = half
    with pytest.raises(HostFailure, match="exited with error status"):
        rig.toolstack.attach_disk(uuid, disk(rig))
    assert states(rig, uuid) == [] and rig.toolstack.get_spec(uuid).disks == ()
    assert "block-detach" in verbs(rig)
    del rig.machine.faults["block-attach"]
    rig.toolstack.attach_disk(uuid, disk(rig))


def test_a_success_with_a_complaint_is_none(rig: Rig) -> None:
    """``xl`` returns 0 for some of what it could not do."""

    def complain(_: list[str]) -> str:
        raise Complaint("libxl: error: libxl_device.c:1: unable to add device", 0)

    uuid = running(rig, "deaf")
    rig.machine.faults["network-attach"] = complain
    with pytest.raises(HostFailure):
        rig.toolstack.attach_nic(uuid, NicSpec(0, MAC))
    assert rig.toolstack.get_spec(uuid).nics == ()


@pytest.mark.parametrize("mend", ["attach", "detach", "another driver"])
def test_who_dies_before_the_host_has_it(rig: Rig, monkeypatch: pytest.MonkeyPatch, mend: str) -> None:
    uuid, wanted = running(rig), disk(rig)
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr("hypervisor.toolstack.drivers.xl.devices.Devices._run", lambda *_: (_ for _ in ()).throw(Died))
        rig.toolstack.attach_disk(uuid, wanted)
    (device,) = rig.toolstack.list_devices(uuid)
    assert (device.state, device.detail) == (DeviceState.FAILED, MISSING)
    if mend == "detach":
        rig.toolstack.detach_device(uuid, "disk", "xvda", 0)
        assert states(rig, uuid) == []
        return
    toolstack = rig.connect() if mend == "another driver" else rig.toolstack
    assert toolstack.attach_disk(uuid, wanted).state is DeviceState.CONNECTED
    if toolstack is not rig.toolstack:
        toolstack.close()


def test_who_dies_before_it_is_written_that_it_is_gone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = running(rig, nics=(NicSpec(0, MAC),))
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(rig.toolstack._host.records, "put", lambda _: (_ for _ in ()).throw(Died))
        rig.toolstack.detach_device(uuid, "nic", "0", PATIENT)
    assert states(rig, uuid) == [("nic", "0", DeviceState.FAILED)]
    rig.toolstack.detach_device(uuid, "nic", "0", PATIENT)
    assert states(rig, uuid) == []


def test_what_another_toolstack_attached_is_left_alone(rig: Rig) -> None:
    uuid, theirs = running(rig), disk(rig)
    with rig.machine.changed:
        rig.machine.do_block_attach(
            str(rig.machine.find(uuid).domid), f"format=raw, vdev=xvda, access=rw, target={theirs.path}"
        )
    assert rig.toolstack.list_devices(uuid) == []
    with pytest.raises(DeviceExists, match="by another"):
        rig.toolstack.attach_disk(uuid, theirs)
    assert rig.toolstack.get_spec(uuid).disks == ()
    rig.toolstack.detach_device(uuid, "disk", "xvda", 0, force=True)
    assert "block-detach" not in verbs(rig)


def test_what_a_guest_writes_is_told_and_believed_of_nothing_else(rig: Rig) -> None:
    uuid = running(rig, "deaf", disks=(disk(rig),))
    domid = rig.machine.find(uuid).domid
    with rig.machine.devices._store() as store:
        store.write(f"/local/domain/{domid}/device/vbd/51712/state", "-77")
    (device,) = rig.toolstack.list_devices(uuid)
    assert device.state is DeviceState.FAILED and "-77" in device.detail


def test_an_image_that_is_gone_hides_nothing(rig: Rig) -> None:
    image = disk(rig)
    uuid = running(rig, disks=(image,))
    assert rig.toolstack.list_devices(uuid)[0].size_bytes == 4096
    Path(image.path).unlink()
    (device,) = rig.toolstack.list_devices(uuid)
    assert (device.state, device.size_bytes) == (DeviceState.CONNECTED, 0) and image.path in device.detail


def test_a_list_that_is_not_understood_is_an_error_with_its_text(rig: Rig) -> None:
    uuid = running(rig, disks=(disk(rig),))
    rig.machine.faults["block-list"] = lambda _: "Vdev  BE  handle state evt-ch ring-ref BE-path\nwhat is this\n"
    for call in (
        lambda: rig.toolstack.list_devices(uuid),
        lambda: rig.toolstack.attach_disk(uuid, disk(rig, "xvdb")),
        lambda: rig.toolstack.detach_device(uuid, "disk", "xvda", 0, force=True),
    ):
        with pytest.raises(HostFailure, match="what is this"):
            call()
    assert [item.id for item in rig.toolstack.get_spec(uuid).disks] == ["xvda"]
    assert "block-attach" not in verbs(rig) and "block-detach" not in verbs(rig)


def test_a_detach_that_does_nothing_is_an_error(rig: Rig) -> None:
    uuid = running(rig, nics=(NicSpec(0, MAC),))
    rig.machine.faults["network-detach"] = lambda _: ""
    with pytest.raises(HostFailure, match="left nic 0"):
        rig.toolstack.detach_device(uuid, "nic", "0", PATIENT)
    assert rig.toolstack.get_spec(uuid).nics == (NicSpec(0, MAC),)


def test_one_of_two_gets_an_image(rig: Rig) -> None:
    wanted, ended = disk(rig), []
    uuids = [running(rig), running(rig)]

    def attach(uuid: str) -> None:
        try:
            ended.append(rig.toolstack.attach_disk(uuid, wanted).id)
        except ImageInUse as exc:
            ended.append(exc.code)

    threads = [threading.Thread(target=attach, args=(uuid,)) for uuid in uuids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == ["image.in_use", "xvda"]


def test_what_xl_has_nothing_of_is_refused_before_anything_is_done(rig: Rig) -> None:
    uuid = running(rig)
    for error, call in (
        (Unsupported, lambda: rig.toolstack.attach_disk(uuid, disk(rig, limits=Limits(iops=1)))),
        (Unsupported, lambda: rig.toolstack.attach_nic(uuid, NicSpec(0, MAC, queues=2))),
        (NetworkUnknown, lambda: rig.toolstack.attach_nic(uuid, NicSpec(0, MAC, network="moon"))),
        (SpecInvalid, lambda: rig.toolstack.detach_device(uuid, "tape", "0", 0)),
        (Unsupported, lambda: rig.toolstack.resize_disk(uuid, "xvda", 8192)),
    ):
        with pytest.raises(error):
            call()
    assert not {"block-attach", "network-attach"} & set(verbs(rig))


def test_the_first_verb_of_a_driver_may_be_one_that_claims(rig: Rig) -> None:
    uuid = running(rig)
    for act in (
        lambda toolstack: toolstack.attach_nic(uuid, NicSpec(0, MAC)),
        lambda toolstack: toolstack.set_memory(uuid, 16),
    ):
        toolstack = rig.connect()
        act(toolstack)
        toolstack.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_domain_that_ends_while_its_devices_are_looked_at(rig: Rig, again: bool) -> None:
    """Real ``xl`` prints a table without rows then, and ends well: no device is missing, the domain is."""
    uuid = running(rig, disks=(disk(rig),))
    domain = rig.machine.find(uuid)

    def ends(words: list[str]) -> str:
        del rig.machine.faults["block-list"]
        with rig.machine.changed:
            rig.machine.do_destroy(str(domain.domid))
            if again:
                rig.machine.add(domain.config)
        return rig.machine.do_block_list(*words)

    rig.machine.faults["block-list"] = ends
    with pytest.raises(DomainNotFound):
        rig.toolstack.list_devices(uuid)
