"""qemu-storage-daemon: what reads and writes qcow2, one for each such disk, in a process of its own.

It is given listening sockets and the image's files as open descriptors, which also hold our locks for as long as it
lives. It opens those again by their number (QEMU 7.2's daemon cannot be sent descriptors) and nothing else: what a
backing file is, is said by us and not by the image. It outlives driver and host process: the next host process finds
it at its control socket.

Each connection gets an export of its own. Before a driver's successor gets one, the exports of the driver before
are ended, which takes until the last write of theirs is done or dropped: a write from before must not come after
one that the guest made since.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from hypervisor.devices.block.image import handshake
from hypervisor.devices.block.image.files import ImageFile
from hypervisor.devices.block.image.handshake import ALLOCATION_DEPTH, Export, HandshakeFailed
from hypervisor.devices.block.image.qmp import Qmp, QmpError
from hypervisor.errors import HostFailure, ImageInvalid
from hypervisor.socket_path import short_path
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

PROGRAM = "qemu-storage-daemon"
QMP_SOCKET, NBD_SOCKET, LOG_NAME = "qmp.sock", "nbd.sock", "daemon.log"
NODE = "disk"
END_TIMEOUT = 10.0
FENCE_TIMEOUT = 60.0
_EVERY = 0.01


class StorageDaemon:
    """:param folder: of this disk, private. :param on_exit: called once when it ends though nobody asked it to."""

    def __init__(self, folder: Path, qmp: Qmp, pidfd: int, on_exit: Callable[[], None]) -> None:
        self._folder = folder
        self._qmp = qmp
        self._pidfd = pidfd
        self._on_exit = on_exit
        self._ended = asyncio.Event()
        self._exports: list[str] = []
        self._views: list[str] = []
        asyncio.get_running_loop().add_reader(pidfd, self._exited)

    @classmethod
    async def start(
        cls, folder: Path, chain: Sequence[ImageFile], *, readonly: bool, direct: bool, on_exit: Callable[[], None]
    ) -> StorageDaemon:
        """:param chain: the image, then its backing files; their descriptors stay the caller's.

        :raises HostFailure: not installed, or it does not start. :raises ImageInvalid: it does not take the image.
        """
        program = find_program()
        pid = _spawn(program, folder, [file.fd for file in chain])
        pidfd = os.pidfd_open(pid)
        try:
            qmp = await Qmp.connect(str(folder), QMP_SOCKET)
        except BaseException as exc:
            await asyncio.shield(asyncio.to_thread(_end, pidfd))
            if isinstance(exc, OSError | QmpError):
                raise HostFailure(f"{program} does not start ({exc}): see {folder / LOG_NAME}") from exc
            raise
        daemon = cls(folder, qmp, pidfd, on_exit)
        try:
            await daemon._open(chain, readonly=readonly, direct=direct)
        except QmpError as exc:
            await daemon.stop()
            raise ImageInvalid(f"image {chain[0].path} cannot be opened: {exc}: try qemu-img check") from exc
        except BaseException:
            await daemon.stop()
            raise
        return daemon

    @classmethod
    async def find(cls, folder: Path, on_exit: Callable[[], None]) -> StorageDaemon | None:
        """The one of a host process before this one, None if it has ended."""
        try:
            qmp = await Qmp.connect(str(folder), QMP_SOCKET)
        except (OSError, QmpError):
            return None
        try:
            # The socket was made by a host process that is gone: the daemon tells its own number by its file.
            pid = int((folder / "pid").read_text())
            pidfd = os.pidfd_open(pid)
            if not PROGRAM.startswith(Path(f"/proc/{pid}/comm").read_text().strip()):
                os.close(pidfd)
                raise ValueError(pid)
        except (OSError, ValueError):
            with contextlib.suppress(QmpError):
                await qmp.command("quit")
            qmp.close()
            return None
        daemon = cls(folder, qmp, pidfd, on_exit)
        try:
            daemon._exports = [str(export["id"]) for export in await qmp.command("query-block-exports")]
            nodes = [node.get("node-name") for node in await qmp.command("query-named-block-nodes")]
        except QmpError:
            nodes = []
        if NODE not in nodes:
            await daemon.stop()
            return None
        return daemon

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def connection(self, *, fence: bool, writable: bool) -> Export:
        """A connection for a driver. :param fence: end all there were before.

        :raises HostFailure: the daemon does not do it.
        """
        try:
            if fence:
                await self._end_exports()
            return await self._export(self._exports, writable=writable)
        except (QmpError, HandshakeFailed, OSError, TimeoutError) as exc:
            raise HostFailure(f"the storage daemon gives no connection ({exc}): see {self._folder / LOG_NAME}") from exc

    async def view(self, *, writable: bool, context: str = "") -> Export:
        """A connection for a mirror of the disk, which a change of drivers does not end.

        :param context: a metadata context of NBD, as in `handshake.connect`. :raises HostFailure: the daemon does not
            do it.
        """
        try:
            return await self._export(self._views, writable=writable, context=context)
        except (QmpError, HandshakeFailed, OSError, TimeoutError) as exc:
            raise HostFailure(f"the storage daemon gives no connection ({exc}): see {self._folder / LOG_NAME}") from exc

    async def size(self) -> int:
        """Of the disk, bytes. :raises HostFailure."""
        try:
            for node in await self._qmp.command("query-named-block-nodes", {"flat": True}):
                if node.get("node-name") == NODE:
                    return int(node["image"]["virtual-size"])
        except QmpError as exc:
            raise HostFailure(f"the storage daemon does not answer ({exc}): see {self._folder / LOG_NAME}") from exc
        raise HostFailure(f"the storage daemon has no disk: see {self._folder / LOG_NAME}")

    async def resize(self, size: int) -> None:
        """Ends all connections: an export does not bear a change of its size. The driver waits for the next one and
        does again what had no answer.

        :param size: bytes. :raises HostFailure: it cannot.
        """
        try:
            self._exports, self._views = self._exports + self._views, []
            await self._end_exports()
            await self._qmp.command("block_resize", {"node-name": NODE, "size": size})
        except (QmpError, TimeoutError) as exc:
            raise HostFailure(f"the image cannot be made larger: {exc}") from exc

    async def stop(self) -> None:
        """End it in order: it writes what it holds. Killed if that takes too long."""
        if self._pidfd < 0:
            return
        self._on_exit = lambda: None
        with contextlib.suppress(QmpError):
            await self._qmp.command("quit")
        try:
            await within(self._ended.wait(), END_TIMEOUT)
        except TimeoutError:
            LOG.warning("storage daemon of %s does not end, and is killed", self._folder)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await within(self._ended.wait(), END_TIMEOUT)

    def kill(self) -> None:
        """It is of no use any more; `on_exit` is called."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _open(self, chain: Sequence[ImageFile], *, readonly: bool, direct: bool) -> None:
        below: str | None = None
        for number in range(len(chain) - 1, -1, -1):
            file, top = chain[number], number == 0
            common = {"read-only": readonly or not top, "discard": "unmap", "cache": {"direct": direct and top}}
            protocol = {
                "driver": "host_device" if file.block_device else "file",
                "filename": f"/proc/self/fd/{file.fd}",
                "node-name": f"file{number}",
                # Ours are there already, and would be others' to it.
                "locking": "off",
                **common,
            }
            await self._qmp.command("blockdev-add", protocol)
            name = NODE if top else f"image{number}"
            image = {"driver": file.format, "node-name": name, "file": f"file{number}", **common}
            if file.format == "qcow2":
                image["backing"] = below
            await self._qmp.command("blockdev-add", image)
            below = name

    async def _export(self, exports: list[str], *, writable: bool, context: str = "") -> Export:
        # No name is used twice: nobody is to reach an export that was made for another.
        name = f"e{secrets.token_hex(8)}"
        arguments = {"type": "nbd", "id": name, "name": name, "node-name": NODE, "writable": writable}
        if context == ALLOCATION_DEPTH:
            arguments["allocation-depth"] = True
        await self._qmp.command("block-export-add", arguments)
        exports.append(name)
        async with asyncio.timeout(END_TIMEOUT):
            return await handshake.connect(str(self._folder), NBD_SOCKET, name, context)

    async def _end_exports(self) -> None:
        for name in self._exports:
            # Refused if it has gone with its client already.
            with contextlib.suppress(QmpError):
                await self._qmp.command("block-export-del", {"id": name, "mode": "hard"})
        async with asyncio.timeout(FENCE_TIMEOUT):
            while any(found["id"] in self._exports for found in await self._qmp.command("query-block-exports")):
                await asyncio.sleep(_EVERY)
        self._exports = []

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        _reap(self._pidfd)
        self._ended.set()
        self._qmp.close()
        os.close(self._pidfd)
        self._pidfd = -1
        self._on_exit()


