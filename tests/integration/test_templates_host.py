"""Templates when something goes wrong, and what domains that began from one share: with real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import resource
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from build import available, build_guest
from host_rig import HostRig, kill_process, until
from xs_client import XsClient

from hypervisor.errors import CpuIncompatible, HostFailure, StreamInvalid, StreamUnsupported, ToolstackError
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.suspended import template as form
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = [
    pytest.mark.skipif(bool(available()), reason=str(available())),
    pytest.mark.timeout(300),
]
KILLS = 2
MIB = 64


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("host"), runtime=REAL_RUNTIME, memory_mib=1024)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    made.close()
    made = rig.connect()  # the host process may be another one
    for info in made.list_domains():
        made.destroy(info.uuid)
    for folder in (rig.state / "templates").glob("*"):
        shutil.rmtree(folder)
    made.close()


def booted(toolstack: EmbeddedToolstack, memory_mib: int = MIB) -> str:
    ident = str(uuid.uuid4())
    boot = KernelBoot(str(build_guest("suspend")))
    toolstack.create(DomainSpec(ident, f"d-{ident[:8]}", boot, memory_mib, vcpus=2, owner="tests"))
    toolstack.unpause(ident)
    until(lambda: b"suspend: ready" in toolstack.console_log(ident), "the guest to boot", 60)
    return ident


def begin(toolstack: EmbeddedToolstack, name: str = "t") -> str:
    ident = str(uuid.uuid4())
    spec = dataclasses.replace(toolstack.template_get(name).spec, uuid=ident, name=f"c-{ident[:8]}", owner="tests")
    toolstack.clone(name, spec)
    toolstack.unpause(ident)
    return ident


def answers(toolstack: EmbeddedToolstack, ident: str) -> None:
    word = str(uuid.uuid4().int)  # digits: hexadecimal ones may spell "bad"
    console = toolstack.open_console(ident)
    try:
        console.write(f"{word}\n".encode())
        until(lambda: b"echo: " + word.encode() in toolstack.console_log(ident), "the guest to answer", 60)
    finally:
        console.close()
    log = toolstack.console_log(ident)
    assert b"BAD" not in log and b"bad" not in log, log


def memory_of(pid: int) -> dict[str, int]:
    """Of all mappings of template memory, KiB."""
    sums = dict.fromkeys(("Rss", "Private_Dirty"), 0)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith("/templates/t/memory")
        elif inside and (found := re.match(r"(\w+):\s+(\d+) kB", line)) and found[1] in sums:
            sums[found[1]] += int(found[2])
    return sums


def test_a_domain_that_began_from_one_is_like_any_other(
    rig: HostRig, toolstack: EmbeddedToolstack, tmp_path: Path
) -> None:
    """It shares memory, has an identity, outlives the host process, is saved and dumped, and others begin from it."""
    toolstack.template_create(booted(toolstack), "t", ident="one")
    first, second = begin(toolstack), begin(toolstack)
    for ident in (first, second):
        answers(toolstack, ident)
    shared = memory_of(rig.process_of(first))
    assert shared["Rss"] > 0 and shared["Private_Dirty"] < MIB * 1024 // 8, shared
    client = XsClient(rig.state / "xenstored.sock")
    told = []
    for ident in (first, second):
        home = f"/local/domain/{toolstack.get_domain(ident).domid}"
        assert client.read(f"{home}/clone/template") == "one"
        assert client.perms(f"{home}/clone/generation").endswith(f",r{toolstack.get_domain(ident).domid}")
        told.append(client.read(f"{home}/clone/generation"))
    client.close()
    assert told[0] != told[1] and all(re.fullmatch("[0-9a-f]{32}", str(number)) for number in told)

    toolstack.save(second, str(tmp_path / "second"))  # what is private is saved, too
    toolstack.restore(str(tmp_path / "second"), owner="tests")
    toolstack.unpause(second)
    answers(toolstack, second)

    rig.restart()
    toolstack = rig.connect()
    answers(toolstack, first)
    assert toolstack.template_get("t").users == (first,)
    toolstack.dump_core(first, str(tmp_path / "core"))
    assert memory_of(rig.process_of(first))["Rss"] == 0, "all of it is its own now"
    answers(toolstack, first)
    toolstack.template_create(first, "again", ident="two")
    third = begin(toolstack, "again")
    answers(toolstack, third)
    toolstack.close()


def test_a_full_disk(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    ident = booted(toolstack)
    before = resource.prlimit(rig.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rig.pid, resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(HostFailure, match="could not be written: File too large"):
            toolstack.template_create(ident, "t", ident="one")
    finally:
        resource.prlimit(rig.pid, resource.RLIMIT_FSIZE, before)
    assert toolstack.template_list() == [] and list((rig.state / "templates").iterdir()) == []
    answers(toolstack, ident)
    toolstack.template_create(ident, "t", ident="one")


def test_a_host_process_that_is_killed(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    """Whenever that is: the guest runs on, or its template is whole and it is gone. Never both, never neither."""
    rng = random.Random(5)
    for _ in range(KILLS):
        toolstack = rig.connect()
        ident = booted(toolstack)

        def create(ident: str = ident, toolstack: EmbeddedToolstack = toolstack) -> None:
            with contextlib.suppress(ToolstackError):
                toolstack.template_create(ident, "t", ident="one")

        thread = threading.Thread(target=create)
        thread.start()
        time.sleep(rng.uniform(0.2, 1.2))  # what is tested is any moment
        rig.restart()
        thread.join(60)
        toolstack.close()
        toolstack = rig.connect()
        if toolstack.template_list():
            until(lambda: not toolstack.list_domains(), "the domain to be gone")  # noqa: B023
            ident = begin(toolstack)
        answers(toolstack, ident)
        toolstack.destroy(ident)
        for template in toolstack.template_list():
            toolstack.template_remove(template.name)
        assert list((rig.state / "templates").glob("*")) == []
        toolstack.close()


def test_templates_that_this_host_cannot_take(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    ident = booted(toolstack)
    toolstack.template_create(ident, "t", ident="one")
    folder, frames = rig.state / "templates" / "t", MIB * 256
    kept, about = (folder / "state").read_bytes(), (folder / "template.json").read_text()
    with open(folder / "state", "rb") as file:
        state, _ = form.read_state(file.fileno(), frames)
    assert state.policy is not None
    leaves = dict(state.policy.leaves)
    leaves[1, 0] = (*leaves[1, 0][:2], leaves[1, 0][2] | 1 << 28, leaves[1, 0][3])
    avx = dataclasses.replace(state, policy=dataclasses.replace(state.policy, leaves=leaves))
    free = toolstack.host_info().memory_free_mib
    for data, error, says in (
        (form.write_state(avx, frames), CpuIncompatible, "feature avx"),
        (form.write_state(state, frames + 1), StreamInvalid, "frames"),
        (kept[:16] + b"\7" + kept[17:], StreamUnsupported, "form 7"),
        (kept[:-1] + b"\1", StreamInvalid, "checksum"),
        (kept[:-1], StreamInvalid, "cut short"),
        (form.write_state(dataclasses.replace(state, vcpus=()), frames), StreamInvalid, "vCPU 0"),
    ):
        put(folder / "state", data)
        with pytest.raises(error, match=says):
            begin(toolstack)
        assert toolstack.list_domains() == [] and toolstack.host_info().memory_free_mib == free
    put(folder / "state", kept)
    for text, error in ((about.replace('"form": 1', '"form": 2'), StreamUnsupported), ("{", StreamInvalid)):
        put(folder / "template.json", text.encode())
        with pytest.raises(error):
            begin(toolstack)
        assert toolstack.template_list() == []
    put(folder / "template.json", about.encode())
    with open(folder / "memory", "rb+") as file:
        file.truncate(frames * 4096 - 1)
    with pytest.raises(StreamInvalid, match="another size"):
        begin(toolstack)
    assert toolstack.list_domains() == []
    toolstack.template_remove("t")


def put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_a_domain_process_that_dies_while_its_guest_is_laid_out(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    ident = booted(toolstack)
    failed: list[ToolstackError] = []

    def create() -> None:
        try:
            toolstack.template_create(ident, "t", ident="one")
        except ToolstackError as exc:
            failed.append(exc)

    thread = threading.Thread(target=create)
    thread.start()
    until(lambda: rig.record(ident)["suspending"], "the guest to be asked")
    with contextlib.suppress(ProcessLookupError):
        kill_process(rig.process_of(ident))
    thread.join(60)
    if failed:  # otherwise it was whole already
        assert toolstack.template_list() == [] and list((rig.state / "templates").iterdir()) == []
        until(lambda: toolstack.get_domain(ident).state is DomainState.CRASHED, "its crash to be told")
