"""A real host process for tests: started in a folder, killed, started again, and cleaned up with all its domains."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

SUPPORT = Path(__file__).parent
SCRIPTED = "scripted_runtime:ScriptedRuntime"
DEADLINE = 20.0


def until(condition: Callable[[], Any], what: str, timeout: float = DEADLINE) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.01)  # a poll with a deadline, not a guess
    return value


class HostRig:
    """:param options: of the group ``hypervisor``. :param traps: see `trapped_host`; `trap` sets one."""

    def __init__(self, folder: Path, runtime: str = SCRIPTED, *, traps: bool = False, **options: object) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.socket = self.state / "hypervisor.sock"
        self.log = folder / "host.log"
        self._config = folder / "hypervisor.conf"
        self._program = "trapped_host" if traps else "hypervisor.host.main"
        self.trap_file = folder / "trap"
        folder.mkdir(parents=True, exist_ok=True)
        values = {"runtime": runtime, "memory_mib": 2048, "restart_interval": 0.0, "log_level": "debug", **options}
        if runtime == SCRIPTED:
            values.setdefault("device_backends", "disk:toy_device:ToyBackend,nic:toy_device:ToyNics")
        lines = "".join(f"{name} = {value}\n" for name, value in values.items())
        self._config.write_text(f"[hypervisor]\n{lines}")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> HostRig:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SUPPORT), environment.get("PYTHONPATH", "")]))
        environment["REEVE_TEST_TRAP"] = str(self.trap_file)
        command = [sys.executable, "-m", self._program]
        command += ["--state-dir", str(self.state), "--config-file", str(self._config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._answers, "the host process to answer", 60)
        return self

    def trap(self, phase: str, what: str) -> None:
        self.trap_file.write_text(f"{phase} {what}")

    def trapped(self) -> bool:
        """Whether it has stopped itself, or is gone."""
        if self.trap_file.exists():
            return False
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "TtZ"

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def connect(self) -> EmbeddedToolstack:
        return EmbeddedToolstack(self.socket)

    def kill(self) -> None:
        """SIGKILL, as `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(DEADLINE)

    def terminate(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(DEADLINE)

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        """End the host process and every domain process it left."""
        if self._process is not None and self._process.poll() is None:
            self.terminate()
        for folder in self.state.glob("domains/*"):
            with contextlib.suppress(OSError, ValueError):
                kill_process(int(json.loads((folder / "domain.json").read_text())["pid"]))

    def record(self, ident: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.state / "domains" / ident / "domain.json").read_text())
        return data

    def process_of(self, ident: str) -> int:
        return int(self.record(ident)["pid"])

    def left_behind(self) -> list[str]:
        """Folders of domains in the state folder."""
        return sorted(path.name for path in (self.state / "domains").iterdir())

    def children(self, zygote: int) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()]

    def spec(self, script: str, **fields: Any) -> DomainSpec:
        """A domain whose guest does what `script` says (see `scripted_runtime`)."""
        ident = str(uuid.uuid4())
        kernel = self.folder / f"kernel-{ident[:8]}"
        kernel.write_text(f"#scripted\n{script}")
        values = {"uuid": ident, "name": f"d-{ident[:8]}", "memory_mib": 8, "owner": "tests", **fields}
        return DomainSpec(boot=KernelBoot(kernel=str(kernel)), **values)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the host process ended:\n{self.log.read_text()[-3000:]}"
        toolstack = self.connect()
        try:
            toolstack.host_info()
        except HostUnavailable:
            return False
        finally:
            toolstack.close()
        return True


def kill_process(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        assert select.select([pidfd], [], [], DEADLINE)[0], f"process {pid} does not end"
    finally:
        os.close(pidfd)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
