from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from hypervisor.errors import DomainExists, HostFailure, HostUnavailable, InsufficientMemory
from hypervisor.toolstack.api import DomainState, KernelBoot
from hypervisor.toolstack.drivers.fake import FakeToolstack

UUID = "11111111-2222-3333-4444-555555555555"


def image(rig: Rig, name: str = "debian", **manifest: Any) -> Path:
    folder = Path(rig.host.settings["image_dir"]) / name
    folder.mkdir()
    (folder / "vmlinuz").write_bytes(b"\x7fELF" + bytes(2000))
    (folder / "initrd.img").write_bytes(b"ramdisk")
    sums = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in ("vmlinuz", "initrd.img")}
    sizes = {f: (folder / f).stat().st_size for f in sums}
    files = {"kernel": "vmlinuz", "ramdisk": "initrd.img", "sha256": sums, "size": sizes}
    data = {"format": 1, "name": name, "cmdline": "console=hvc0", **files}
    (folder / "manifest.json").write_text(json.dumps(data | manifest))
    return folder


def test_create_claims_builds_and_starts(rig: Rig) -> None:
    reply = rig.run(
        "create",
        {"name": "web", "memory_mib": 64, "vcpus": 2, "kernel": str(rig.kernel), "cmdline": "quiet", "uuid": UUID},
    )
    assert reply.ok and reply.result is not None
    assert [step["name"] for step in reply.steps] == ["claim", "build", "start"]
    domain = reply.result["domain"]
    assert (domain["uuid"], domain["name"], domain["state"], domain["vcpus"]) == (UUID, "web", "running", 2)
    info = rig.toolstack.get_domain(UUID)
    assert info.owner == rig.host.owner and ("reeve.instruction", reply.id) in info.metadata
    assert rig.toolstack.get_spec(UUID).boot == KernelBoot(str(rig.kernel), None, "quiet")
    rig.clean()


def test_create_without_start_stays_paused(rig: Rig) -> None:
    uuid_ = rig.create(start=False, metadata={"tenant": "blue"})
    info = rig.toolstack.get_domain(uuid_)
    assert info.state is DomainState.PAUSED and ("tenant", "blue") in info.metadata


def test_a_made_uuid_is_kept_by_the_plan(rig: Rig) -> None:
    args = {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)}
    plan = rig.verbs["create"].plugin.plan(args, rig.host)
    assert str(uuid.UUID(plan.domain)) == plan.domain
    assert plan.domain in json.dumps(plan.to_json())


def test_create_from_an_image(rig: Rig) -> None:
    folder = image(rig)
    reply = rig.run("create", {"name": "web", "memory_mib": 64, "image": "debian"})
    assert reply.ok and reply.steps[0]["name"] == "verify" and reply.result is not None
    spec = rig.toolstack.get_spec(reply.result["domain"]["uuid"])
    assert spec.boot == KernelBoot(str(folder / "vmlinuz"), str(folder / "initrd.img"), "console=hvc0")


def test_own_command_line_wins_over_the_image_s(rig: Rig) -> None:
    image(rig)
    result = rig.ok("create", {"name": "web", "memory_mib": 64, "image": "debian", "cmdline": "mine"})
    assert rig.toolstack.get_spec(result["domain"]["uuid"]).boot.cmdline == "mine"


def test_a_changed_image_file_is_found(rig: Rig) -> None:
    folder = image(rig)
    rig.ok("create", {"name": "one", "memory_mib": 64, "image": "debian"})
    (folder / "initrd.img").write_bytes(b"RAMDISK")  # of the same size
    error = rig.refused("image.invalid", "create", {"name": "two", "memory_mib": 64, "image": "debian"})
    assert "initrd.img" in error["message"] and error["undone"] is True


@pytest.mark.parametrize(
    "manifest",
    [
        {"kernel": "../../etc/passwd"},
        {"kernel": "/etc/passwd", "sha256": {"/etc/passwd": "x"}},
        {"kernel": None},
        {"kernel": ["vmlinuz"]},
        {"sha256": {}},
        {"sha256": None},
        {"cmdline": 5},
    ],
)
def test_unusable_manifests_are_refused(rig: Rig, manifest: dict[str, Any]) -> None:
    image(rig, **manifest)
    rig.refused("image.invalid", "create", {"name": "web", "memory_mib": 64, "image": "debian"})


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, "x" * 100000])
def test_unreadable_manifests_are_refused(rig: Rig, text: str) -> None:
    (image(rig) / "manifest.json").write_text(text)
    rig.refused("image.invalid", "create", {"name": "web", "memory_mib": 64, "image": "debian"})


