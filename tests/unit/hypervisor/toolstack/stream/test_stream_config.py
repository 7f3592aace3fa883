"""A domain's configuration in libxl's JSON: ours there and back, another toolstack's translated."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.errors import SpecInvalid, StreamInvalid, StreamUnsupported
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, Limits, NicSpec
from hypervisor.toolstack.spec import DomainSpec, KernelBoot, OnEvent
from hypervisor.toolstack.stream import config
from hypervisor.toolstack.stream.config import SavedConfig

UUID = "11111111-1111-4111-8111-111111111111"
SPEC = DomainSpec(
    uuid=UUID,
    name="web",
    boot=KernelBoot("/k", "/r", "quiet"),
    memory_mib=128,
    max_memory_mib=256,
    vcpus=2,
    max_vcpus=4,
    on_crash=OnEvent.RESTART,
    owner="me",
    metadata=(("colour", "blue"),),
    disks=(
        DiskSpec("xvda", "/d.qcow2", DiskFormat.QCOW2, readonly=True, limits=Limits(iops=5)),
        DiskSpec("xvdb", "/e"),
    ),
    nics=(NicSpec(3, "00:16:3e:00:00:01", network="lan", addresses=("10.0.0.1",), queues=2),),
    weight=512,
    cap=50,
)
SAVED = SavedConfig(SPEC, vcpus=3, max_vcpus=4, memory_mib=100, max_memory_mib=256, pages=25600)

# What Xen 4.17's xl wrote for a PV guest, shortened.
FOREIGN: dict[str, Any] = {
    "c_info": {"type": "pv", "name": "pv1", "uuid": UUID, "run_hotplug_scripts": "True"},
    "b_info": {
        "max_vcpus": 4,
        "avail_vcpus": [0, 1],
        "max_memkb": 524288,
        "target_memkb": 262144,
        "shadow_memkb": 6144,
        "sched_params": {"weight": 300, "cap": 20},
        "kernel": "/guests/vmlinuz",
        "ramdisk": "/guests/domu.gz",
        "cmdline": "console=hvc0",
        "type.pv": {},
    },
    "disks": [{"pdev_path": "/x.img", "vdev": "xvda", "format": "raw", "readwrite": 1}],
    "nics": [{"devid": 0, "mac": "00:16:3E:11:22:33", "bridge": "xenbr0"}],
    "on_poweroff": "destroy",
    "on_reboot": "restart",
    "on_crash": "coredump_destroy",
}


def test_ours_there_and_back() -> None:
    data = json.loads(json.dumps(config.write(SAVED)))
    assert config.read(data) == SAVED
    assert (data["b_info"]["target_memkb"], data["b_info"]["avail_vcpus"]) == (102400, [0, 1, 2])
    assert data["disks"][0] == {
        "pdev_path": "/d.qcow2", "vdev": "xvda", "format": "qcow2", "readwrite": 0, "discard_enable": "True",
    }  # fmt: skip
    assert data["nics"] == [{"devid": 3, "mac": "00:16:3e:00:00:01", "bridge": "lan", "nictype": "vif"}]


def test_what_xens_tools_see_of_ours_is_enough() -> None:
    """Without our own key the domain is the same, but for what libxl has no word for."""
    data = config.write(SAVED)
    del data[config.KEY]
    seen = config.read(data).spec
    assert (seen.uuid, seen.name, seen.boot, seen.on_crash) == (UUID, "web", SPEC.boot, OnEvent.RESTART)
    assert (seen.memory_mib, seen.max_memory_mib, seen.vcpus, seen.max_vcpus) == (100, 256, 3, 4)
    assert [disk.path for disk in seen.disks] == ["/d.qcow2", "/e"] and seen.disks[0].readonly
    assert (seen.weight, seen.cap, seen.owner) == (512, 50, "")


def test_another_toolstacks() -> None:
    saved = config.read(FOREIGN)
    spec = saved.spec
    assert (spec.name, spec.memory_mib, spec.max_memory_mib, spec.vcpus, spec.max_vcpus) == ("pv1", 256, 512, 2, 4)
    assert spec.boot == KernelBoot("/guests/vmlinuz", "/guests/domu.gz", "console=hvc0")
    assert spec.disks == (DiskSpec("xvda", "/x.img"),)
    assert spec.nics == (NicSpec(0, "00:16:3e:11:22:33", network="xenbr0"),)
    assert (spec.weight, spec.cap, spec.on_crash, saved.pages) == (300, 20, OnEvent.DESTROY, 0)
    least = {"c_info": {"type": "pv", "name": "x", "uuid": UUID}, "b_info": {"max_memkb": 65536}}
    assert config.read(least).spec.boot.kernel == config.NO_KERNEL


def test_names() -> None:
    named = SAVED.named(owner="you", name="db", uuid=UUID.replace("1", "2"))
    assert (named.spec.owner, named.spec.name, named.spec.uuid[0]) == ("you", "db", "2")
    assert SAVED.named(owner="").spec == DomainSpec(**{**_fields(SPEC), "owner": ""})
    with pytest.raises(SpecInvalid):
        SAVED.named(owner="", name="no name")


def _fields(spec: DomainSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in DomainSpec.__dataclass_fields__}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["c_info"].update(type="hvm"), StreamUnsupported),
        (lambda c: c["disks"][0].update(format="vhd"), StreamUnsupported),
        (lambda c: c["disks"][0].update(vdev="hda"), StreamInvalid),
        (lambda c: c["disks"][0].update(pdev_path=""), StreamInvalid),
        (lambda c: c.update(disks={}), StreamInvalid),
        (lambda c: c.update(disks=[3]), StreamInvalid),
        (lambda c: c["nics"][0].update(mac="x"), StreamInvalid),
        (lambda c: c.update(nics=[[]]), StreamInvalid),
        (lambda c: c["b_info"].update(max_memkb="1"), StreamInvalid),
        (lambda c: c["b_info"].update(max_memkb=0, target_memkb=0), StreamInvalid),
        (lambda c: c["b_info"].update(max_vcpus=99), StreamInvalid),
        (lambda c: c.update(b_info=3), StreamInvalid),
        (lambda c: c["c_info"].update(uuid="x"), StreamInvalid),
        (lambda c: c["c_info"].update(name=7), StreamInvalid),
    ],
)
def test_another_toolstacks_damaged(change: Any, error: type[StreamInvalid]) -> None:
    data = copy.deepcopy(FOREIGN)
    change(data)
    with pytest.raises(StreamInvalid) as caught:
        config.read(data)
    assert type(caught.value) is error and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "own",
    [
        3, {}, {"form": 2}, {"form": 1}, {"form": 1, "spec": {}, "run": {}}, {"form": 1, "spec": SPEC.to_json()},
        {"form": 1, "spec": SPEC.to_json(), "run": {"vcpus": 9, "max_vcpus": 4, "memory_mib": 1, "max_memory_mib": 1}},
        {"form": 1, "spec": SPEC.to_json(),
         "run": {"vcpus": 1, "max_vcpus": 4, "memory_mib": 1, "max_memory_mib": 1, "pages": 257}},
    ],
)  # fmt: skip
def test_ours_damaged(own: object) -> None:
    with pytest.raises(StreamInvalid):
        config.read({config.KEY: own})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_anything(data: st.DataObject) -> None:
    found = copy.deepcopy(data.draw(st.sampled_from([FOREIGN, json.loads(json.dumps(config.write(SAVED)))])))
    place: Any = found
    for _ in range(data.draw(st.integers(1, 3))):
        if isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(JSON)
        break
    try:
        config.read(found)
    except StreamInvalid as exc:
        assert exc.message and "\n" not in exc.message
