"""The configuration file xl gets."""

from __future__ import annotations

import ast
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor import errors
from hypervisor.toolstack.api import DomainSpec, DomainType, KernelBoot
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, Limits, NicSpec
from hypervisor.toolstack.drivers.xl import config

SPEC = DomainSpec(
    uuid="00000000-0000-4000-8000-000000000001",
    name="one",
    boot=KernelBoot("/guests/vmlinuz", "/guests/initrd", 'console=hvc0 a="b" c\\d'),
    memory_mib=256,
    max_memory_mib=512,
    vcpus=1,
    max_vcpus=2,
    owner="us",
)
NETWORKS = {"default": "xenbr0"}


def values(spec: DomainSpec) -> dict[str, object]:
    """The file is also Python, as it was when xm read it."""
    lines = (line.partition(" = ") for line in config.render(spec, NETWORKS).splitlines())
    return {key: ast.literal_eval(value) for key, _, value in lines}


def test_a_domain() -> None:
    assert values(SPEC) == {
        "name": "one",
        "uuid": SPEC.uuid,
        "type": "pv",
        "kernel": "/guests/vmlinuz",
        "ramdisk": "/guests/initrd",
        "cmdline": SPEC.boot.cmdline,
        "memory": 256,
        "maxmem": 512,
        "vcpus": 1,
        "maxvcpus": 2,
        "cpu_weight": 256,
        "cap": 0,
        **dict.fromkeys(("on_poweroff", "on_reboot", "on_crash", "on_watchdog"), "preserve"),
    }


@pytest.mark.parametrize("kind", DomainType)
def test_types(kind: DomainType) -> None:
    found = values(dataclasses.replace(SPEC, type=kind))
    assert found["type"] == kind.value
    assert found.get("serial") == ("pty" if kind is DomainType.HVM else None)


def test_disks_and_nics() -> None:
    disks = (
        DiskSpec("xvda", "/images/a, b.img", direct=True),
        DiskSpec("xvdb", "/images/c.qcow2", DiskFormat.QCOW2, readonly=True, discard=False),
    )
    nic = NicSpec(1, "00:16:3e:00:00:01", addresses=("10.0.0.5", "10.0.0.6"), limits=Limits(bytes_per_second=1000))
    found = values(dataclasses.replace(SPEC, disks=disks, nics=(nic,)))
    assert found["disk"] == [
        "format=raw, vdev=xvda, access=rw, discard, direct-io-safe, target=/images/a, b.img",
        "format=qcow2, vdev=xvdb, access=ro, backendtype=qdisk, no-discard, target=/images/c.qcow2",
    ]
    assert found["vif"] == ["mac=00:16:3e:00:00:01,bridge=xenbr0,devid=1,rate=1000B/s,ip=10.0.0.5 10.0.0.6"]


def test_what_xl_has_not_is_refused() -> None:
    with pytest.raises(errors.Unsupported):
        config.disk(DiskSpec("xvda", "/a", limits=Limits(iops=5)))
    with pytest.raises(errors.Unsupported):
        config.nic_words(NicSpec(0, "00:16:3e:00:00:01", queues=2), NETWORKS)
    with pytest.raises(errors.NetworkUnknown):
        config.nic_words(NicSpec(0, "00:16:3e:00:00:01", network="other"), NETWORKS)


@given(st.text(max_size=60))
def test_no_text_breaks_out_of_its_line(text: str) -> None:
    spec = dataclasses.replace(SPEC, boot=dataclasses.replace(SPEC.boot, cmdline="x" + text))
    try:
        found = values(spec)
    except errors.SpecInvalid:
        return
    assert found["cmdline"] == "x" + text
    assert len(found) == len(values(SPEC))
