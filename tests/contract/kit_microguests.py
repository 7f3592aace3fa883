"""The embedded driver with its real engine under the contract suite: micro-guests built from ``tests/guests``."""

from __future__ import annotations

import sys
from pathlib import Path

import kit

from hypervisor.toolstack.api import KernelBoot
from hypervisor.toolstack.drivers import load

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
sys.path.insert(0, str(Path(__file__).parent.parent / "guests"))
from build import available, build_guest
from moving_pair import Pair


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
        kit.RESTLESS: guest("memtouch", "forever"),
    }
    pair = Pair(folder, memory_mib=256, traps=False)
    try:
        pair.start()
    except BaseException:
        pair.stop()
        raise
    rig, other = pair.rigs
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
            kit.RESTLESS: b"memtouch:",
        },
        memory_mib=8,
        boot_timeout=20.0,
        restart_host=rig.restart,
        image_folder=rig.state / "images",
        save_folder=folder / "saved",
        no_notes=KernelBoot(kernel=str(build_guest("hello", NO_XEN_NOTES=True))),
        peer=lambda: load("embedded", {"socket": str(other.socket)}),
        restart_peer=other.restart,
        stop=pair.stop,
    )
