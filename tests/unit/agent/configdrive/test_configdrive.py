"""Config drives: what cloud-init will read from them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))
from iso_reader import read_iso

from agent.configdrive import ConfigDriveFormat, FirstBoot, GuestNetwork, documents, write_iso
from agent.errors import InstructionError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJq me@there"
STATIC = GuestNetwork("00:16:3e:00:00:01", ("10.0.0.2/24", "fd00::2/64", "10.0.0.3/24"), ("10.0.0.1",), ("10.0.0.1",))
DHCP = GuestNetwork("00:16:3e:00:00:02")
FIRST = FirstBoot(
    "12345678-1234-4234-8234-1234567890ab",
    "web.example",
    (KEY,),
    "#!/bin/sh\ntrue\n",
    (STATIC, DHCP),
    (("role", "db"),),
)


@pytest.mark.parametrize("form", ConfigDriveFormat)
def test_the_image_holds_the_documents_under_the_label_cloud_init_seeks(
    tmp_path: Path, form: ConfigDriveFormat
) -> None:
    path = tmp_path / "drives" / "a.iso"
    expected = documents(FIRST, form)
    write_iso(path, form.label, expected)
    assert read_iso(path) == (form.label, expected)
    assert path.stat().st_size % 2048 == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_nocloud() -> None:
    files = documents(FIRST, ConfigDriveFormat.NOCLOUD)
    meta = json.loads(files["meta-data"])
    assert meta == {
        "instance-id": FIRST.instance_id,
        "local-hostname": "web.example",
        "public-keys": [KEY],
        "role": "db",
    }
    assert files["user-data"] == b"#!/bin/sh\ntrue\n"
    network = json.loads(files["network-config"])
    assert network == {
        "version": 2,
        "ethernets": {
            "nic0": {
                "match": {"macaddress": STATIC.mac},
                "addresses": ["10.0.0.2/24", "fd00::2/64", "10.0.0.3/24"],
                "gateway4": "10.0.0.1",
                "nameservers": {"addresses": ["10.0.0.1"]},
            },
            "nic1": {"match": {"macaddress": DHCP.mac}, "dhcp4": True},
        },
    }


def test_config_drive() -> None:
    files = documents(FIRST, ConfigDriveFormat.CONFIGDRIVE)
    meta = json.loads(files["openstack/latest/meta_data.json"])
    assert meta["uuid"] == FIRST.instance_id
    assert meta["public_keys"] == {"key0": KEY}
    network = json.loads(files["openstack/latest/network_data.json"])
    assert [link["ethernet_mac_address"] for link in network["links"]] == [STATIC.mac, DHCP.mac]
    assert [layer["type"] for layer in network["networks"]] == ["ipv4", "ipv6", "ipv4", "ipv4_dhcp"]
    assert network["networks"][0]["netmask"] == "255.255.255.0"
    assert network["networks"][0]["routes"] == [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"}]
    assert network["networks"][1]["routes"] == network["networks"][2]["routes"] == []
    assert network["services"] == [{"type": "dns", "address": "10.0.0.1"}]


def test_a_guest_without_wishes_gets_what_the_data_source_demands() -> None:
    plain = FirstBoot("i", "h")
    assert set(documents(plain, ConfigDriveFormat.NOCLOUD)) == {"meta-data", "user-data"}
    assert documents(plain, ConfigDriveFormat.NOCLOUD)["user-data"].startswith(b"#cloud-config")
    assert set(documents(plain, ConfigDriveFormat.CONFIGDRIVE)) == {"openstack/latest/meta_data.json"}


def test_its_json_form_is_all_of_it() -> None:
    assert FirstBoot.from_json(json.loads(json.dumps(FIRST.to_json()))) == FIRST


def changed(**fields: Any) -> FirstBoot:
    return dataclasses.replace(FIRST, **fields)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (changed(hostname="-a"), "hostname"),
        (changed(hostname="a\nb"), "hostname"),
        (changed(hostname="a" * 254), "hostname"),
        (changed(ssh_keys=("rsa",)), "public key"),
        (changed(ssh_keys=(KEY + "\nssh-rsa AAAA",)), "public key"),
        (changed(ssh_keys=(KEY,) * 65), "65 SSH keys"),
        (changed(user_data="echo"), "user data"),
        (changed(user_data="#" + "x" * (1 << 20)), "longer"),
        (changed(networks=(STATIC, STATIC)), "same mac"),
        (changed(networks=(GuestNetwork("m", ("10.0.0.300/24",)),)), "10.0.0.300"),
        (changed(networks=(GuestNetwork("m", ("10.0.0.3",)),)), "prefix length"),
        (changed(networks=(GuestNetwork("m", ("10.0.0.3/24",), ("10.0.1.1",)),)), "gateway"),
        (changed(networks=(GuestNetwork("m", ("10.0.0.3/24",), ("10.0.0.1", "10.0.0.2")),)), "one gateway"),
        (changed(networks=(GuestNetwork("m", (), (), ("dns.example",)),)), "dns.example"),
    ],
)
@pytest.mark.parametrize("form", ConfigDriveFormat)
def test_what_cloud_init_would_not_take_is_refused(wrong: FirstBoot, says: str, form: ConfigDriveFormat) -> None:
    with pytest.raises(InstructionError, match=says):
        documents(wrong, form)


def test_a_drive_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InstructionError, match="more than"):
        write_iso(tmp_path / "a.iso", "cidata", {"user-data": bytes(9 << 20)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_take_it_leaves_the_old_drive(tmp_path: Path) -> None:
    folder = tmp_path / "drives"
    path = folder / "a.iso"
    write_iso(path, "cidata", {"user-data": b"#1"})
    (folder / "a.iso.new").mkdir()  # in the way
    with pytest.raises(InstructionError, match="cannot be written"):
        write_iso(path, "cidata", {"user-data": b"#2"})
    assert read_iso(path) == ("cidata", {"user-data": b"#1"})
