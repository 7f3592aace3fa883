"""Bad disks, nics and sizes by the whole way, with the real machine: one line with cause and cure, and nothing left.

What a full disk under an image does to a guest is in test_block.py.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import NEIGHBOUR, WAIT, Node, guest, guests, refused, running_node, spotless

__all__ = ["spotless"]

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

MIB = 1 << 20
MAC = "00:16:3e:00:00:01"
TAKEN = "taken.img"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Its neighbour has a disk, a nic, and room to grow."""
    folder = tmp_path_factory.mktemp("bad-devices")
    images = folder / "images"
    images.mkdir()
    (images / TAKEN).write_bytes(bytes(MIB))
    neighbour = {
        "max_memory_mib": 32,
        "max_vcpus": 2,
        "disks": [{"id": "xvda", "path": str(images / TAKEN)}],
        "nics": [{"mac": MAC, "network": "lan"}],
    }
    with running_node(folder, neighbour, image_folders=images, networks="lan internal") as made:
        make_images(images, folder)
        yield made


def make_images(images: Path, outside: Path) -> None:
    (images / "good.img").write_bytes(bytes(MIB))
    (images / "odd.img").write_bytes(bytes(100))
    (images / "folder").mkdir()
    os.mkfifo(images / "pipe")
    (outside / "secret.img").write_bytes(b"secret" * 100_000)
    (images / "link.img").symlink_to(outside / "secret.img")
    os.link(images / TAKEN, images / "alias.img")


def qcow2(node: Node, name: str, *options: str) -> str:
    path = node.folder / "images" / name
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed: apt-get install qemu-utils")
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "64M"], check=True)
    return str(path)


def backing_outside(node: Node) -> str:
    return qcow2(node, "outside.qcow2", "-F", "raw", "-b", str(node.folder / "secret.img"))


def backing_by_link(node: Node) -> str:
    return qcow2(node, "by-link.qcow2", "-F", "raw", "-b", str(node.folder / "images" / "link.img"))


def backing_unstated(node: Node) -> str:
    path = qcow2(node, "unstated.qcow2")
    # Today's qemu-img insists on the format; images of before have none.
    subprocess.run(["qemu-img", "rebase", "-q", "-f", "qcow2", "-u", "-b", "good.img", "-F", "raw", path], check=True)
    data = Path(path).read_bytes()
    mark = data.index(b"\xe2\x79\x2a\xca\0\0\0\3raw")
    Path(path).write_bytes(data[:mark] + b"\x12\x34\x56\x78" + data[mark + 4 :])
    return path


def image(name: str) -> Callable[[Node], str]:
    return lambda node: str(node.folder / "images" / name)


# What is wrong with a disk: fields of its spec, where a function makes a value; code, cause, cure.
DISKS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "missing image": ({"path": image("nowhere.img")}, "image.invalid", "nowhere.img cannot be opened", "make it first"),
    "outside": ({"path": lambda n: str(n.folder / "secret.img")}, "image.invalid", "outside", "move it, or set"),
    "link to outside": ({"path": image("link.img")}, "image.invalid", "it is .*secret.img", "move it, or set"),
    "way to outside": ({"path": image("../secret.img")}, "image.invalid", "outside", "move it, or set"),
    "folder": ({"path": image("folder")}, "image.invalid", "", ""),
    "pipe": ({"path": image("pipe")}, "image.invalid", "neither a file nor a block device", "give"),
    "less than a sector": ({"path": image("odd.img")}, "image.invalid", "100 bytes", "at least one sector"),
    "raw for qcow2": ({"path": image("good.img"), "format": "qcow2"}, "image.invalid", "no qcow2 image", "give|raw"),
    "backing outside": ({"path": backing_outside, "format": "qcow2"}, "image.invalid", "secret.img .*outside", "move"),
    "backing by link": ({"path": backing_by_link, "format": "qcow2"}, "image.invalid", "outside", "move it, or set"),
    "backing unstated": ({"path": backing_unstated, "format": "qcow2"}, "image.invalid", "not stated", "rebase"),
    "in use": ({"path": image(TAKEN)}, "image.in_use", f"domain {NEIGHBOUR}", "shared"),
    "in use, other name": ({"path": image("alias.img")}, "image.in_use", f"domain {NEIGHBOUR}", "shared"),
    "in use, reading": (
        {"path": image("alias.img"), "readonly": True},
        "image.in_use",
        f"domain {NEIGHBOUR}",
        "shared",
    ),
    "no such id": ({"id": "sda"}, "instruction.bad_args", "'sda'", "match"),
    "no format": ({"format": "vmdk"}, "instruction.bad_args", "'vmdk'", "raw"),
    "unknown field": ({"colour": "red"}, "instruction.bad_args", "'colour'", "unexpected"),
}


