"""The embedded driver with its real engine under the contract suite: micro-guests built from ``tests/guests``."""

from __future__ import annotations

import sys
from pathlib import Path

import kit

from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import KernelBoot
from hypervisor.toolstack.drivers import load

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
sys.path.insert(0, str(Path(__file__).parent.parent / "guests"))
from build import available, build_guest
from host_rig import HostRig


def make_kit(folder: Path) -> kit.Kit:
    if why := available():
        kit.unavailable(why)

    def guest(name: str, cmdline: str = "") -> KernelBoot:
        return KernelBoot(kernel=str(build_guest(name)), cmdline=cmdline)

    guests = {
        kit.WAITS: guest("idle"),
        kit.OBEYS: guest("hello"),
        kit.POWEROFF: guest("hello", "quit"),
        kit.CRASHES: guest("crashme"),
        kit.ECHOES: guest("hello"),
        kit.SUSPENDS: guest("suspend"),
    }
    rig = HostRig(folder, runtime=REAL_RUNTIME, memory_mib=256, networks="default internal")
    try:
        rig.start()
    except BaseException:
        rig.stop()
        raise
    return kit.Kit(
        name="embedded",
        connect=lambda: load("embedded", {"socket": str(rig.socket)}),
        guests=guests,
        line=b"hello: ready",
        lines={
            kit.WAITS: b"idle: blocking",
            kit.CRASHES: b"crashme: crashing",
            kit.POWEROFF: b"hello: domid",
            kit.SUSPENDS: b"suspend: ready",
        },
        memory_mib=8,
        boot_timeout=20.0,
        restart_host=rig.restart,
        image_folder=rig.state / "images",
        save_folder=folder / "saved",
        no_notes=KernelBoot(kernel=str(build_guest("hello", NO_XEN_NOTES=True))),
        stop=rig.stop,
    )
