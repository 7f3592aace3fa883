"""The demonstration that `make demo` runs: an instruction over the message queue boots Debian's own kernel.

Makes the guest image unless it is there, starts ``reeve-hypervisor`` and ``reeve-agent`` with a private state
folder and a folder as message broker, sends ``create``, shows the guest's console live until its shell answers a
typed command, sends ``shutdown``, and tells what happened, step by step. It leaves nothing behind but the image,
whatever happens. Exit code 0: all of it worked; 1: something did not, with the ends of the logs; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
NAME = "demo"
READY = b"REEVE-GUEST-READY"  # what the image's init prints when userspace runs
TYPED, ANSWER = b"echo demo-$((40+2))\r", b"\r\ndemo-42\r\n"
PROMPT = b"# "
MARK = "REEVE_DEMO"  # environment variable that tells our processes from others
TAIL_LINES = 25


class DemoFailed(Exception):
    """A step did not do what it should; the text says which and why."""


@dataclasses.dataclass(slots=True)
class Timeline:
    """What was done and how long it took, for the table at the end."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    rows: list[tuple[str, float, str]] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        say(f"{what} ...")
        start = time.monotonic()
        yield
        self.add(what, time.monotonic() - start)

    def add(self, what: str, seconds: float, kind: str = "") -> None:
        self.rows.append((what, seconds, kind))

    def show(self) -> None:
        say("what happened:")
        for what, seconds, kind in self.rows:
            indent = "    " if kind else ""
            sys.stdout.write(f"   {seconds:9.3f} s   {indent}{what}\n")
        sys.stdout.write(f"   {time.monotonic() - self.began:9.3f} s   in all\n")


def say(text: str) -> None:
    sys.stdout.write(f"\n== {text}\n")
    sys.stdout.flush()


def wait_until(what: str, seconds: float, ready: Callable[[], bool]) -> None:
    """Poll `ready` until it is true. :raises DemoFailed: it was not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


class Daemon:
    """A process of the node, with its log in a file."""

    def __init__(self, name: str, argv: list[str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(BIN / name), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, MARK: str(folder)},
                start_new_session=True,
            )

    def check(self) -> None:
        """:raises DemoFailed: it has ended."""
        if (code := self.process.poll()) is not None:
            raise DemoFailed(f"{self.name} ended by itself with exit code {code}")

    def stop(self, seconds: float = 20.0) -> None:
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(seconds)
            raise DemoFailed(f"{self.name} did not end within {seconds:g} s of SIGTERM and was killed") from None


class ConsoleView:
    """`reeve domain console` on a pseudo-terminal; what it shows is shown here, too."""

    def __init__(self, argv: list[str]) -> None:
        self.seen = b""
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def until(self, wanted: bytes, seconds: float, after: int = 0) -> int:
        """Show what comes until it holds `wanted` beyond position `after`; returns where that ends."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(wanted, after)) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DemoFailed(f"the console did not show {wanted.decode()!r} within {seconds:g} s")
            if select.select([self._master], [], [], min(left, 0.5))[0]:
                self._show(wanted)
        return found + len(wanted)

    def _show(self, wanted: bytes) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the command ended
            data = b""
        if not data:
            raise DemoFailed(f"the console ended before it showed {wanted.decode()!r}")
        self.seen += data
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def type(self, data: bytes) -> None:
        os.write(self._master, data)

    def leave(self) -> None:
        self.type(b"\x1d")
        self._process.wait(10)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5)
        os.close(self._master)


