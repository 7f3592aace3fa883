"""The xl driver under the contract suite: ``tests/support/fake_xen.py`` plays Xen, with the project's xenstored."""

from __future__ import annotations

import sys
from pathlib import Path

import kit

from hypervisor.toolstack.api import KernelBoot
from hypervisor.toolstack.drivers import load

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from fake_xen import FakeXen
from xenstored_thread import Xenstored

LINE = "contract-guest-is-up"


def make_kit(folder: Path) -> kit.Kit:
    xenstored = Xenstored(folder / "xs")
    machine = FakeXen(folder / "machine", xenstored)
    kernel = folder / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(2000))
    settings = {
        "xl": str(machine.program),
        "xenstore": str(xenstored.path),
        "state_dir": str(folder / "state"),
        "console_logs": str(machine.folder),
    }

    def guest(words: str = "") -> KernelBoot:
        return KernelBoot(kernel=str(kernel), cmdline=words)

    def stop() -> None:
        machine.stop()
        xenstored.end()

    return kit.Kit(
        name="xl",
        connect=lambda: load("xl", settings),
        guests={
            kit.WAITS: guest("deaf"),
            kit.OBEYS: guest(),
            kit.POWEROFF: guest("off"),
            kit.REBOOTS: guest("reboot"),
            kit.CRASHES: guest("crash"),
            kit.ECHOES: guest(),
            kit.FOLLOWS: guest(),
            kit.SUSPENDS: guest(),
        },
        line=LINE.encode(),
        memory_mib=16,
        boot_timeout=15.0,
        image_folder=folder / "images",
        save_folder=folder / "saved",
        restart_host=lambda: None,  # the driver is stateless between calls: what it knows is on disk and in xenstore
        stop=stop,
    )
