"""`create` and `attach_disk` of images that are fetched: files of the domain's own, whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent" / "images"))
from agent_rig import Rig, make_rig
from fetch_rig import fetcher, qcow2
from image_servers import File, Server, serving

from agent.api import Check
from agent.images.remote.disks import Place
from agent.images.remote.fetcher import Fetcher
from agent.images.remote.steps import FetchStep, PlaceStep
from hypervisor.errors import HostFailure

UUID = "11111111-2222-3333-4444-555555555555"
MIB = 1 << 20
DISK = bytes(MIB - 512) + b"x" * 512
KERNEL = b"\x7fELF" + bytes(1000)
RAMDISK = b"070701" + bytes(200)

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="apt-get install qemu-utils")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        made.files = {"/disk": File(DISK), "/kernel": File(KERNEL), "/initrd": File(RAMDISK)}
        yield made


@pytest.fixture
def images(tmp_path: Path) -> Fetcher:
    return fetcher(tmp_path / "images6")


@pytest.fixture
def rig(tmp_path: Path, images: Fetcher) -> Iterator[Rig]:
    made = make_rig(tmp_path, sources=images)
    yield made
    made.journal.close()


def source(server: Server, name: str, **changes: Any) -> dict[str, Any]:
    data = server.files[name].data
    return {
        "url": server.url(name),
        "hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()},
        "size": len(data),
    } | changes


def disk(server: Server, **changes: Any) -> dict[str, Any]:
    return {"id": "xvda", "source": source(server, "/disk", format="raw", mode="copy") | changes}


def args(server: Server, **changes: Any) -> dict[str, Any]:
    base = {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": source(server, "/kernel")}
    return base | {"ramdisk": source(server, "/initrd"), "disks": [disk(server)]} | changes


def files(images: Fetcher) -> list[str]:
    return sorted(path.name for path in images.disks.folder.iterdir())


def leases(images: Fetcher) -> list[str]:
    return [name for entry in images.cache.list() for name in entry.leases]


def test_a_domain_of_fetched_files(server: Server, images: Fetcher, rig: Rig) -> None:
    reply = rig.run("create", args(server))
    assert reply.ok, reply.error
    assert [step["name"] for step in reply.steps] == ["claim", "fetch", "place", "build", "start"]
    spec = rig.toolstack.get_spec(UUID)
    assert spec.boot.ramdisk is not None
    assert Path(spec.boot.kernel).read_bytes() == KERNEL and Path(spec.boot.ramdisk).read_bytes() == RAMDISK
    (found,) = spec.disks
    assert (Path(found.path).read_bytes(), found.format) == (DISK, "raw")
    assert Path(found.path).stat().st_mode & 0o777 == 0o600 and leases(images) == []
    for entry in images.cache.list():
        images.cache.evict(entry.key)
    assert Path(spec.boot.kernel).read_bytes() == KERNEL, "the domain's own"
    assert [step["name"] for step in rig.run("destroy", {"uuid": UUID}).steps] == ["destroy", "remove_files"]
    assert files(images) == [f"{UUID}.xvda.json", f"{UUID}.xvda.raw"], "a guest's data stay"
    error = rig.refused("image.in_use", "create", args(server))
    assert "attach it by its path" in error["message"]
    assert files(images) == [f"{UUID}.xvda.json", f"{UUID}.xvda.raw"] and leases(images) == []


def test_a_disk_that_goes_with_its_domain(server: Server, images: Fetcher, rig: Rig) -> None:
    rig.ok("create", args(server, disks=[disk(server, delete_on_destroy=True)]))
    rig.ok("destroy", {"uuid": UUID})
    assert files(images) == []


@needs_qemu_img
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_overlay_holds_its_image(server: Server, images: Fetcher, rig: Rig, image_format: str) -> None:
    server.files["/disk"] = File(DISK if image_format == "raw" else qcow2(MIB))
    wanted = disk(server, format=image_format, mode="overlay", disk_mib=8)
    rig.ok("create", args(server, disks=[wanted]))
    (found,) = rig.toolstack.get_spec(UUID).disks
    assert found.format == "qcow2"
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", found.path], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    key = f"{hashlib.sha256(server.files['/disk'].data).hexdigest()}.{image_format}"
    assert f'"backing-filename-format": "{image_format}"' in told and f'"virtual-size": {8 * MIB}' in told
    assert images.disks.bases() == {key} and leases(images) == []
    with pytest.raises(Exception, match="in use by a domain"):
        images.cache.evict(key)
    subprocess.run(["qemu-img", "check", "-q", found.path], check=True, timeout=30)


@needs_qemu_img
def test_a_copied_qcow2_grows(server: Server, images: Fetcher, rig: Rig) -> None:
    server.files["/disk"] = File(qcow2(MIB))
    rig.ok("create", args(server, disks=[disk(server, format="qcow2", disk_mib=8)]))
    (found,) = rig.toolstack.get_spec(UUID).disks
    assert qcow2(8 * MIB)[24:32] == Path(found.path).read_bytes()[24:32] and images.disks.bases() == set()


def test_a_copied_raw_disk_grows_and_never_shrinks(server: Server, images: Fetcher, rig: Rig) -> None:
    server.files["/disk"] = File(DISK * 2)
    error = rig.refused("instruction.bad_args", "create", args(server, disks=[disk(server, disk_mib=1)]))
    assert "never shrink" in error["message"] and files(images) == []
    rig.ok("create", args(server, disks=[disk(server, disk_mib=3)]))
    (found,) = rig.toolstack.get_spec(UUID).disks
    assert Path(found.path).read_bytes() == DISK * 2 + bytes(MIB)


@pytest.mark.parametrize("verb", ["create", "unpause"])
def test_all_goes_when_the_create_is_undone(server: Server, images: Fetcher, rig: Rig, verb: str) -> None:
    rig.toolstack.inject_error(verb, HostFailure("injected"))
    rig.refused("host.failure", "create", args(server))
    assert files(images) == [] and leases(images) == [] and rig.toolstack.list_domains() == []


def test_a_download_that_fails_leaves_nothing(server: Server, images: Fetcher, rig: Rig) -> None:
    server.files["/disk"].data = bytes(MIB)
    wrong = {"algorithm": "sha256", "value": "0" * 64}
    error = rig.refused("image.invalid", "create", args(server, disks=[disk(server, hash=wrong)]))
    assert "has sha256" in error["message"]
    assert files(images) == [] and leases(images) == []


def test_a_disk_is_attached(server: Server, images: Fetcher, rig: Rig) -> None:
    uuid = rig.create()
    wanted = {"uuid": uuid, "disk": disk(server) | {"readonly": True}, "wait_seconds": 0}
    reply = rig.run("attach_disk", wanted)
    assert reply.ok, reply.error
    assert [step["name"] for step in reply.steps] == ["fetch", "place", "attach", "connect"]
    (found,) = rig.toolstack.get_spec(uuid).disks
    assert Path(found.path).read_bytes() == DISK and found.readonly
    assert [step["name"] for step in rig.run("attach_disk", wanted).steps] == ["connect"], "it is attached already"
    rig.ok("destroy", {"uuid": uuid})
    assert files(images) == [f"{uuid}.xvda.json", f"{uuid}.xvda.raw"]


def context(rig: Rig, instruction: str, outputs: dict[str, Any] | None = None) -> Any:
    def poll(ready: Any, _seconds: float) -> object:
        while not (got := ready(0.1)):
            pass
        return got

    return types.SimpleNamespace(
        host=rig.host, instruction=instruction, outputs=outputs or {}, poll=poll, progress=lambda *args, **more: None
    )


def test_the_steps_look_at_what_is_there(server: Server, images: Fetcher, rig: Rig) -> None:
    """Interrupted before, within and after `run`; and beside files that another instruction left."""
    plan = rig.verbs["create"].plugin.plan(args(server), rig.host)
    kinds = type(rig.verbs["create"].plugin).step_kinds
    assert type(plan).from_json(plan.to_json(), kinds) == plan
    fetch = next(step for step in plan.steps if isinstance(step, FetchStep))
    place = next(step for step in plan.steps if isinstance(step, PlaceStep))
    mine, other = context(rig, "one"), context(rig, "two")
    assert place.check(mine) is Check.NOT_DONE
    place.undo(mine)
    fetch.undo(mine)
    mine.outputs["fetch"] = other.outputs["fetch"] = fetch.run(mine)
    assert fetch.run(mine) == mine.outputs["fetch"] and len(server.requests) == 3 and set(leases(images)) == {"one"}
    kernel = Place(**place.places[0])
    images.disks.make(kernel, images.cache.path(mine.outputs["fetch"]["kernel"]["image"]), "one")
    assert place.check(mine) is Check.NOT_DONE, "half of it"
    (images.disks.folder / f".{UUID}.xvda.raw.new").write_bytes(b"half")
    place.run(mine)
    assert place.check(mine) is Check.DONE and place.check(other) is Check.NOT_DONE and leases(images) == []
    place.run(mine)
    with pytest.raises(Exception, match="is there from before"):
        place.run(other)
    place.undo(other)
    assert place.check(mine) is Check.DONE, "another's are not touched"
    place.undo(mine)
    place.undo(mine)
    assert files(images) == []


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"kernel": {"url": "file:///etc/passwd"}}, "instruction.bad_args", "file:///etc/passwd"),
    ({"kernel": {"url": "http://u:p@127.0.0.1/x"}}, "instruction.bad_args", "127.0.0.1"),
    ({"kernel": {}}, "instruction.bad_args", "{}"),
    ({"kernel": {"glance": "../x"}}, "instruction.bad_args", "../x"),
    ({"kernel": {"url": "https://127.0.0.1/x"}}, "image.source_refused", "allowed_schemes"),
    ({"kernel": {"url": "http://127.0.0.1/x"}}, "image.source_refused", "require_hash"),
    ({"kernel": {"url": "http://127.0.0.2/x"}}, "image.source_refused", "allowed_networks"),
    ({"kernel": {"glance": UUID}}, "image.source_refused", "no Glance"),
    ({"disks": [{"id": "xvda"}]}, "instruction.bad_args", "disks"),
    (
        {"disks": [{"id": "xvda", "path": "/x", "source": {"url": "http://x/", "format": "raw"}}]},
        "instruction.bad_args",
        "",
    ),
    ({"disks": [{"id": "xvda", "source": {"url": "http://x/"}}]}, "instruction.bad_args", ""),
    ({"disks": [{"id": "xvda", "source": {"url": "http://x/", "format": "vmdk"}}]}, "instruction.bad_args", ""),
    (
        {"disks": [{"id": "xvda", "source": {"url": "http://x/", "glance": UUID, "format": "raw"}}]},
        "instruction.bad_args",
        "",
    ),
    (
        {"kernel": {"url": "http://127.0.0.1/", "hash": {"algorithm": "sha512", "value": "0" * 64}}},
        "instruction.bad_args",
        "128 hexadecimal digits",
    ),
]


@pytest.mark.parametrize(("changes", "code", "says"), REFUSED)
def test_what_is_refused_before_anything_is_begun(
    server: Server, images: Fetcher, rig: Rig, changes: dict[str, Any], code: str, says: str
) -> None:
    reply = rig.run("create", args(server, **changes))
    assert reply.error is not None and reply.error["code"] == code, reply.error
    assert says in reply.error["message"] and "\n" not in reply.error["message"]
    assert server.requests == [] and files(images) == [] and not reply.steps
    rig.clean()


def test_where_nothing_is_fetched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    rig = make_rig(tmp_path / "bare")
    try:
        rig.refused("image.source_refused", "create", args(server))
        rig.ok("destroy", {"uuid": rig.create()})
    finally:
        rig.journal.close()
