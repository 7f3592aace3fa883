"""The embedded driver under the contract suite: real host and domain processes, in which scripted guests run."""

from __future__ import annotations

import sys
from pathlib import Path

import kit

from hypervisor.toolstack.api import KernelBoot
from hypervisor.toolstack.drivers import load

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig

LINE = "contract-guest-is-up"


def make_kit(folder: Path) -> kit.Kit:
    # With the real back ends; their drivers are started when a front end comes up, which scripted guests have not.
    rig = HostRig(folder, memory_mib=1024, device_backends="", networks="default internal").start()

    def guest(name: str, *words: str) -> KernelBoot:
        path = folder / f"guest-{name}"
        path.write_text("\n".join(["#scripted", f"print {LINE}", *words]))
        return KernelBoot(kernel=str(path))

    return kit.Kit(
        name="embedded",
        connect=lambda: load("embedded", {"socket": str(rig.socket)}),
        guests={
            kit.WAITS: guest("waits", "deaf"),
            kit.OBEYS: guest("obeys"),
            kit.POWEROFF: guest("poweroff", "poweroff"),
            kit.REBOOTS: guest("reboots", "once reboot"),
            kit.CRASHES: guest("crashes", "once crash"),
            kit.ECHOES: guest("echoes"),
        },
        line=LINE.encode(),
        memory_mib=16,
        boot_timeout=15.0,
        restart_host=rig.restart,
        image_folder=rig.state / "images",
        stop=rig.stop,
    )
