"""Images in the host process: what may be opened, who has it, and what a daemon is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hypervisor.devices.block import disk as disks
from hypervisor.devices.block.backend import BlockBackend
from hypervisor.devices.block.image import daemon as daemons
from hypervisor.devices.block.image import overlay
from hypervisor.devices.block.image.base import Action, ImageGone, Operation
from hypervisor.devices.block.image.files import Opener
from hypervisor.devices.block.image.locks import Use, acquire
from hypervisor.devices.block.image.nbd import NbdImage
from hypervisor.devices.block.image.nbd_status import NbdStatus
from hypervisor.devices.block.image.qmp import Qmp
from hypervisor.devices.block.image.raw import RawImage
from hypervisor.errors import HostFailure, ImageInUse, ImageInvalid, SpecInvalid, Unsupported, WrongState
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, Limits

MIB = 1 << 20
HAS_QEMU = all(shutil.which(name) for name in ("qemu-img", "qemu-storage-daemon"))
needs_qemu = pytest.mark.skipif(not HAS_QEMU, reason="qemu-utils and qemu-system-common are not installed")


@dataclasses.dataclass
class Settings:
    state_dir: Path
    image_folders: tuple[str, ...] = ()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state folder with its folder of images."""
    (tmp_path / "state" / "images").mkdir(parents=True)
    return tmp_path / "state"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def image(home: Path, name: str = "a.img", size: int = MIB) -> Path:
    path = home / "images" / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def qcow2(path: Path, backing: str = "", backing_format: str = "", **changes: bytes) -> Path:
    """A header as qemu-img writes it, and nothing else. :param changes: ``at72=b"..."`` overwrites bytes."""
    head = bytearray(4096)
    struct.pack_into(">4sIQIIQI", head, 0, b"QFI\xfb", 3, 0, 0, 16, MIB, 0)
    struct.pack_into(">QQQII", head, 72, 0, 0, 0, 4, 104)
    at = 104
    if backing_format:
        struct.pack_into(">II", head, at, 0xE2792ACA, len(backing_format))
        head[at + 8 : at + 8 + len(backing_format)] = backing_format.encode()
        at += 8 + -(-len(backing_format) // 8) * 8
    at += 8
    if backing:
        struct.pack_into(">QI", head, 8, at, len(backing))
        head[at : at + len(backing)] = backing.encode()
    for where, data in changes.items():
        head[int(where[2:]) : int(where[2:]) + len(data)] = data
    path.write_bytes(head)
    return path


# -- which files


def opened(home: Path, path: Path, kind: str = "raw", **options: bool) -> list[Any]:
    files = Opener([home / "images"]).chain(
        str(path), kind, **{"readonly": False, "shared": False, "direct": False, **options}
    )
    for file in files:
        os.close(file.fd)
    return files


BAD_HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"at0": b"XXXX"}, "no qcow2 image"),
    ({"at4": struct.pack(">I", 4)}, "version 4"),
    ({"at32": struct.pack(">I", 1)}, "encrypted"),
    ({"at24": bytes(8)}, "empty disk"),
    ({"at72": struct.pack(">Q", 2)}, "corrupt"),
    ({"at72": struct.pack(">Q", 4)}, "another file"),
    ({"at72": struct.pack(">Q", 1 << 40)}, "newer QEMU"),
    ({"at8": struct.pack(">QI", 1 << 60, 10)}, "damaged"),
    ({"at8": struct.pack(">QI", 112, 0xFFFFFFFF)}, "damaged"),
    ({"backing": "base.img"}, "format of the backing file"),
    ({"backing": "base.img", "backing_format": "vmdk"}, "'vmdk'"),
    ({"backing": "nbd://host/x", "backing_format": "raw"}, "no file of this host"),
    ({"backing": 'json:{"driver":"nbd"}', "backing_format": "raw"}, "no file of this host"),
    ({"backing": "/etc/passwd", "backing_format": "raw"}, "outside of the allowed folders"),
    ({"backing": "../../secret", "backing_format": "raw"}, "outside of the allowed folders"),
    ({"backing": "gone.img", "backing_format": "raw"}, "cannot be opened"),
    ({"backing": "bad.qcow2", "backing_format": "qcow2"}, "in use|its own backing file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_HEADERS, ids=[message for _, message in BAD_HEADERS])
def test_bad_qcow2_headers_are_refused(home: Path, changes: dict[str, Any], message: str) -> None:
    (home.parent / "secret").write_bytes(bytes(MIB))
    path = qcow2(home / "images" / "bad.qcow2", **changes)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((ImageInvalid, ImageInUse), match=message):
        opened(home, path, "qcow2")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_loops_end(home: Path) -> None:
    for number in range(3):
        qcow2(home / "images" / f"{number}.qcow2", f"{(number + 1) % 3}.qcow2", "qcow2")
    with pytest.raises(ImageInvalid, match="its own backing file"):
        opened(home, home / "images" / "0.qcow2", "qcow2", readonly=True)


def test_long_chains_end(home: Path) -> None:
    for number in range(30):
        qcow2(home / "images" / f"{number}.qcow2", f"{number + 1}.qcow2", "qcow2")
    with pytest.raises(ImageInvalid, match="more than 16"):
        opened(home, home / "images" / "0.qcow2", "qcow2")


def test_a_chain_is_walked(home: Path) -> None:
    image(home, "base.img")
    qcow2(home / "images" / "middle.qcow2", "base.img", "raw")
    top = qcow2(home / "images" / "top.qcow2", str(home / "images" / "middle.qcow2"), "qcow2")
    files = opened(home, top, "qcow2")
    assert [(Path(file.path).name, file.format) for file in files] == [
        ("top.qcow2", "qcow2"),
        ("middle.qcow2", "qcow2"),
        ("base.img", "raw"),
    ]


def test_raw_is_never_probed(home: Path) -> None:
    path = qcow2(home / "images" / "guest-made.img", "/etc/passwd", "raw")
    (file,) = opened(home, path, "raw")
    assert file.header is None and file.size == 4096


# -- who uses it

USES = {
    "writer": Use.WRITER,
    "reader": Use.READER,
    "shared writer": Use.SHARED_WRITER,
    "shared reader": Use.SHARED_READER,
}
TOGETHER = {
    ("reader", "reader"),
    ("reader", "shared reader"),
    ("shared reader", "shared reader"),
    ("shared writer", "shared writer"),
    ("shared writer", "shared reader"),
}


@pytest.mark.parametrize("first", USES)
@pytest.mark.parametrize("second", USES)
def test_who_may_use_an_image_together(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    fds = [os.open(path, os.O_RDWR) for _ in range(2)]
    duplicate = os.dup(fds[0])
    try:
        assert acquire(fds[0], USES[first])
        os.close(fds[0])  # a driver that outlives the host process holds it on
        expected = (first, second) in TOGETHER or (second, first) in TOGETHER
        assert acquire(fds[1], USES[second]) is expected
    finally:
        os.close(duplicate)
        os.close(fds[1])


@needs_qemu
def test_qemu_respects_the_lock(home: Path) -> None:
    path = image(home)
    fd = os.open(path, os.O_RDWR)
    assert acquire(fd, Use.WRITER)
    command = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    os.close(fd)
    assert done.returncode and "lock" in done.stderr


# -- raw


def test_raw_end_of_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"a" * 4096)
    raw = RawImage(os.open(path, os.O_RDWR))
    buffer = memoryview(bytearray(8192))
    beyond = Operation(Action.READ, 0, 8192, [buffer])
    fine = Operation(Action.READ, 0, 4096, [buffer[:4096]])
    raw.run([beyond, fine])
    assert beyond.error == 5 and fine.error == 0
    raw.close()


def test_direct_raw_takes_what_is_not_aligned(home: Path) -> None:
    path = image(home)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    raw = RawImage(fd, direct=True)
    odd = memoryview(bytearray(b"odd" * 200))[3:515]
    write = Operation(Action.WRITE, 512, 512, [odd])
    back = memoryview(bytearray(600))[5:517]
    read = Operation(Action.READ, 512, 512, [back])
    raw.run([write, Operation(Action.FLUSH), read])
    raw.close()
    assert (write.error, read.error) == (0, 0) and back == odd == path.read_bytes()[512:1024]


# -- the back end


def closing(backend: BlockBackend) -> Coroutine[Any, Any, Any]:
    return asyncio.wait(list(backend._closing.values()))


def test_raw_disk_nodes_and_growth(home: Path) -> None:
    async def work() -> None:
        backend = BlockBackend(Settings(home))
        disk = DiskSpec("xvdb", str(image(home)), limits=Limits(iops=5))
        made = await backend.open("d1", 3, disk)
        assert made.connected["sectors"] == "2048" and made.nodes["feature-flush-cache"] == "1"
        assert made.frontend["virtual-device"] == "51728" and made.config["limits"]["iops"] == 5
        fds = made.fds()
        assert len(fds) == 2
        for fd in fds:
            os.close(fd)
        nodes = await backend.resize(made, disk, 2 * MIB)
        assert nodes["sectors"] == "4096" and made.size_bytes == 2 * MIB and made.config["sectors"] == 4096
        for size, error in ((MIB, WrongState), (2 * MIB + 1, SpecInvalid), (0, SpecInvalid), (1 << 60, SpecInvalid)):
            with pytest.raises(error):
                await backend.resize(made, disk, size)
        with pytest.raises(Unsupported):
            await backend.resize(made, dataclasses.replace(disk, readonly=True), 4 * MIB)
        with pytest.raises(ImageInUse, match="d1"):
            await backend.open("d2", 4, disk)
        made.close()
        await closing(backend)
        again = await backend.open("d2", 4, disk)
        again.close()
        await closing(backend)
        assert not list((home / "disks").iterdir())

    run(work())


@needs_qemu
def test_qcow2_disk_end_to_end(home: Path) -> None:
    """Daemon, handshake, NBD, growth, the daemon's death, and the next host process."""

    async def work() -> None:
        backend = BlockBackend(Settings(home))
        base = image(home, "base.img")
        base.write_bytes(b"base" * (MIB // 4))
        path = home / "images" / "a.qcow2"
        overlay.create(path, base, "raw")
        disk = DiskSpec("xvda", str(path), DiskFormat.QCOW2)
        made = await backend.open("d1", 3, disk)
        driver = Driver(made.fds())
        nbd = await driver.image()
        written = memoryview(bytearray(b"n" * 8192))
        operations = [Operation(Action.WRITE, 8192 * n, 8192, [written[:4096], written[4096:]]) for n in range(40)]
        operations += [Operation(Action.FLUSH), Operation(Action.DISCARD, 0, 65536)]
        back = memoryview(bytearray(MIB))
        nbd.run(operations)
        assert [operation.error for operation in operations] == [0] * 42
        read = Operation(Action.READ, 0, MIB, [back[:1000], back[1000:]])
        beyond = Operation(Action.READ, MIB, 4096, [memoryview(bytearray(4096))])
        nbd.run([read, beyond])
        assert (read.error, beyond.error != 0) == (0, True)
        assert bytes(back[65536 : 40 * 8192]) == b"n" * (40 * 8192 - 65536)
        assert bytes(back[40 * 8192 :]) == (b"base" * (MIB // 4))[40 * 8192 :]

        await backend.resize(made, disk, 2 * MIB)
        with pytest.raises(ImageGone):
            nbd.run([read])
        nbd = await driver.image()
        nbd.run([beyond := Operation(Action.READ, MIB, 4096, [memoryview(bytearray(4096))])])
        assert beyond.error == 0

        (pid,) = (int(path.read_text()) for path in (home / "disks").glob("*/pid"))
        os.kill(pid, 9)
        nbd = await driver.image()
        nbd.run([read])
        assert read.error == 0

        # The next host process finds the daemon; nobody else gets the image meanwhile.
        other = BlockBackend(Settings(home))
        (home / "domains" / "d1").mkdir(parents=True)
        (pid,) = (int(path.read_text()) for path in (home / "disks").glob("*/pid"))
        hold = backend._holds.popitem()[1]
        hold._closed = True  # type: ignore[attr-defined]
        hold._daemon._qmp.close()  # type: ignore[attr-defined]
        hold._close_chain()  # type: ignore[attr-defined]
        with pytest.raises(ImageInUse):
            await other.open("d2", 4, DiskSpec("xvda", str(base)))
        found = await other.open("d1", 3, disk)
        assert found.size_bytes == 2 * MIB
        assert [int(path.read_text()) for path in (home / "disks").glob("*/pid")] == [pid]
        second = Driver(found.fds())
        nbd.close()
        nbd = await second.image()
        nbd.run([read])
        assert read.error == 0 and bytes(back[40 * 8192 :]) == (b"base" * (MIB // 4))[40 * 8192 :]
        found.close()
        await closing(other)
        assert base.read_bytes() == b"base" * (MIB // 4)
        assert not list((home / "disks").iterdir())

    run(work())


class Driver:
    """The driver's end of what `fds` gave."""

    def __init__(self, fds: list[int]) -> None:
        self.control = socket.socket(fileno=fds[0])
        self.control.setblocking(False)
        for fd in fds[1:]:
            os.close(fd)

    async def image(self) -> NbdImage:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.control.fileno(), lambda: ready.done() or ready.set_result(None))
        await asyncio.wait_for(ready, 10)
        loop.remove_reader(self.control.fileno())
        _, fds, _, _ = socket.recv_fds(self.control, 4096, 1)
        return NbdImage(fds[0], flags=0x24 | 1)


@needs_qemu
def test_daemons_that_are_killed_while_they_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the commands that make one ready. Each has one successor: two would write to the image both."""
    pids: list[int] = []
    commands: dict[Qmp, int] = {}
    command = Qmp.command

    def kill() -> None:
        (pid,) = (int(path.read_text()) for path in (home / "disks").glob("*/pid"))
        if pid not in pids:
            os.kill(pid, 9)
            pids.append(pid)

    async def deadly(self: Qmp, *args: Any, **kw: Any) -> Any:
        commands[self] = number = commands.get(self, 0) + 1
        if number == len(pids) < 7:
            kill()
        return await command(self, *args, **kw)

    async def work() -> None:
        backend = BlockBackend(Settings(home))
        path = home / "images" / "a.qcow2"
        overlay.create(path, image(home), "raw")
        made = await backend.open("d1", 3, DiskSpec("xvda", str(path), DiskFormat.QCOW2))
        driver = Driver(made.fds())
        await driver.image()
        monkeypatch.setattr(Qmp, "command", deadly)
        monkeypatch.setattr(disks, "RESTART_MOST", 0.2)
        kill()
        read = Operation(Action.READ, 0, 4096, [memoryview(bytearray(4096))])
        done = False
        while not done:
            nbd = await driver.image()  # perhaps of one that was killed right afterwards
            with contextlib.suppress(ImageGone):
                nbd.run([read])
                done = True
            nbd.close()
        assert read.error == 0 and len(set(pids)) == 7
        made.close()
        await closing(backend)
        assert not children()

    run(work())


def children() -> list[str]:
    """Storage daemons of this process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            if "qemu-storage" in name and int(rest.split()[1]) == os.getpid():
                found.append(name)
    return found


@needs_qemu
def test_daemon_of_a_domain_that_went_is_ended(home: Path) -> None:
    async def work() -> None:
        path = home / "images" / "a.qcow2"
        overlay.create(path, image(home), "raw")
        disk = DiskSpec("xvda", str(path), DiskFormat.QCOW2)
        first = BlockBackend(Settings(home))
        await first.open("d1", 3, disk)
        hold = first._holds.popitem()[1]
        hold._closed = True  # type: ignore[attr-defined]
        hold._daemon._qmp.close()  # type: ignore[attr-defined]
        hold._close_chain()  # type: ignore[attr-defined]
        second = BlockBackend(Settings(home))
        made = await second.open("d2", 4, disk)
        made.close()
        await closing(second)
        assert not list((home / "disks").iterdir())

    run(work())


def test_what_is_missing_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    path = qcow2(home / "images" / "a.qcow2")
    backend = BlockBackend(Settings(home))
    with pytest.raises(HostFailure, match="apt-get install qemu-system-common"):
        run(backend.open("d1", 3, DiskSpec("xvda", str(path), DiskFormat.QCOW2)))
    with pytest.raises(HostFailure, match="apt-get install qemu-utils"):
        overlay.create(home / "images" / "b.qcow2", path, "qcow2")
    raw = image(home)

    async def work() -> None:
        made = await backend.open("d1", 3, DiskSpec("xvdb", str(raw)))
        made.close()
        await closing(backend)

    run(work())
    assert not list((home / "disks").iterdir())


@needs_qemu
@pytest.mark.parametrize("moment", ["qmp.Qmp.command", "daemon.StorageDaemon._open", "daemon.StorageDaemon.size"])
def test_an_opening_that_is_cut_off_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    pids: list[int] = []
    started = daemons._spawn
    monkeypatch.setattr(daemons, "_spawn", lambda *args: pids.append(started(*args)) or pids[-1])

    async def work() -> None:
        reached = asyncio.Event()

        async def never(*_: object, **__: object) -> None:
            reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(f"hypervisor.devices.block.image.{moment}", never)
        path = home / "images" / "a.qcow2"
        overlay.create(path, image(home), "raw")
        opening = asyncio.get_running_loop().create_task(
            BlockBackend(Settings(home)).open("d1", 3, DiskSpec("xvda", str(path), DiskFormat.QCOW2))
        )
        await asyncio.wait_for(reached.wait(), 20)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert not Path(f"/proc/{pids[0]}").exists()
        assert not list((home / "disks").iterdir())

    run(work())


# -- NBD, with a server that does its worst


def server(answer: Callable[[socket.socket], None]) -> NbdImage:
    ours, theirs = socket.socketpair()
    answer(theirs)
    return NbdImage(ours.detach(), flags=0x25)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 16,
        struct.pack(">IIQ", 0x67446698, 0, 99),
        struct.pack(">IIQ", 0x67446698, 108, 1),
        struct.pack(">IIQ", 0x67446698, 0, 1) + b"short",
    ],
)
def test_nbd_server_that_makes_no_sense_is_gone(data: bytes) -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.detach()

    nbd = server(answer)
    with pytest.raises(ImageGone):
        nbd.run([Operation(Action.READ, 0, 4096, [memoryview(bytearray(4096))])])
    nbd.close()


@pytest.mark.parametrize(("told", "error"), [(28, 28), (5, 5), (4711, 5)])
def test_nbd_errors(told: int, error: int) -> None:
    kept = []

    def answer(sock: socket.socket) -> None:
        kept.append(sock)
        sock.sendall(struct.pack(">IIQ", 0x67446698, told, 1))

    nbd = server(answer)
    operation = Operation(Action.WRITE, 0, 4096, [memoryview(bytearray(4096))])
    nbd.run([operation])
    assert operation.error == error
    nbd.close()
    kept[0].close()


# -- what lies where, with a server that does its worst


def chunk(body: bytes, *, kind: int = 5, done: int = 1, magic: int = 0x668E33EF, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQI", magic, done, kind, cookie, len(body)) + body


def extents(*found: tuple[int, int], context: int = 7) -> bytes:
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *one) for one in found)


def told(data: bytes, length: int) -> list[tuple[int, int, int]]:
    ours, theirs = socket.socketpair()
    sender = threading.Thread(target=lambda: (theirs.sendall(data), theirs.shutdown(socket.SHUT_WR)))
    sender.start()
    status = NbdStatus(ours.detach(), 7)
    try:
        return list(status.extents(0, length))
    finally:
        status.close()
        sender.join()
        theirs.close()


def test_what_lies_where() -> None:
    foreign = chunk(extents((1, 1), context=8), done=0)
    assert told(foreign + chunk(extents((4096, 0), (8192, 3))), 12288) == [(0, 4096, 0), (4096, 8192, 3)]
    # A server may say more than was asked, and less.
    assert told(chunk(extents((4096, 0), (8192, 3))), 6000) == [(0, 4096, 0), (4096, 1904, 3)]
    twice = chunk(extents((4096, 0))) + chunk(extents((4096, 1)), cookie=2)
    assert told(twice, 8192) == [(0, 4096, 0), (4096, 4096, 1)]
    most = (1 << 20) // 8
    assert len(told(chunk(extents(*[(512, 0)] * most)), most * 512)) == most


@pytest.mark.parametrize(
    "data",
    [
        b"",
        chunk(extents((4096, 0)), magic=1),
        chunk(extents((4096, 0)), cookie=2),
        chunk(extents((4096, 0)))[:-1],
        chunk(extents((0, 0))),
        chunk(extents()),
        chunk(extents((4096, 0), context=8)),
        chunk(extents((4096, 0)) + b"x"),
        chunk(struct.pack(">IH", 22, 0), kind=1 << 15 | 1),
        struct.pack(">IHHQI", 0x668E33EF, 1, 5, 1, 1 << 31),
    ],
)
def test_a_server_that_does_not_tell_what_lies_where_is_gone(data: bytes) -> None:
    with pytest.raises(ImageGone):
        told(data, 4096)
