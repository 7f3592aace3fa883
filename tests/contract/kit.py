"""What a driver supplies to be put under the contract suite.

To add a driver: write ``kit_NAME.py`` beside this file with a function ``make_kit(folder) -> Kit``;
it may call `pytest.skip` when its host cannot run here. No test asks which driver it runs on; what
differs is a capability of the driver or a guest that the kit has or has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypervisor.toolstack.api import DomainSpec, KernelBoot, Toolstack

# Guests a kit may have. Each prints LINE once while booting, unless stated otherwise.
WAITS = "waits"  # then waits for ever, and does not answer shutdown requests
OBEYS = "obeys"  # powers off or reboots when asked through control/shutdown
POWEROFF = "poweroff"  # powers off by itself
REBOOTS = "reboots"  # asks for a reboot by itself on its first boot; after that it waits
CRASHES = "crashes"  # ends with SHUTDOWN_crash or by a fault
ECHOES = "echoes"  # a line typed on its console is printed back


@dataclasses.dataclass(slots=True)
class Kit:
    """One driver's host, shared by all tests of a session.

    :ivar connect: a new connection to the host; each caller closes its own.
    :ivar guests: kernel and ramdisk for each kind of guest above that this driver can run.
    :ivar line: what every guest prints while booting.
    :ivar memory_mib: enough for every guest.
    :ivar boot_timeout: seconds, generous, from unpause to `line` on a busy machine.
    :ivar add_foreign: makes a domain behind the driver's back, as another toolstack would; None if that cannot be.
    :ivar restart_host: kills the host process with SIGKILL and starts it again; needs capability ADOPTION.
    :ivar reads_notes: `create` looks at a kernel's ELF notes.
    """

    name: str
    connect: Callable[[], Toolstack]
    guests: dict[str, KernelBoot]
    line: bytes
    memory_mib: int
    boot_timeout: float = 30.0
    add_foreign: Callable[[DomainSpec], None] | None = None
    restart_host: Callable[[], None] | None = None
    reads_notes: bool = False
    stop: Callable[[], None] = lambda: None


def newc(name: str, content: bytes) -> bytes:
    """A cpio archive in newc format with one file (early-userspace/buffer-format.rst of Linux)."""

    def entry(inode: int, mode: int, name: str, content: bytes) -> bytes:
        raw = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)

    return entry(1, 0o100644, name, content) + entry(0, 0, "TRAILER!!!", b"")
