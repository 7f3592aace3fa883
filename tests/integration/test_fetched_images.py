"""A guest whose kernel, ramdisk and disk come over HTTP, made by one instruction; and an agent that is killed while
they come.

The first needs Debian's packages, a gcc that links statically, qemu-utils and qemu-system-common.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from block_guest import BOOT_SECONDS, make_image, missing
from host_rig import HostRig, until
from image_servers import File, Handler, Server, cut_at, serving

from hypervisor.errors import HostFailure
from hypervisor.host.settings import REAL_RUNTIME

UUID = "11111111-2222-3333-4444-555555555555"
MIB = 1 << 20
MARK = b"this came over HTTP"
OPTIONS = ("--images-allowed-schemes", "http", "--images-allowed-networks", "127.0.0.1/32")
READ = """#!/bin/busybox sh
until [ -b /dev/xvda ]; do /bin/busybox usleep 20000; done
mark=$(/bin/busybox dd if=/dev/xvda bs=512 skip=2048 count=1 2>/dev/null | /bin/busybox head -c 19)
echo "READ-$mark-$(cat /sys/block/xvda/size)"
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def source(server: Server, path: str, **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(server.files[path].data).hexdigest()
    return {"url": server.url(path), "hash": {"algorithm": "sha256", "value": digest}, **more}


def test_a_guest_that_comes_over_http(tmp_path: Path, server: Server) -> None:
    for program, package in (("qemu-img", "qemu-utils"), ("qemu-storage-daemon", "qemu-system-common")):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: apt-get install {package}")
    reading = tmp_path / "read"
    reading.write_text(READ)
    reading.chmod(0o755)
    image = make_image(tmp_path, more=[(reading, "etc/init.d/read")])
    assert image.ramdisk is not None
    disk = bytearray(4 * MIB)
    disk[MIB : MIB + len(MARK)] = MARK
    server.files = {
        "/vmlinuz": File(Path(image.kernel).read_bytes()),
        "/initrd": File(Path(image.ramdisk).read_bytes()),
        "/disk": File(bytes(disk), misdeed=cut_at(2 * MIB)),
    }
    state = tmp_path / "state"
    rig = HostRig(
        tmp_path / "host", REAL_RUNTIME, image_folders=f"{state / 'image-cache'},{state / 'guest-disks'}"
    ).start()
    agent = AgentProcess(tmp_path, driver=("--driver-name", "embedded", "--driver-socket", str(rig.socket)))
    given = {
        "name": "web",
        "uuid": UUID,
        "memory_mib": 192,
        "kernel": source(server, "/vmlinuz"),
        "ramdisk": source(server, "/initrd"),
        "cmdline": image.cmdline,
        "disks": [{"id": "xvda", "source": source(server, "/disk", format="raw", disk_mib=8, delete_on_destroy=True)}],
    }
    try:
        agent.start("", *OPTIONS)
        with agent.client() as client:
            reply = client.call("create", given, timeout=BOOT_SECONDS)
            assert reply.ok, reply.error
            toolstack = rig.connect()
            expected = b"READ-" + MARK + b"-%d" % (8 * MIB // 512)
            until(lambda: expected in toolstack.console_log(UUID), "the guest to read its disk", BOOT_SECONDS)
            toolstack.close()
            assert len(server.asked("/disk")) == 2, "cut and resumed"
            assert client.call("destroy", {"uuid": UUID}, timeout=60).ok
        assert list((state / "guest-disks").iterdir()) == []
        assert len(list((state / "image-cache").glob("*.json"))) == 3, "for the next one"
    finally:
        if agent.process is not None:
            agent.stop()
        rig.stop()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """Over the fake driver."""
    made = AgentProcess(tmp_path)
    yield made
    if made.process is not None:
        made.stop()


def copy(agent: AgentProcess, server: Server) -> dict[str, Any]:
    """Arguments of a domain with a disk of its own that goes with it."""
    disk = source(server, "/disk", format="raw", mode="copy", delete_on_destroy=True)
    return {
        "name": "web",
        "uuid": UUID,
        "memory_mib": 64,
        "kernel": agent.kernel(),
        "disks": [{"id": "xvda", "source": disk}],
    }


def files(agent: AgentProcess) -> list[str]:
    return sorted(path.name for path in (agent.folder / "state" / "guest-disks").iterdir())


def killed_at(agent: AgentProcess, boundary: str, verb: str, given: dict[str, Any]) -> Any:
    with agent.client() as client:
        agent.start(boundary, *OPTIONS)
        ident = client.send(verb, given)
        agent.wait_killed()
        agent.start("", *OPTIONS)
        return client.wait(ident, 40)


def leases(agent: AgentProcess) -> list[Any]:
    paths = (agent.folder / "state" / "image-cache").glob("*.json")
    return [json.loads(path.read_text())["leases"] for path in paths]


@pytest.mark.parametrize("boundary", ["fetch:begun", "fetch:ran", "fetch:done", "place:ran", "place:done"])
def test_an_agent_that_is_killed_at(agent: AgentProcess, server: Server, boundary: str) -> None:
    server.files["/disk"] = File(bytes(MIB))
    reply = killed_at(agent, f"create:{boundary}", "create", copy(agent, server))
    assert reply.ok, reply.error
    assert files(agent) == [f"{UUID}.xvda.json", f"{UUID}.xvda.raw"] and leases(agent) == [{}]
    assert len(server.requests) == 1, "fetched once"


@pytest.mark.parametrize("boundary", ["place:undoing", "place:undone", "fetch:undone"])
def test_an_agent_that_is_killed_while_it_undoes(agent: AgentProcess, server: Server, boundary: str) -> None:
    server.files["/disk"] = File(bytes(MIB))
    agent.toolstack().inject_error("unpause", HostFailure("injected: it does not run"))
    reply = killed_at(agent, f"create:{boundary}", "create", copy(agent, server))
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert files(agent) == [] and leases(agent) == [{}]


def test_an_agent_that_is_killed_while_it_destroys(agent: AgentProcess, server: Server) -> None:
    server.files["/disk"] = File(bytes(MIB))
    agent.start("", *OPTIONS)
    with agent.client() as client:
        assert client.call("create", copy(agent, server), timeout=40).ok
    agent.stop()
    assert killed_at(agent, "destroy:remove_files:begun", "destroy", {"uuid": UUID}).ok
    assert files(agent) == []


def test_an_agent_that_is_killed_while_it_fetches(agent: AgentProcess, server: Server) -> None:
    """The next one resumes the download and carries the instruction out; nothing partial is ever used."""
    data = bytes(range(256)) * 4096
    half = threading.Event()

    def hold(handler: Handler, file: File) -> None:
        if half.is_set():
            handler.serve(file)
            return
        handler.begin(200, {"Content-Length": str(len(data)), "ETag": file.etag})
        handler.wfile.write(data[: MIB // 2])
        half.set()
        server.over.wait(30)

    server.files["/disk"] = File(data, misdeed=hold)
    cache = agent.folder / "state" / "image-cache"
    with agent.client() as client:
        agent.start("", *OPTIONS)
        ident = client.send("create", copy(agent, server))
        until(lambda: any(path.stat().st_size for path in cache.glob("partial/*.part")), "half of it")
        agent.kill()
        assert list(cache.glob("*.raw")) == []
        agent.start("", *OPTIONS)
        reply = client.wait(ident, 40)
    assert reply.ok, reply.error
    assert "Range" in server.asked("/disk")[-1]
    assert (cache.parent / "guest-disks" / f"{UUID}.xvda.raw").read_bytes() == data
