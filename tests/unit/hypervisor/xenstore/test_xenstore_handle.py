"""The host process's own requests, and the nodes of a domain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from hypervisor.xenstore import domain_nodes, errors
from hypervisor.xenstore.domain_nodes import DomainNodes
from hypervisor.xenstore.handle import MAX_WAITING, Handle
from hypervisor.xenstore.wire import Op

UUID = "46b436ae-d30c-47e2-b58b-605b58b46e26"

NODES = DomainNodes(
    domid=1,
    uuid=UUID,
    name="pv1",
    memory_kib=262144,
    max_memory_kib=524288,
    vcpus=1,
    max_vcpus=2,
    store_port=1,
    store_mfn=1558529,
    console_port=2,
    console_mfn=1558530,
    owner="agent-7",
    kernel="/guests/vmlinuz",
    ramdisk="/guests/domu.gz",
    cmdline="console=hvc0 earlyprintk=xen",
    console_tty="/dev/pts/1",
    start_time=1795333558.65,
)

# What `xenstore-ls -f -p` shows of a PV guest that `xl create` of Xen 4.17 made, as far as it is not the
# guest's own doing.
AS_LIBXL = """
/local/domain/0/backend/console/1/0 = ""   (n0,r1)
/local/domain/0/backend/console/1/0/frontend = "/local/domain/1/console"   (n0,r1)
/local/domain/0/backend/console/1/0/frontend-id = "1"   (n0,r1)
/local/domain/0/backend/console/1/0/online = "1"   (n0,r1)
/local/domain/0/backend/console/1/0/state = "1"   (n0,r1)
/local/domain/0/backend/console/1/0/protocol = "vt100"   (n0,r1)
/local/domain/1 = ""   (n0,r1)
/local/domain/1/vm = "/vm/46b436ae-d30c-47e2-b58b-605b58b46e26"   (n0,r1)
/local/domain/1/name = "pv1"   (n0,r1)
/local/domain/1/cpu = ""   (n0,r1)
/local/domain/1/cpu/0 = ""   (n0,r1)
/local/domain/1/cpu/0/availability = "online"   (n0,r1)
/local/domain/1/cpu/1 = ""   (n0,r1)
/local/domain/1/cpu/1/availability = "offline"   (n0,r1)
/local/domain/1/memory = ""   (n0,r1)
/local/domain/1/memory/static-max = "524288"   (n0,r1)
/local/domain/1/memory/target = "262144"   (n0,r1)
/local/domain/1/memory/videoram = "0"   (n0,r1)
/local/domain/1/device = ""   (n0,r1)
/local/domain/1/device/suspend = ""   (n0,r1)
/local/domain/1/device/suspend/event-channel = ""   (n1)
/local/domain/1/control = ""   (n0,r1)
/local/domain/1/control/shutdown = ""   (n1)
/local/domain/1/control/feature-poweroff = ""   (n1)
/local/domain/1/control/feature-reboot = ""   (n1)
/local/domain/1/control/feature-suspend = ""   (n1)
/local/domain/1/control/sysrq = ""   (n1)
/local/domain/1/control/platform-feature-multiprocessor-suspend = "1"   (n0,r1)
/local/domain/1/control/platform-feature-xs_reset_watches = "1"   (n0,r1)
/local/domain/1/data = ""   (n1)
/local/domain/1/drivers = ""   (n1)
/local/domain/1/feature = ""   (n1)
/local/domain/1/attr = ""   (n1)
/local/domain/1/error = ""   (n1)
/local/domain/1/domid = "1"   (n0,r1)
/local/domain/1/store = ""   (n0,r1)
/local/domain/1/store/port = "1"   (n0,r1)
/local/domain/1/store/ring-ref = "1558529"   (n0,r1)
/local/domain/1/console = ""   (n0,r1)
/local/domain/1/console/backend = "/local/domain/0/backend/console/1/0"   (n0,r1)
/local/domain/1/console/backend-id = "0"   (n1,r0)
/local/domain/1/console/limit = "1048576"   (n0,r1)
/local/domain/1/console/type = "xenconsoled"   (n0,r1)
/local/domain/1/console/output = "pty"   (n0,r1)
/local/domain/1/console/tty = "/dev/pts/1"   (n0,r1)
/local/domain/1/console/port = "2"   (n0,r1)
/local/domain/1/console/ring-ref = "1558530"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26 = ""   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/name = "pv1"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/uuid = "46b436ae-d30c-47e2-b58b-605b58b46e26"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/image = ""   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/image/ostype = "linux"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/image/kernel = "/guests/vmlinuz"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/image/ramdisk = "/guests/domu.gz"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/image/cmdline = "console=hvc0 earlyprintk=xen"   (n0,r1)
/vm/46b436ae-d30c-47e2-b58b-605b58b46e26/start_time = "1795333558.65"   (n0,r1)
/libxl/1 = ""   (n0)
/libxl/1/device/console/0/frontend = "/local/domain/1/console"   (n0)
/libxl/1/device/console/0/backend = "/local/domain/0/backend/console/1/0"   (n0)
/libxl/1/device/console/0/frontend-id = "1"   (n0)
/libxl/1/device/console/0/online = "1"   (n0)
/libxl/1/device/console/0/state = "1"   (n0)
/libxl/1/device/console/0/protocol = "vt100"   (n0)
/libxl/1/type = "pv"   (n0)
"""


@pytest.fixture
def handle(world) -> Handle:
    return Handle(world.server)


def listing(handle: Handle, path: str = "") -> set[str]:
    lines = set()
    for name in handle.directory(path or "/"):
        below = f"{path}/{name}"
        lines.add(f'{below} = "{handle.read(below)}"   ({handle.perms(below)})')
        lines |= listing(handle, below)
    return lines


def test_read_write_remove(handle) -> None:
    assert handle.read("/a/b") is None and not handle.exists("/a/b")
    handle.write("/a/b", "text")
    handle.mkdir("/a/c")
    assert handle.read("/a/b") == "text"
    assert handle.directory("/a") == ["b", "c"]
    assert handle.directory("/none") == []
    assert handle.perms("/a/b") == "n0"
    handle.set_perms("/a/b", "n0,r5")
    assert handle.perms("/a/b") == "n0,r5"
    handle.remove("/a")
    handle.remove("/a/b/c")
    assert not handle.exists("/a")
    with pytest.raises(errors.Invalid, match="READ //"):
        handle.read("//")


def test_a_long_list_of_children(handle) -> None:
    names = [f"{'n' * 100}{i}" for i in range(200)]
    for name in names:
        handle.write(f"/d/{name}", "")
    assert handle.directory("/d") == names


def test_transactions(handle, world) -> None:
    with handle.transaction():
        handle.write("/a", "1")
        assert world.dom0.ask(Op.READ, b"/a\0") == b"ENOENT"
    assert handle.read("/a") == "1"
    with pytest.raises(ZeroDivisionError), handle.transaction():
        handle.write("/a", str(1 / 0))
    with pytest.raises(errors.Conflict), handle.transaction():
        handle.write("/a", "2")
        world.dom0.ask(Op.WRITE, b"/a\0" + b"3")
    assert handle.read("/a") == "3"


def test_watches(handle, world) -> None:
    seen: list[str] = []
    end = handle.watch("/a", seen.append)
    world.dom0.ask(Op.WRITE, b"/a/b\0v")
    assert seen == ["/a", "/a/b"]
    end()
    end()
    world.dom0.ask(Op.WRITE, b"/a/b\0v")
    assert seen == ["/a", "/a/b"]


def test_a_callback_may_send_requests_itself(handle, world) -> None:
    seen: list[str | None] = []

    def answer(path: str) -> None:
        seen.append(handle.read("/a"))
        if handle.read("/a") == "ping":
            handle.write("/a", "pong")

    handle.watch("/a", answer)
    with handle.transaction():
        handle.write("/a", "ping")
    assert seen == [None, "ping", "pong"]
    assert handle.read("/a") == "pong"


def test_callbacks_can_be_deferred(world) -> None:
    later: list[Callable[[], None]] = []
    seen: list[str] = []
    handle = Handle(world.server, later.append)
    end = handle.watch("/a", seen.append)
    assert seen == []
    end()
    for call in later:
        call()
    assert seen == []  # ended before its turn came


def test_a_closed_handle_hears_nothing(handle, world) -> None:
    seen: list[str] = []
    handle.watch("/a", seen.append)
    handle.close()
    world.dom0.ask(Op.WRITE, b"/a\0v")
    assert seen == ["/a"]


def test_a_watch_of_limited_depth(handle) -> None:
    seen: list[str] = []
    handle.watch("/a", seen.append, depth=1)
    handle.write("/a/b/c", "x")
    handle.write("/a/b", "x")
    assert seen == ["/a", "/a/b"]


def test_a_special_watch(handle, world) -> None:
    seen: list[str] = []
    handle.watch("@introduceDomain", seen.append)
    world.domain(3)
    assert seen == ["@introduceDomain", "@introduceDomain"]


class Slow:
    """A coroutine as callback that is at work until it is told to go on."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, path: str) -> None:
        self.seen.append(path)
        await self.go_on.wait()
        if path == "/a/fails":
            raise ZeroDivisionError


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_coroutine_is_called_again_when_it_is_done(world) -> None:
    async def body() -> None:
        handle = Handle(world.server, asyncio.get_running_loop().call_soon)
        slow = Slow()
        end = handle.watch("/a", slow)
        await settled()
        for path in ("/a/fails", "/a/c", "/a/fails", "/a/c"):
            handle.write(path, "x")
        await settled()
        assert slow.seen == ["/a"]
        slow.go_on.set()
        await settled()
        assert slow.seen == ["/a", "/a/fails", "/a/c"]  # one that failed does not end the watch
        handle.write("/a/d", "x")
        end()
        await settled()
        assert slow.seen[3:] == []

    asyncio.run(body())