def find_program() -> str:
    """:raises HostFailure: it is not installed."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise HostFailure(f"{PROGRAM} is not installed, and qcow2 needs it: apt-get install qemu-system-common")
    return program


def _spawn(program: str, folder: Path, images: Sequence[int]) -> int:
    """Its pid; it gets its two sockets, listening already, the images, and nothing else."""
    fds: list[int] = []
    try:
        for name in (QMP_SOCKET, NBD_SOCKET):
            fds.append(_listen(folder, name))
        command = [*_confinement(), program]
        command += ["--chardev", f"socket,id=qmp,fd={fds[0]},server=on,wait=off", "--monitor", "chardev=qmp"]
        command += ["--nbd-server", f"addr.type=fd,addr.str={fds[1]}"]
        with (folder / LOG_NAME).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[*fds, *images],
                cwd="/",
                env={"LC_ALL": "C"},
                start_new_session=True,
            )
    except OSError as exc:
        raise HostFailure(f"{program} cannot be started: {exc.strerror}") from exc
    finally:
        for fd in fds:
            os.close(fd)
    (folder / "pid").write_text(str(process.pid))
    # Reaped by its pidfd; Popen must not warn of that.
    process.returncode = 0
    return process.pid


def _listen(folder: Path, name: str) -> int:
    (folder / name).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with short_path(folder / name) as address:
            sock.bind(address)
        os.chmod(folder / name, 0o600)
        sock.listen(4)
        return sock.detach()


def _confinement() -> list[str]:
    """No capabilities and no new ones, by util-linux (which every Debian has)."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return []
    command = [setpriv, "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all"]
    return [*command, "--bounding-set=-all", "--"] if os.geteuid() == 0 else [*command, "--"]


def _end(pidfd: int) -> None:
    """Kill it and wait for it; `pidfd` is closed."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except (ProcessLookupError, ChildProcessError):
        pass
    finally:
        os.close(pidfd)


def _reap(pidfd: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
