"""A pretend Xen host and the xl driver on it."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from fake_xen import FakeXen
from xenstored_thread import Xenstored

from hypervisor.toolstack.api import DomainEvent, DomainSpec, KernelBoot
from hypervisor.toolstack.drivers import xl
from hypervisor.toolstack.drivers.xl.driver import XlToolstack


@dataclasses.dataclass
class Rig:
    folder: Path
    xenstored: Xenstored
    machine: FakeXen
    toolstack: XlToolstack
    settings: dict[str, str]

    def connect(self, state: str = "state") -> XlToolstack:
        return xl.create({**self.settings, "state_dir": str(self.folder / state)})

    def spec(self, words: str = "deaf", **fields: object) -> DomainSpec:
        ident = str(uuid.uuid4())
        boot = KernelBoot(str(self.folder / "kernel"), cmdline=words)
        values = {"uuid": ident, "name": f"u-{ident[:8]}", "boot": boot, "memory_mib": 16, "owner": "unit", **fields}
        return DomainSpec(**values)  # type: ignore[arg-type]

    def config(self, spec: DomainSpec) -> dict[str, object]:
        """What another toolstack would make the same domain from."""
        return {"name": spec.name, "uuid": spec.uuid, "memory": spec.memory_mib}

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}"
            time.sleep(0.01)

    def listen(self) -> list[DomainEvent]:
        heard: list[DomainEvent] = []
        self.toolstack.subscribe(heard.append)
        return heard

    @classmethod
    def make(cls, folder: Path) -> Rig:
        xenstored = Xenstored(folder / "xs")
        machine = FakeXen(folder / "machine", xenstored)
        (folder / "kernel").write_bytes(b"\x7fELF" + bytes(2000))
        settings = {
            "xl": str(machine.program),
            "xenstore": str(xenstored.path),
            "console_logs": str(machine.folder),
            "networks": "default=xenbr0 other=xenbr1",
        }
        return cls(folder, xenstored, machine, xl.create({**settings, "state_dir": str(folder / "state")}), settings)

    def stop(self) -> None:
        self.toolstack.close()
        self.machine.stop()
        self.xenstored.end()