def test_what_waits_for_a_coroutine_has_a_bound(world) -> None:
    async def body() -> None:
        handle = Handle(world.server, asyncio.get_running_loop().call_soon)
        slow = Slow()
        handle.watch("/a", slow)
        await settled()
        for number in range(MAX_WAITING + 1):
            handle.write(f"/a/{number}", "x")
        handle.write("/a/last", "x")
        await settled()
        slow.go_on.set()
        await settled()
        assert slow.seen == ["/a", "/a", "/a/last"]

    asyncio.run(body())


def test_a_domain_looks_as_libxl_makes_it(handle) -> None:
    domain_nodes.prepare_host(handle)
    before = listing(handle)
    domain_nodes.lay_out(handle, NODES)
    shown = listing(handle)
    assert set(AS_LIBXL.strip().splitlines()) <= shown
    ours = shown - set(AS_LIBXL.strip().splitlines()) - before
    assert sorted(line.partition(" ")[0] for line in ours) == [
        "/libxl/1/device",
        "/libxl/1/device/console",
        "/libxl/1/device/console/0",
        "/local/domain/0/backend/console",
        "/local/domain/0/backend/console/1",
        "/local/domain/1/reeve",
        "/local/domain/1/reeve/owner",
    ]
    domain_nodes.remove(handle, 1, UUID)
    assert listing(handle) - before == {'/local/domain/0/backend/console = ""   (n0)'}
    domain_nodes.remove(handle, 1, UUID)


