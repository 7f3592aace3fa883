"""The two sides that are compared: a Reeve node of its own, and QEMU with its TCG engine.

Both give a `Terminal`: what the guest printed, with deadlines, and a way to type.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import QEMU, BenchFailed

from agent import wire
from agent.errors import BrokerError, ReplyTimeout
from agent.images import Image
from agent.rpc.client import Client
from hypervisor.errors import DomainNotFound, HostUnavailable, ToolstackError
from hypervisor.toolstack.api import Console
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

HOST = "bench-node"
START_SECONDS = 60.0
"""For a daemon to answer."""

QEMU_COMMAND_LINE = "console=ttyS0"
_CPUCLOCK_SCHED = 2  # clock_getcpuclockid(3), which Python lacks


class Terminal:
    """A guest's console.

    :param read: bytes that come within so many seconds, b"" when none do; EOFError at the end.
    """

    def __init__(self, label: str, read: Callable[[float], bytes], write: Callable[[bytes], None]) -> None:
        self.label = label
        self.type = write
        self._read = read
        self._seen = b""

    def until(self, pattern: bytes, seconds: float) -> bytes:
        """What came up to the end of the first match of `pattern`, a regular expression; the rest is kept for later.

        :raises BenchFailed: no match in time, or the guest ended.
        """
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._seen)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BenchFailed(f"{self.label}: no {pattern.decode()!r} within {seconds:g} s{self._last()}")
            try:
                self._seen += self._read(left)
            except EOFError:
                raise BenchFailed(f"{self.label} ended before {pattern.decode()!r}{self._last()}") from None
        text, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return text

    def _last(self) -> str:
        lines = [line for line in self._seen.decode(errors="replace").splitlines() if line.strip()]
        return f"; it printed last: {lines[-1][:200]!r}" if lines else "; it printed nothing"


# -- QEMU


class QemuGuest:
    """``qemu-system-x86_64 -accel tcg`` with one processor, from its start on.

    :param devices: further options for QEMU.
    :ivar started: `time.monotonic` before the process was made.
    """

    def __init__(self, image: Image, memory_mib: int, binary: str = QEMU, devices: Sequence[str] = ()) -> None:
        command = [binary, "-accel", "tcg", "-smp", "1", "-m", str(memory_mib), "-nographic", "-no-reboot"]
        command += ["-kernel", image.kernel, "-append", QEMU_COMMAND_LINE]
        command += ["-initrd", image.ramdisk] if image.ramdisk else []
        command += devices
        self.started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
            )
        except OSError as exc:
            raise BenchFailed(f"{binary} cannot be started: {exc.strerror}; install qemu-system-x86") from exc
        self.terminal = Terminal("the guest in QEMU", self._read, self._write)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        if not select.select([fd], [], [], seconds)[0]:
            return b""
        if not (data := os.read(fd, 65536)):
            raise EOFError
        return data

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


# -- Reeve


class ReeveGuest:
    """A domain that the agent made.

    :ivar started: `time.monotonic` before the message was sent.
    :ivar reply: the agent's, with the time of each step.
    """

    def __init__(self, ident: str, started: float, reply: wire.Reply, console: Console) -> None:
        self.uuid = ident
        self.started = started
        self.reply = reply
        self.console = console
        self.terminal = Terminal("the guest in Reeve", lambda seconds: console.read(timeout=seconds), console.write)


class Node:
    """``reeve-hypervisor`` and ``reeve-agent`` in a folder of their own, with a folder as broker.

    Ends both and every domain when it is left, whatever happened.

    :param options: further lines of reeve-hypervisor's configuration.
    """

    def __init__(self, folder: Path, images: Path, timeout: float, options: str = "") -> None:
        self.folder = folder
        self.timeout = timeout
        self.toolstack = EmbeddedToolstack(folder / "hypervisor.sock")
        self._images = images.expanduser().absolute()
        self._options = options
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None
        self._domains: dict[int, int] = {}  # pid -> pidfd

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # what the benchmarks use

    def send_create(self, boot: Mapping[str, str], memory_mib: int) -> tuple[str, str]:
        """Send ``create`` and do not wait: (the instruction's id, the domain's UUID).

        :param boot: the arguments that name the image or the kernel.
        """
        ident = str(uuid.uuid4())
        args = {"uuid": ident, "name": f"bench-{ident[:8]}", "memory_mib": memory_mib, **boot}
        return self.client.send("create", args), ident

    def reply(self, instruction: str) -> wire.Reply:
        """:raises BenchFailed: the instruction failed. :raises ReplyTimeout: no reply in time."""
        reply = self.client.wait(instruction, self.timeout)
        if reply.error is not None:
            raise BenchFailed(f"{reply.verb} failed: {reply.error['code']}: {reply.error['message']}{self._log_hint()}")
        return reply

    def create(self, image: Image, memory_mib: int) -> ReeveGuest:
        """A domain that runs, with its console attached.

        Attached when the reply is there, which is long before a kernel has come to userspace.
        """
        started = time.monotonic()
        instruction, ident = self.send_create({"image": image.name}, memory_mib)
        reply = self.reply(instruction)
        guest = ReeveGuest(ident, started, reply, self.toolstack.open_console(ident))
        if re.search(rb"REEVE-GUEST-READY", self.toolstack.console_log(ident, 1 << 20)):
            raise BenchFailed("the guest was in userspace before its console was attached: nothing can be measured")
        return guest

    def destroy(self, guest: ReeveGuest) -> None:
        """:raises BenchFailed: it failed."""
        guest.console.close()
        self.reply(self.client.send("destroy", {"uuid": guest.uuid}))

    @property
    def client(self) -> Client:
        assert self._client is not None
        return self._client

    def pids(self) -> dict[str, int]:
        """The processes of the node: ``agent``, ``hypervisor`` and ``zygote``."""
        zygotes = children(self._daemons["hypervisor"].pid)
        if len(zygotes) != 1:
            raise BenchFailed(f"the host process has {len(zygotes)} children where its zygote alone should be")
        return {name: process.pid for name, process in self._daemons.items()} | {"zygote": zygotes[0]}

    def processes(self) -> list[int]:
        """The host process and all that it has started, domains and drivers included."""
        return descendants(self._daemons["hypervisor"].pid)

    def meter(self) -> Meter:
        """Of `processes`."""
        return Meter(self.processes)

    def domain_pids(self) -> list[int]:
        """The domain processes: the zygote's children."""
        found = children(self.pids()["zygote"])
        for pid in found:
            if pid not in self._domains:
                self._domains[pid] = os.pidfd_open(pid)
        return found

    # start and end

    def _start(self) -> None:
        hypervisor, agent = self.folder / "hypervisor.conf", self.folder / "agent.conf"
        socket, broker = self.folder / "hypervisor.sock", f"filesystem://{self.folder / 'broker'}"
        hypervisor.write_text(
            f"[hypervisor]\nstate_dir = {self.folder / 'hypervisor'}\nsocket = {socket}\n{self._options}\n"
        )
        agent.write_text(
            f"[agent]\nhost = {HOST}\nstate_dir = {self.folder / 'agent'}\n[broker]\nurl = {broker}\n"
            f"[driver]\nname = embedded\nsocket = {socket}\n[images]\ndir = {self._images}\n"
            "[resources]\nvcpu_ratio = 1000\n"  # how many domains fit is the question, not the configuration's answer
        )
        self._launch("hypervisor", "hypervisor.host.main", hypervisor)
        self._poll("reeve-hypervisor", self._hypervisor_answers)
        self._launch("agent", "agent.service", agent)
        self._client = Client(broker, HOST)
        answer = self.client.send("list")
        self._poll("reeve-agent", lambda: self._agent_answers(answer))

    def _launch(self, name: str, module: str, config: Path) -> None:
        command = [sys.executable, "-m", module, "--config-file", str(config)]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _poll(self, what: str, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise BenchFailed(f"reeve-{name} ended with exit code {process.returncode}{self._log_hint(name)}")
            if time.monotonic() > deadline:
                raise BenchFailed(f"{what} does not answer within {START_SECONDS:g} s{self._log_hint()}")
            time.sleep(0.05)

    def _hypervisor_answers(self) -> bool:
        try:
            self.toolstack.host_info()
        except HostUnavailable:
            return False
        return True

    def _agent_answers(self, instruction: str) -> bool:
        try:
            return self.client.wait(instruction, 0.2).ok
        except ReplyTimeout:
            return False

    def _log_hint(self, name: str = "hypervisor") -> str:
        try:
            lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f"; the log of reeve-{name} ends with {lines[-1][:300]!r}" if lines else ""

    def close(self) -> None:
        """Never raises: what cannot be ended in order is killed."""
        with contextlib.suppress(BenchFailed, OSError):
            self.domain_pids()
        with contextlib.suppress(ToolstackError):
            for domain in self.toolstack.list_domains():
                with contextlib.suppress(DomainNotFound):
                    self.toolstack.destroy(domain.uuid)
        self.toolstack.close()
        if self._client is not None:
            with contextlib.suppress(BrokerError):
                self._client.close()
        for process in reversed(self._daemons.values()):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pidfd in self._domains.values():
            with contextlib.suppress(ProcessLookupError):  # gone, as it should be
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self._domains.clear()


def children(pid: int) -> list[int]:
    """Direct children of a process, in order of their numbers."""

    def found() -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    # After the command's name in parentheses: state, then the parent (proc_pid_stat(5)).
                    if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                        yield int(entry.name)

    return sorted(found())


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(below for child in children(pid) for below in descendants(child))]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, to the nanosecond (clock_getcpuclockid(3)). OSError: it is gone."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


class Meter:
    """CPU time that one side uses: what it costs whatever else the machine has to do.

    :param pids: gives all processes of the side; one that begins or ends meanwhile is not counted.
    """

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self._before: dict[int, float] = {}

    def start(self) -> None:
        self._before = self._look(self._pids())

    def stop(self) -> float:
        """Seconds since `start`."""
        after = self._look(list(self._before))
        return sum(after[pid] - self._before[pid] for pid in after)

    @staticmethod
    def _look(pids: list[int]) -> dict[int, float]:
        found = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                found[pid] = cpu_seconds(pid)
        return found


def describe(node: Node, image: Image | None = None) -> dict[str, Any]:
    """What the guests ran with."""
    info = node.toolstack.host_info()
    about = {"engine": dict(info.detail).get("engine", "unknown"), "reeve": info.driver_version}
    if image is None:
        return about
    kernel = f"sha256:{image.kernel_file.sha256[:16]}"
    return about | {"image": image.name, "kernel": kernel, "packages": dict(image.packages)}