BAD = [
    ("instruction.bad_args", {"memory_mib": "64"}),
    ("instruction.bad_args", {"memory_mib": 0}),
    ("instruction.bad_args", {"memory_mib": -5}),
    ("instruction.bad_args", {"memory_mib": 64.5}),
    ("instruction.bad_args", {"memory_mib": 10**30}),
    ("instruction.bad_args", {"vcpus": 0}),
    ("instruction.bad_args", {"vcpus": 33}),
    ("instruction.bad_args", {"name": ""}),
    ("instruction.bad_args", {"name": "../x"}),
    ("instruction.bad_args", {"name": "a" * 64}),
    ("instruction.bad_args", {"name": "web\n"}),
    ("instruction.bad_args", {"uuid": "1"}),
    ("instruction.bad_args", {"uuid": UUID.upper().replace("1", "A")}),
    ("instruction.bad_args", {"kernel": "relative"}),
    ("instruction.bad_args", {"kernel": "/a\u0000b"}),
    ("instruction.bad_args", {"kernel": None}),
    ("instruction.bad_args", {"colour": "blue"}),
    ("instruction.bad_args", {"owner": "me"}),
    ("instruction.bad_args", {"start": "yes"}),
    ("instruction.bad_args", {"image": "debian"}),
    ("instruction.bad_args", {"metadata": {"reeve.instruction": "forged"}}),
    ("instruction.bad_args", {"on_crash": "explode"}),
    ("domain.spec_invalid", {"cmdline": "ü" * 1000}),
    ("domain.spec_invalid", {"max_vcpus": 1, "vcpus": 2}),
    ("domain.spec_invalid", {"max_memory_mib": 1}),
    ("kernel.invalid", {"kernel": "/nowhere/vmlinuz"}),
    ("kernel.invalid", {"kernel": "/etc/passwd"}),
    ("ramdisk.invalid", {"ramdisk": "/nowhere/initrd"}),
    ("host.insufficient_memory", {"memory_mib": 1 << 20}),
    ("host.insufficient_vcpus", {"vcpus": 32}),
]


@pytest.mark.parametrize(("code", "change"), BAD)
def test_bad_input_leaves_nothing(tmp_path: Path, code: str, change: dict[str, Any]) -> None:
    rig = make_rig(tmp_path, FakeToolstack(None, cpus=1, memory_mib=1000))
    error = rig.refused(code, "create", {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)} | change)
    assert error["undone"] is True and rig.toolstack.list_domains() == []


def test_neither_kernel_nor_image(rig: Rig) -> None:
    assert (
        "exactly one of image, kernel, loader and from_checkpoint"
        in rig.refused("instruction.bad_args", "create", {"name": "web", "memory_mib": 64})["message"]
    )
    rig.refused("image.not_found", "create", {"name": "web", "memory_mib": 64, "image": "nope"})


def test_name_and_uuid_in_use(rig: Rig) -> None:
    rig.create("web", uuid=UUID)
    rig.refused("domain.name_in_use", "create", {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)})
    rig.refused(
        "domain.uuid_in_use", "create", {"name": "w2", "memory_mib": 64, "kernel": str(rig.kernel), "uuid": UUID}
    )
    assert [domain.uuid for domain in rig.toolstack.list_domains()] == [UUID]


def test_a_foreign_domain_s_uuid_is_never_destroyed_by_the_undo(rig: Rig) -> None:
    """The driver's own check fails after the plan's: the undo must see that the domain is not of this instruction."""
    foreign = rig.foreign()
    rig.toolstack.inject_error("create", DomainExists("taken"))
    args = {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel), "uuid": UUID}
    plan = rig.verbs["create"].plugin.plan(args, rig.host)
    data = json.loads(json.dumps(plan.to_json()).replace(UUID, foreign))
    ident = rig.accept("create", args)
    rig.journal.planned(ident, data, foreign)
    rig.executor.run(ident)
    reply = rig.reply(ident)
    assert reply.error is not None and reply.error["code"] == "domain.uuid_in_use"
    assert rig.toolstack.get_domain(foreign).state is DomainState.RUNNING


@pytest.mark.parametrize("verb", ["create", "unpause"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [HostUnavailable("away"), HostFailure("broken"), InsufficientMemory("none")])
def test_a_failing_driver_leaves_nothing(rig: Rig, verb: str, when: str, error: Exception) -> None:
    """Also when the driver fails after it has done the work."""
    rig.toolstack.inject_error(verb, error, when=when)  # type: ignore[arg-type]
    code = error.code  # type: ignore[attr-defined]
    failed = rig.refused(code, "create", {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)})
    assert failed["undone"] is True and rig.toolstack.list_domains() == []


def test_a_guest_that_ends_at_once_is_a_success_that_says_so(rig: Rig) -> None:
    result = rig.ok(
        "create",
        {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel), "cmdline": "fake.boot=poweroff"},
    )
    assert result["domain"]["state"] == "gone" and rig.toolstack.list_domains() == []