def test_the_marker_is_out_of_the_guests_reach(handle, world, make_client) -> None:
    domain_nodes.lay_out(handle, NODES)
    guest = make_client(world.server, 1)
    assert domain_nodes.owner_of(handle, 1) == "agent-7"
    assert domain_nodes.owner_of(handle, 2) is None
    assert guest.ask(Op.READ, b"reeve/owner\0") == b"EACCES"
    assert guest.ask(Op.WRITE, b"reeve/owner\0me") == b"EACCES"
    assert guest.ask(Op.RM, b"reeve\0") == b"EACCES"
    assert guest.ask(Op.RM, b"/local/domain/1\0") == b"EACCES"


def test_shutdown_is_asked_for_heard_and_acknowledged(handle, world, make_client) -> None:
    domain_nodes.lay_out(handle, NODES)
    guest = make_client(world.server, 1)
    guest.ask(Op.WATCH, b"control/shutdown\0tok\0")
    guest.take_events()
    domain_nodes.request_shutdown(handle, 1, "poweroff")
    assert guest.take_events() == [("control/shutdown", "tok")]
    assert guest.ask(Op.READ, b"control/shutdown\0") == b"poweroff"
    assert not domain_nodes.shutdown_acknowledged(handle, 1)
    assert guest.ask(Op.WRITE, b"control/shutdown\0") == b"OK\0"
    assert domain_nodes.shutdown_acknowledged(handle, 1)
    with pytest.raises(errors.NotFound):
        domain_nodes.request_shutdown(handle, 9, "poweroff")


def test_a_domain_that_uses_an_old_number_finds_nothing_old(handle) -> None:
    domain_nodes.lay_out(handle, NODES)
    handle.write("/local/domain/1/data/old", "x")
    domain_nodes.lay_out(handle, NODES)
    assert handle.directory("/local/domain/1/data") == []
