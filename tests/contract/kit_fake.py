"""The fake driver under the contract suite: two connections share one state folder."""

from __future__ import annotations

from pathlib import Path

import kit

from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers import load
from hypervisor.toolstack.drivers.fake import FakeToolstack

LINE = "contract-guest-is-up"


def make_kit(folder: Path) -> kit.Kit:
    kernel = folder / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(2000))
    settings = {"state_dir": str(folder / "state"), "cpus": "4", "memory_mib": "1024"}
    second = {**settings, "state_dir": str(folder / "second"), "first_domid": "1000000", "memory_mib": "256"}

    def guest(words: str = "") -> KernelBoot:
        return KernelBoot(kernel=str(kernel), cmdline=f"fake.print={LINE} {words}".strip())

    def add_foreign(spec: DomainSpec) -> None:
        host = FakeToolstack(settings["state_dir"], cpus=4, memory_mib=1024)
        host.add_foreign(spec)
        host.close()

    return kit.Kit(
        name="fake",
        connect=lambda: load("fake", settings),
        guests={
            kit.WAITS: guest("fake.shutdown=ignore"),
            kit.OBEYS: guest(),
            kit.POWEROFF: guest("fake.boot=poweroff"),
            kit.REBOOTS: guest("fake.boot=reboot"),
            kit.CRASHES: guest("fake.boot=crash"),
            kit.ECHOES: guest(),
            kit.FOLLOWS: guest(),
            kit.SUSPENDS: guest(),
            kit.RESTLESS: guest("fake.rounds=never"),
        },
        line=LINE.encode(),
        memory_mib=16,
        boot_timeout=5.0,
        image_folder=folder / "images",
        add_foreign=add_foreign,
        peer=lambda: load("fake", second),
        restart_peer=lambda: None,
        save_folder=folder / "saved",
        restart_host=lambda: None,  # it has no process: every verb ends with its state on disk
    )