@pytest.mark.parametrize("case", DISKS)
def test_a_disk_that_cannot_be(spotless: Node, case: str) -> None:
    """At creation, and for a domain that runs."""
    changes, code, cause, cure = DISKS[case]
    disk = {"id": "xvdb", "path": image("good.img"), **changes}
    disk = {key: value(spotless) if callable(value) else value for key, value in disk.items()}
    before = spotless.toolstack.get_spec(NEIGHBOUR)
    refused(spotless.create("web", guest("hello"), disks=[disk]), code, cause, cure)
    if case == "in use":
        code, cause, cure = "domain.spec_invalid", "is given twice", "once in a domain"
    answer = spotless.client.call("attach_disk", {"uuid": NEIGHBOUR, "disk": disk}, timeout=WAIT)
    refused(answer, code, cause, cure)
    assert spotless.toolstack.get_spec(NEIGHBOUR) == before


def test_a_qcow2_header_in_a_raw_disk_is_data(spotless: Node) -> None:
    """A guest could have written it: it makes the disk neither larger nor one with a backing file."""
    path = Path(backing_outside(spotless))
    size = path.stat().st_size
    reply = spotless.create("web", guest("hello"), disks=[{"id": "xvda", "path": str(path)}], start=False)
    assert reply.ok and reply.result is not None, reply.error
    ident = reply.result["domain"]["uuid"]
    listed = spotless.client.call("block_list", {"uuid": ident}, timeout=WAIT).result
    assert listed is not None
    (device,) = listed["devices"]
    assert (device["size_bytes"], device["spec"]["format"]) == (size // 512 * 512, "raw")
    opened = [os.readlink(fd) for fd in Path(f"/proc/{spotless.rig.pid}/fd").iterdir() if os.path.islink(fd)]
    assert str(path) in opened and not [name for name in opened if "secret" in name]
    spotless.destroy(ident)


NICS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no MAC": ({"mac": "00:16:3e"}, "instruction.bad_args", "'00:16:3e'", "match"),
    "capitals": ({"mac": MAC.upper()}, "instruction.bad_args", MAC.upper(), "match"),
    "multicast MAC": ({"mac": "01:00:5e:00:00:01"}, "domain.spec_invalid", "01:00:5e", "first byte even"),
    "no address at all": ({"mac": "00:00:00:00:00:00"}, "domain.spec_invalid", "00:00:00", "make its"),
    "duplicate MAC": ({"mac": MAC}, "device.exists", f"{MAC}.*{NEIGHBOUR}|{MAC}.*neighbour", "give another"),
    "no such network": ({"network": "moon"}, "network.unknown", "moon", "has lan"),
    "no IP address": ({"addresses": ["10.0.0.300"]}, "domain.spec_invalid", "10.0.0.300", "IPv4 or IPv6"),
    "too many queues": ({"queues": 9}, "instruction.bad_args", "9", "maximum of 8"),
}


@pytest.mark.parametrize("case", NICS)
def test_a_nic_that_cannot_be(spotless: Node, case: str) -> None:
    changes, code, cause, cure = NICS[case]
    nic = {"id": 1, "mac": "00:16:3e:00:00:02", "network": "lan", **changes}
    before = spotless.toolstack.get_spec(NEIGHBOUR)
    refused(spotless.create("web", guest("hello"), nics=[nic]), code, cause, cure)
    if case == "duplicate MAC":
        code, cause, cure = "domain.spec_invalid", f"{MAC} is given twice", "once in a domain"
    refused(spotless.client.call("attach_nic", {"uuid": NEIGHBOUR, "nic": nic}, timeout=WAIT), code, cause, cure)
    assert spotless.toolstack.get_spec(NEIGHBOUR) == before


