"""Debian's own xenstore-utils, unmodified, against our xenstored through ``XENSTORED_PATH``."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypervisor.xenstore import domain_nodes
from hypervisor.xenstore.domain_nodes import DomainNodes
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.journal import open_server
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.transport_unix import UnixServer
from hypervisor.xenstore.wire import Op, Packet, Parser

DEADLINE = 20.0

TOOLS = ("ls", "read", "write", "rm", "chmod", "watch", "exists", "list")
MISSING = [f"xenstore-{tool}" for tool in TOOLS if shutil.which(f"xenstore-{tool}") is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"Debian's package xenstore-utils is not installed ({', '.join(MISSING)} missing)",
)


@dataclass
class Daemon:
    """xenstored in a thread of its own, as the host process runs it."""

    loop: asyncio.AbstractEventLoop
    server: Server
    handle: Handle
    socket: Path

    def call(self, function: Callable[[Handle], object]) -> object:
        """Run something in the daemon's thread."""

        async def body() -> object:
            return function(self.handle)

        return asyncio.run_coroutine_threadsafe(body(), self.loop).result(DEADLINE)

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "XENSTORED_PATH": str(self.socket)}

    def run(self, tool: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [f"xenstore-{tool}", *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=DEADLINE, check=False)

    def ok(self, tool: str, *args: str) -> str:
        done = self.run(tool, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout


class Silent:
    """The ring of a domain that says nothing."""

    def output_ready(self) -> None: ...

    def resume(self) -> None: ...

    def positions(self) -> tuple[int, int]:
        return 0, 0


def serve(folder: Path) -> Iterator[Daemon]:
    ready: queue.Queue[Daemon | BaseException] = queue.Queue()
    stop = asyncio.Event()

    async def main() -> None:
        server = open_server(folder / "xenstore.state")
        handle = Handle(server, asyncio.get_running_loop().call_soon)
        domain_nodes.prepare_host(handle)
        unix = UnixServer(server, folder / "socket")
        await unix.start()
        ready.put(Daemon(asyncio.get_running_loop(), server, handle, unix.path))
        await stop.wait()
        await unix.stop()

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:
            ready.put(exc)
            raise

    thread = threading.Thread(target=body)
    thread.start()
    daemon = ready.get(timeout=DEADLINE)
    if isinstance(daemon, BaseException):
        raise daemon
    try:
        yield daemon
    finally:
        daemon.loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    yield from serve(tmp_path)


def test_write_read_list_exists_rm(daemon: Daemon) -> None:
    daemon.ok("write", "/test/a", "one", "/test/b/c", "two words")
    assert daemon.ok("read", "/test/a") == "one\n"
    assert daemon.ok("read", "-p", "/test/b/c", "/test/a") == "/test/b/c: two words\n/test/a: one\n"
    assert daemon.ok("list", "/test") == "a\nb\n"
    assert daemon.ok("list", "-p", "/test") == "/test/a\n/test/b\n"
    assert daemon.run("exists", "/test/b/c").returncode == 0
    assert daemon.run("exists", "/test/none").returncode == 1
    daemon.ok("rm", "/test/a")
    daemon.ok("rm", "-t", "/test/b/c")  # tidies the empty parents away
    assert daemon.run("exists", "/test/a").returncode == 1
    assert daemon.run("exists", "/test").returncode == 1
    done = daemon.run("read", "/test/a")
    assert done.returncode == 1 and "couldn't read path /test/a" in done.stderr


def test_bytes_that_are_no_text(daemon: Daemon) -> None:
    daemon.ok("write", "/raw", r"a\x01\n\\b")
    assert daemon.ok("read", "/raw") == r"a\001\n\\b" + "\n"
    assert daemon.ok("read", "-R", "/raw") == "a\x01\n\\b"


def test_relative_paths_are_dom0s(daemon: Daemon) -> None:
    assert daemon.ok("read", "domid", "name") == "0\nDomain-0\n"


def test_permissions(daemon: Daemon) -> None:
    daemon.ok("write", "/p/a/b", "x")
    daemon.ok("chmod", "-r", "/p/a", "n3", "r4", "b5")
    assert daemon.ok("ls", "-f", "-p", "/p") == '/p/a = ""   (n3,r4,b5)\n/p/a/b = "x"   (n3,r4,b5)\n'
    daemon.ok("chmod", "-u", "/p/a/b", "n6")
    assert daemon.ok("ls", "-f", "-p", "/p/a") == '/p/a/b = "x"   (n6)\n'


def test_a_domains_nodes_as_a_person_sees_them(daemon: Daemon) -> None:
    nodes = DomainNodes(1, "46b436ae-d30c-47e2-b58b-605b58b46e26", "pv1", 262144, 524288, 1, 2, 1, 7, 2, 8, owner="us")
    daemon.call(lambda handle: domain_nodes.lay_out(handle, nodes))
    shown = daemon.ok("ls", "-f", "-p").splitlines()
    for line in (
        '/local/domain/1/name = "pv1"   (n0,r1)',
        '/local/domain/1/control/shutdown = ""   (n1)',
        '/local/domain/1/console/backend-id = "0"   (n1,r0)',
        '/local/domain/1/reeve/owner = "us"   (n0)',
    ):
        assert line in shown
    assert '\n name = "pv1"\n' in daemon.ok("ls", "/local/domain")


def test_more_children_than_one_message_holds(daemon: Daemon) -> None:
    def fill(handle: Handle) -> None:
        for number in range(700):
            handle.write(f"/many/child-{number:04d}", str(number))

    daemon.call(fill)
    assert daemon.ok("list", "/many").splitlines() == [f"child-{number:04d}" for number in range(700)]
    assert daemon.ok("ls", "/many").splitlines()[-1] == 'child-0699 = "699"'


def test_watch(daemon: Daemon) -> None:
    command = ["xenstore-watch", "-n", "4", "/w"]
    with subprocess.Popen(command, env=daemon.env, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "/w\n"
            daemon.ok("write", "/w/a", "1")
            assert watcher.stdout.readline() == "/w/a\n"
            daemon.ok("chmod", "/w/a", "n0", "r1")
            assert watcher.stdout.readline() == "/w/a\n"
            daemon.ok("rm", "/w")
            assert watcher.stdout.readline() == "/w\n"
            assert watcher.wait(DEADLINE) == 0
        finally:
            watcher.kill()


def test_special_watches(daemon: Daemon) -> None:
    command = ["xenstore-watch", "-n", "5", "@introduceDomain", "@releaseDomain"]
    with subprocess.Popen(command, env=daemon.env, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            lines = [watcher.stdout.readline() for _ in range(2)]
            assert sorted(lines) == ["@introduceDomain\n", "@releaseDomain\n"]
            daemon.call(lambda handle: daemon.server.introduce(7, Silent()))
            assert watcher.stdout.readline() == "@introduceDomain\n"
            daemon.call(lambda handle: daemon.server.domain_shutdown(7))
            assert watcher.stdout.readline() == "@releaseDomain\n"
            daemon.call(lambda handle: daemon.server.release(7))
            assert watcher.stdout.readline() == "@releaseDomain\n"
            assert watcher.wait(DEADLINE) == 0
        finally:
            watcher.kill()


def control(daemon: Daemon, *words: str) -> str:
    """What ``xenstore-control`` sends; Debian's needs the running Xen to find its own program."""
    request = Packet(Op.CONTROL, 1, 0, b"".join(word.encode() + b"\0" for word in words)).encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(daemon.socket))
        sock.sendall(request)
        parser = Parser()
        while (packet := parser.next()) is None:
            parser.feed(sock.recv(parser.wanted))
        assert packet.payload.endswith(b"\0")
        return packet.payload[:-1].decode()


def test_control(daemon: Daemon) -> None:
    assert [line.split("\t")[0] for line in control(daemon, "help").splitlines()] == [
        *("check", "log", "memreport", "print", "quota", "help")
    ]
    for words in (["check"], ["log", "on"], ["log", "off"], ["memreport"], ["print", "some text"]):
        assert control(daemon, *words) == "OK"
    shown = control(daemon, "quota")
    assert shown.startswith("Quota settings:\nnodes            :     1000 Nodes per domain\n")
    assert control(daemon, "quota", "set", "watches", "64") == "OK"
    assert "watches          :       64 Watches per domain" in control(daemon, "quota").splitlines()
    daemon.call(lambda handle: daemon.server.introduce(7, Silent()))
    assert "watches         :        0" in control(daemon, "quota", "7").splitlines()
    assert control(daemon, "quota", "8") == "ENOENT"
    assert control(daemon, "logfile", "/tmp/x") == "EINVAL"


def test_errors_are_told_in_the_tools_words(daemon: Daemon) -> None:
    done = daemon.run("write", "/a//b", "x")
    assert done.returncode == 1 and "could not write path /a//b" in done.stderr
    done = daemon.run("chmod", "/none", "n0")
    assert done.returncode == 1 and "No such file or directory" in done.stderr
    done = daemon.run("rm", "/none/below")
    assert done.returncode == 1 and "could not remove path /none/below" in done.stderr
    done = daemon.run("list", "/none")
    assert done.returncode == 1


def test_the_host_process_hears_of_a_tools_write(daemon: Daemon) -> None:
    heard: queue.Queue[str] = queue.Queue()
    daemon.call(lambda handle: handle.watch("/from-tool", heard.put))
    assert heard.get(timeout=DEADLINE) == "/from-tool"
    daemon.ok("write", "/from-tool/x", "1")
    assert heard.get(timeout=DEADLINE) == "/from-tool/x"


def test_a_restart_keeps_the_nodes(tmp_path: Path) -> None:
    for daemon in serve(tmp_path):
        daemon.ok("write", "/kept", "value")
        daemon.ok("chmod", "/kept", "n0", "r9")
    for daemon in serve(tmp_path):
        assert daemon.ok("ls", "-f", "-p", "/").splitlines()[-1] == '/kept = "value"   (n0,r9)'
