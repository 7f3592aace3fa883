"""`reeve domain attach-disk` and so on, `reeve block list`, `reeve network list`, and create with devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))
from iso_reader import read_iso

from agent.cli.base import UsageError
from agent.cli.devices import disk_of, nic_of
from hypervisor.errors import HostFailure

MAC = "00:16:3e:00:00:01"


def image(reeve: Any, name: str = "disk.img") -> str:
    path: Path = reeve.folder / name
    path.write_bytes(bytes(1 << 20))
    return str(path)


def test_a_disk_comes_and_goes(reeve: Any) -> None:
    info = reeve.domain()
    options = ["--readonly", "--bytes-per-second", "50M", "--iops", "10", "--no-discard"]
    made = reeve("domain", "attach-disk", "web", "xvdb", image(reeve), *options, "-f", "json").json
    assert (made["kind"], made["id"], made["state"], made["size_bytes"]) == ("disk", "xvdb", "connected", 1 << 20)
    assert made["spec"]["limits"]["bytes_per_second"] == 50 << 20
    assert (made["spec"]["readonly"], made["spec"]["discard"], made["spec"]["limits"]["iops"]) == (True, False, 10)
    (row,) = reeve("block", "list", "-f", "json").json
    assert (row["domain"], row["uuid"], row["id"], row["path"]) == ("web", info.uuid, "xvdb", made["spec"]["path"])
    assert row["stats"]["read_bytes"] == 0 and row["readonly"] is True
    gone = reeve("domain", "detach-disk", "web", "xvdb", "-f", "json").json
    assert gone == {"domain": "web", "kind": "disk", "id": "xvdb", "state": "detached"}
    assert reeve("block", "list", "web", "-f", "json").json == []


def test_nics_are_numbered(reeve: Any) -> None:
    reeve.domain()
    first = reeve("domain", "attach-nic", "web", "--mac", MAC, "-f", "json").json
    second = reeve("domain", "attach-nic", "web", "--address", "192.0.2.5", "-f", "json").json
    assert (first["id"], first["spec"]["mac"], second["id"]) == ("0", MAC, "1")
    rows = reeve("network", "list", "web", "-f", "json").json
    assert [(row["id"], row["network"], row["addresses"]) for row in rows] == [
        ("0", "default", []), ("1", "default", ["192.0.2.5"]),
    ]  # fmt: skip
    reeve("domain", "detach-nic", "web", "0")
    assert reeve("domain", "attach-nic", "web", "-f", "json").json["id"] == "0"
    assert "192.0.2.5" in reeve("network", "list").out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("attach-disk web sda IMAGE", "domain.spec_invalid"),
        ("attach-disk web xvdb relative.img", "domain.spec_invalid"),
        ("attach-disk web xvdb /nowhere", "image.invalid"),
        ("attach-disk web xvdb IMAGE --image-format qcow2", "image.invalid"),
        ("attach-disk web xvdb IMAGE --iops -1", "domain.spec_invalid"),
        ("attach-disk web xvdb IMAGE --image-format vmdk", "cli.usage"),
        ("attach-disk web xvdb IMAGE --bytes-per-second lots", "cli.usage"),
        ("attach-disk nobody xvdb IMAGE", "domain.not_found"),
        ("attach-nic web --mac 01:00:5e:00:00:01", "domain.spec_invalid"),
        ("attach-nic web --mac nonsense", "domain.spec_invalid"),
        ("attach-nic web --network moon", "network.unknown"),
        ("attach-nic web --id 8", "domain.spec_invalid"),
        ("detach-disk web xvdb", "device.not_found"),
        ("detach-nic web 3", "device.not_found"),
    ],
)
def test_refusals(reeve: Any, words: str, code: str) -> None:
    info = reeve.domain()
    argv = [image(reeve) if word == "IMAGE" else word for word in words.split()]
    assert reeve("domain", *argv, "-f", "json").error["code"] == code
    assert reeve.host.list_devices(info.uuid) == []


def test_a_guest_that_keeps_its_disk(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.devices=keep", "--disk", f"xvda={image(reeve)}")
    words = ("domain", "detach-disk", "web", "xvda", "--wait", "0.05", "-f", "json")
    assert reeve(*words).error["code"] == "domain.timeout"
    assert reeve(*words, "--force").json["state"] == "detached"


def test_a_guest_that_does_not_take_it_up(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.devices=ignore")
    words = ("domain", "attach-disk", "web", "xvda", image(reeve), "--wait", "0.05", "-f", "json")
    assert reeve(*words).json["state"] == "connecting"


def test_create_with_devices(reeve: Any) -> None:
    info = reeve.domain(
        "web", "--disk", f"xvda={image(reeve)},readonly,shared", "--nic", f"mac={MAC}", "--nic", "",
        "--weight", "512", "--cap", "50", "--max-memory", "1G",
    )  # fmt: skip
    spec = reeve.host.get_spec(info.uuid)
    assert spec.disks[0].readonly and spec.disks[0].shared and [nic.id for nic in spec.nics] == [0, 1]
    assert (spec.nics[0].mac, spec.weight, spec.cap, spec.max_memory_mib) == (MAC, 512, 50, 1024)


def test_create_with_a_loader(reeve: Any) -> None:
    grub = reeve.folder / "grub.bin"
    grub.write_bytes(b"\x7fELF" + bytes(100))
    options = reeve.options
    config = Path(options[1])
    config.write_text(config.read_text() + f"[images]\ngrub_x86_64 = {grub}\n")
    words = ("domain", "create", "web", "--loader", "pv-grub", "--disk", f"xvda={image(reeve)}", "-f", "json")
    made = reeve(*words).json
    assert reeve.host.get_spec(made["uuid"]).boot.kernel == str(grub)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJq me@there"


def test_create_with_a_config_drive(reeve: Any) -> None:
    key, user_data, more = reeve.folder / "key.pub", reeve.folder / "user-data", reeve.folder / "more.json"
    key.write_text(f"{KEY}\n")
    user_data.write_text("#cloud-config\n{}\n")
    more.write_text(json.dumps({"networks": [{"nic": 0, "addresses": ["10.0.0.2/24"]}], "id": "xvdc"}))
    words = ("--ssh-key", str(key), "--user-data", str(user_data), "--hostname", "h1", "--config-drive", str(more))
    info = reeve.domain("web", "--nic", f"mac={MAC}", *words)
    (disk,) = reeve.host.get_spec(info.uuid).disks
    assert (disk.id, disk.readonly) == ("xvdc", True)
    label, files = read_iso(Path(disk.path))
    assert label == "cidata" and files["user-data"] == user_data.read_bytes()
    assert KEY.encode() in files["meta-data"] and b'"h1"' in files["meta-data"]
    assert b"10.0.0.2/24" in files["network-config"]
    assert reeve("domain", "destroy", "web").code == 0
    assert not Path(disk.path).exists()


def test_a_create_that_fails_leaves_no_config_drive(reeve: Any) -> None:
    reeve.host.inject_error("create", HostFailure("injected"))
    result = reeve("domain", "create", "web", "--kernel", reeve.kernel, "--hostname", "h1", "-f", "json")
    assert result.error["code"] == "host.failure"
    assert list((reeve.folder / "agent" / "config-drives").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"colour": 1}', "colour"),
        ('{"ssh_keys": 1}', "give a list"),
        ('{"hostname": "-"}', "hostname"),
        ("[]", "list"),
    ],
)
def test_config_drives_that_make_no_sense(reeve: Any, content: str, says: str) -> None:
    path, key = reeve.folder / "drive.json", reeve.folder / "key.pub"
    path.write_text(content)
    key.write_text(KEY)
    words = ("--config-drive", str(path), "--ssh-key", str(key))
    error = reeve("domain", "create", "web", "--kernel", reeve.kernel, "-f", "json", *words).error
    assert says in error["message"]
    assert not (reeve.folder / "agent" / "config-drives").exists() and reeve.host.list_domains() == []


@pytest.mark.parametrize(
    "text", ["xvda", "xvda=", "xvda=/x,", "xvda=/x,colour=red", "xvda=/x,format=", "xvda=/x,readonly=1"]
)
def test_disks_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        disk_of(text)


@pytest.mark.parametrize("text", ["mac", "mac=", "up", "network=a,,"])
def test_nics_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        nic_of(text, 0)


def test_short_forms() -> None:
    assert disk_of("xvda=/x,format=qcow2,readonly") == {
        "id": "xvda", "path": "/x", "format": "qcow2", "readonly": True,
    }  # fmt: skip
    nic = nic_of("network=blue,mac=" + MAC + ",address=192.0.2.1,address=2001:db8::1", 3)
    assert nic == {"id": 3, "network": "blue", "mac": MAC, "addresses": ["192.0.2.1", "2001:db8::1"]}
    assert nic_of("", 0)["mac"].startswith("00:16:3e:")