def test_names_that_clash(spotless: Node) -> None:
    good, other = image("good.img")(spotless), image("folder")(spotless)
    twice = [{"id": "xvdb", "path": good}, {"id": "xvdb", "path": other}]
    refused(spotless.create("web", guest("hello"), disks=twice), "domain.spec_invalid", "xvdb is given twice", "once")
    same = [{"id": "xvdb", "path": good}, {"id": "xvdc", "path": good}]
    refused(
        spotless.create("web", guest("hello"), disks=same), "domain.spec_invalid", "good.img is given twice", "once"
    )
    nics = [{"mac": "00:16:3e:00:00:02", "network": "lan", "id": number} for number in (0, 1)]
    refused(spotless.create("web", guest("hello"), nics=nics), "domain.spec_invalid", "00:02 is given twice", "once")
    numbers = copy.deepcopy(nics)
    numbers[1].update(id=0, mac="00:16:3e:00:00:03")
    refused(spotless.create("web", guest("hello"), nics=numbers), "domain.spec_invalid", "id 0 is given twice", "once")
    for verb, args in (
        ("attach_disk", {"disk": {"id": "xvda", "path": good}}),
        ("attach_nic", {"nic": {"id": 0, "mac": "00:16:3e:00:00:02", "network": "lan"}}),
    ):
        answer = spotless.client.call(verb, {"uuid": NEIGHBOUR, **args}, timeout=WAIT)
        refused(answer, "device.exists", "is attached|has a", "detach it|give another|another id")


SIZES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no vCPU": ({"vcpus": 0}, "instruction.bad_args", "args.vcpus: 0", "minimum of 1"),
    "no memory": ({"memory_mib": 0}, "instruction.bad_args", "args.memory_mib: 0", "minimum of 1"),
    "no disk": ({"disks": {"xvda": 0}}, "instruction.bad_args", "args.disks.xvda: 0", "minimum of 512"),
    "less than used": ({"memory_mib": 1}, "domain.memory_too_small", "is 1: .* needs", "give more"),
    "smaller disk": ({"disks": {"xvda": 512}}, "domain.spec_invalid", "not 512", "cannot be made smaller"),
    "half a sector": ({"disks": {"xvda": MIB + 1}}, "domain.spec_invalid", "1048577", "512"),
    "more vCPUs than it may": ({"vcpus": 3}, "domain.spec_invalid", "can have 2 at most", "give mode cold"),
    "more memory than it may": ({"memory_mib": 64}, "domain.spec_invalid", "32", "cold|at most"),
    "beyond the host's memory": (
        {"memory_mib": 512, "mode": "cold"},
        "host.insufficient_memory",
        "MiB",
        "smaller|free",
    ),
    "beyond the host's CPUs": (
        {"vcpus": 3, "max_vcpus": 3, "mode": "cold"},
        "host.insufficient_vcpus",
        "2",
        "less|give",
    ),
    "beyond the file system": ({"disks": {"xvda": 1 << 60}}, "instruction.bad_args", str(1 << 60), "maximum"),
    "no such disk": ({"disks": {"xvdc": 2 * MIB}}, "device.not_found", "no disk xvdc", "xvda"),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_size_that_cannot_be(spotless: Node, case: str) -> None:
    changes, code, cause, cure = SIZES[case]
    before = spotless.toolstack.get_spec(NEIGHBOUR), spotless.toolstack.get_domain(NEIGHBOUR).memory_target_mib
    answer = spotless.client.call("resize", {"uuid": NEIGHBOUR, "wait_seconds": 2, **changes}, timeout=WAIT)
    refused(answer, code, cause, cure)
    after = spotless.toolstack.get_spec(NEIGHBOUR), spotless.toolstack.get_domain(NEIGHBOUR).memory_target_mib
    assert after == before
    assert (spotless.folder / "images" / TAKEN).stat().st_size == MIB