class Demo:
    """One run.

    :ivar folder: private; everything is in it but the image.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.images = Path(options.images_dir).expanduser().absolute()
        self.timeline = Timeline()
        self.daemons: list[Daemon] = []
        self.config = folder / "agent.conf"

    # the steps

    def run(self) -> None:
        with self.timeline.step("guest image"):
            self.make_image()
        with self.timeline.step("start the node: reeve-hypervisor and reeve-agent"):
            self.start_node()
        say("send `create` over the queue")
        wanted = [f"name={NAME}", f"memory_mib={self.options.memory}", "on_crash=destroy", *self.guest_args()]
        reply = self.instruct("create", *wanted)
        domain = reply["result"]["domain"]
        self.watch_console(reply["accepted"])
        say("reeve domain list")
        sys.stdout.write(self.reeve("domain", "list"))
        say("send `shutdown` over the queue")
        self.instruct("shutdown", f"uuid={domain['uuid']}")
        with self.timeline.step("the domain is gone and the host's memory is free again"):
            self.check_empty()

    def make_image(self) -> None:
        where = ("--images-dir", str(self.images))
        found = subprocess.run([str(BIN / "reeve"), "image", "verify", NAME, *where], capture_output=True, check=False)
        if found.returncode == 0:
            sys.stdout.write(f"cached in {self.images / NAME}\n")
            return
        sys.stdout.flush()
        self.reeve("image", "build", NAME, "--replace", *where, seconds=600, quiet=False)

    def start_node(self) -> None:
        state = self.folder / "agent"
        broker = self.folder / "broker"
        driver = f"name = {self.options.driver}\n"
        if self.options.driver == "embedded":
            socket = self.folder / "hypervisor.sock"
            driver += f"socket = {socket}\n"
            hypervisor = self.folder / "hypervisor.conf"
            hypervisor.write_text(f"[hypervisor]\nstate_dir = {self.folder / 'hypervisor'}\nsocket = {socket}\n")
            self.daemons.append(Daemon("reeve-hypervisor", ["--config-file", str(hypervisor)], self.folder))
            self.wait_for("reeve-hypervisor to answer", socket.exists)
        else:
            driver += f"settings = state_dir:{self.folder / 'host'}\n"
        self.config.write_text(
            f"[agent]\nhost = demo-node\nstate_dir = {state}\n[broker]\nurl = filesystem://{broker}\n"
            f"[driver]\n{driver}[images]\ndir = {self.images}\n"
        )
        self.free_mib = json.loads(self.reeve("node", "show", "-f", "json"))["memory_free_mib"]
        self.daemons.append(Daemon("reeve-agent", ["--config-file", str(self.config)], self.folder))
        self.reeve("instruct", "list", "--timeout", "30")

    def guest_args(self) -> list[str]:
        if self.options.driver == "embedded":
            return [f"image={NAME}"]
        return [f"image={NAME}", f"cmdline=fake.print={READY.decode()}"]  # its guest runs no code

    def watch_console(self, accepted: float) -> None:
        """Show the console until the shell answers; `accepted` is when the agent had the message, epoch seconds."""
        say("the guest's console")
        console = ConsoleView(self.command("domain", "console", NAME, "--replay", "1000000"))
        try:
            seconds = self.options.boot_timeout
            at = console.until(READY, seconds)
            self.timeline.add("from the create message to userspace", time.time() - accepted)
            at = console.until(PROMPT, seconds, at)
            typed = time.monotonic()
            console.type(TYPED)
            console.until(ANSWER, seconds, at)
            self.timeline.add("the shell answers a typed command", time.monotonic() - typed)
            console.leave()
        finally:
            console.close()

    def check_empty(self) -> None:
        def empty() -> bool:
            return bool(json.loads(self.reeve("domain", "list", "-f", "json")) == [])

        self.wait_for("the list of domains to be empty", empty)
        free = json.loads(self.reeve("node", "show", "-f", "json"))["memory_free_mib"]
        if free != self.free_mib:
            raise DemoFailed(f"the host has {free} MiB free, {self.free_mib} MiB before the domain was made")

    # tools

    def command(self, *words: str) -> list[str]:
        config = ["--config-file", str(self.config)] if self.config.exists() else []
        return [str(BIN / "reeve"), *config, *words]

    def reeve(self, *words: str, seconds: float = 60.0, quiet: bool = True) -> str:
        """Run a command of the operator; returns its output. :raises DemoFailed: it failed."""
        errors = subprocess.PIPE if quiet else None
        try:
            done = subprocess.run(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"reeve {' '.join(words)}: not done within {seconds:g} s") from None
        if done.returncode != 0:
            raise DemoFailed(f"reeve {' '.join(words)}: exit code {done.returncode}\n{done.stderr or ''}")
        return done.stdout

    def instruct(self, verb: str, *args: str) -> dict[str, Any]:
        """Send an instruction; its steps go to the timeline."""
        words = [word for arg in args for word in ("--arg", arg)]
        words += ["--timeout", f"{self.options.boot_timeout:g}", "-f", "json"]
        reply: dict[str, Any] = json.loads(self.reeve("instruct", verb, *words, seconds=self.options.boot_timeout + 20))
        self.timeline.add(f"instruction {verb}, from acceptance to reply", reply["finished"] - reply["accepted"])
        for step in reply["steps"]:
            self.timeline.add(step["title"] or step["name"], step["seconds"], "step")
            sys.stdout.write(f"   {step['seconds']:9.3f} s   {step['state']:<8} {step['title']}\n")
        return reply

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            for daemon in self.daemons:
                daemon.check()
            return ready()

        wait_until(what, 60, look)

    # the end

    def tails(self) -> None:
        """The ends of the logs, for whoever has to find out why."""
        for daemon in self.daemons:
            lines = daemon.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            say(f"end of {daemon.name}'s log")
            sys.stdout.write("\n".join(lines) + "\n")

    def clean_up(self) -> None:
        """Destroy the domain, end the daemons, remove the folder. :raises DemoFailed: something was left behind."""
        problems: list[str] = []
        steps: list[Callable[[], object]] = [self.destroy_all] if self.daemons and self.config.exists() else []
        steps += [daemon.stop for daemon in reversed(self.daemons)]
        for step in steps:
            try:
                step()
            except (DemoFailed, OSError, ValueError, subprocess.SubprocessError) as exc:
                problems.append(str(exc))
        for pid in marked_processes(self.folder):
            problems.append(f"process {pid} was left behind and was killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.options.keep:
            say(f"kept: {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        if problems:
            raise DemoFailed("cleaning up: " + "; ".join(problems))

    def destroy_all(self) -> None:
        for domain in json.loads(self.reeve("domain", "list", "-f", "json", seconds=30)):
            self.reeve("domain", "destroy", domain["uuid"], seconds=30)


def marked_processes(folder: Path) -> list[int]:
    """Processes that descend from our daemons: they have our mark in their environment."""
    mark = f"{MARK}={folder}".encode()

    def ours() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    deadline = time.monotonic() + 5
    while (found := ours()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "reeve" / "images"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images-dir", default=str(cache), help="where the guest image is kept (default %(default)s)")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="of the guest (default %(default)s)")
    parser.add_argument("--boot-timeout", type=float, default=90.0, metavar="SECONDS", help="default %(default)s")
    parser.add_argument("--driver", choices=["embedded", "fake"], default="embedded", help="fake: runs no guest code")
    parser.add_argument("--keep", action="store_true", help="keep the state folder")
    return parser.parse_args(argv)


def interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    demo = Demo(options, Path(tempfile.mkdtemp(prefix="reeve-demo-")))
    code = 1
    try:
        demo.run()
        code = 0
    except DemoFailed as exc:
        demo.tails()
        say(f"FAILED: {exc}")
    except KeyboardInterrupt:
        say("interrupted; cleaning up")
        code = 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave a domain behind
        try:
            demo.clean_up()
        except DemoFailed as exc:
            say(f"FAILED: {exc}")
            code = code or 1
    if code == 0:
        demo.timeline.show()
        say("all of it worked")
    return code


if __name__ == "__main__":
    sys.exit(main())
