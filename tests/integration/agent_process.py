"""A reeve-agent as a process of its own, over the fake driver, for tests that kill it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from forked import Forked

from agent.journal import Journal
from agent.rpc.client import Client
from hypervisor.toolstack.drivers.fake import FakeToolstack

START_SECONDS = 30
HOST = "node1"


@dataclasses.dataclass
class AgentProcess:
    """One state folder and whatever agent runs on it.

    :ivar broker_url: "" for the folder broker in the state folder.
    :ivar host: its name, as instructions address it.
    :ivar driver: options that choose the driver; by default the fake one, with its host in `folder`.
    """

    folder: Path
    broker_url: str = ""
    driver: tuple[str, ...] = ()
    host: str = HOST
    process: Forked | None = None

    @property
    def url(self) -> str:
        return self.broker_url or f"filesystem://{self.folder}/state/broker"

    @property
    def log(self) -> str:
        path = self.folder / "agent.log"
        return path.read_text() if path.exists() else ""

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, kill_at: str = "", *options: str) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OS_", "REEVE_"))}
        if kill_at:
            env["REEVE_TEST_KILL_AT"] = kill_at
        argv = [
            "--agent-state-dir", str(self.folder / "state"),
            "--agent-host", self.host,
            "--log-file", str(self.folder / "agent.log"),
            "--broker-url", self.url,
            *(self.driver or ("--driver-name", "fake", "--driver-settings", f"state_dir:{self.folder / 'host'}")),
            *options,
        ]  # fmt: skip
        self.process = Forked("agent.service:main", argv, env)

    def wait(self, timeout: float = START_SECONDS) -> int:
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"the agent still runs:\n{self.log}") from None

    def wait_killed(self) -> None:
        assert self.wait() == -signal.SIGKILL, self.log

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """End it in an orderly way; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        return self.process.wait(0)

    def client(self) -> Client:
        return Client(self.url, self.host)

    def toolstack(self) -> FakeToolstack:
        return FakeToolstack(str(self.folder / "host"))

    def journal(self) -> Journal:
        return Journal(self.folder / "state" / "agent" / "journal.sqlite")

    def kernel(self) -> str:
        path = self.folder / "vmlinuz"
        if not path.exists():  # an instruction may be reading it
            path.write_bytes(b"\x7fELF" + bytes(1000))
        return str(path)
