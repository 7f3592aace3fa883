"""What a driver supplies to be put under the contract suite.

To add a driver: write ``kit_NAME.py`` beside this file with a function ``make_kit(folder) -> Kit``;
it may call `pytest.skip` when its host cannot run here. No test asks which driver it runs on; what
differs is a capability of the driver or a guest that the kit has or has not.
"""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import Capability, DomainInfo, DomainSpec, KernelBoot, Toolstack

OWNER = "contract"

# Guests a kit may have. Each prints LINE once while booting, unless stated otherwise.
WAITS = "waits"  # then waits for ever, and does not answer shutdown requests
OBEYS = "obeys"  # powers off or reboots when asked through control/shutdown
POWEROFF = "poweroff"  # powers off by itself
REBOOTS = "reboots"  # asks for a reboot by itself on its first boot; after that it waits
CRASHES = "crashes"  # ends with SHUTDOWN_crash or by a fault
FOLLOWS = "follows"  # has a balloon, and takes vCPUs on and off line
ECHOES = "echoes"  # a line typed on its console is printed back
SUSPENDS = "suspends"  # suspends when asked, and echoes; can be saved, restored, and moved live
RESTLESS = "restless"  # never stands still long enough to be moved live; can be cancelled at leisure


@dataclasses.dataclass(slots=True)
class Kit:
    """One driver's host, shared by all tests of a session.

    :ivar connect: a new connection to the host; each caller closes its own.
    :ivar guests: kernel and ramdisk for each kind of guest above that this driver can run.
    :ivar line: what a guest prints while booting; `lines` for guests that print something else.
    :ivar memory_mib: enough for every guest.
    :ivar boot_timeout: seconds, generous, from unpause to `line` on a busy machine.
    :ivar add_foreign: makes a domain behind the driver's back, as another toolstack would; None if that cannot be.
    :ivar restart_host: kills the host process with SIGKILL and starts it again; needs capability ADOPTION.
    :ivar image_folder: where disk images may lie; None when the kit's host has no disks of the real kind.
    :ivar peer: a connection to a second host, to which domains can move; needs capability LIVE_MIGRATION. Both see the
        same files.
    :ivar restart_peer: as `restart_host`, of the second host.
    :ivar save_folder: where images of memory may be saved; needs capability SAVE.
    :ivar no_notes: a kernel without Xen notes, for a driver whose `create` looks at them.
    """

    name: str
    connect: Callable[[], Toolstack]
    guests: dict[str, KernelBoot]
    line: bytes
    memory_mib: int
    boot_timeout: float = 30.0
    add_foreign: Callable[[DomainSpec], None] | None = None
    restart_host: Callable[[], None] | None = None
    image_folder: Path | None = None
    peer: Callable[[], Toolstack] | None = None
    restart_peer: Callable[[], None] | None = None
    save_folder: Path | None = None
    no_notes: KernelBoot | None = None
    stop: Callable[[], None] = lambda: None
    lines: dict[str, bytes] = dataclasses.field(default_factory=dict)


def newc(name: str, content: bytes) -> bytes:
    """A cpio archive in newc format with one file (early-userspace/buffer-format.rst of Linux)."""

    def entry(inode: int, mode: int, name: str, content: bytes) -> bytes:
        raw = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)

    return entry(1, 0o100644, name, content) + entry(0, 0, "TRAILER!!!", b"")


@dataclasses.dataclass(slots=True)
class Bench:
    """What a test works with: a connection and short ways to make domains."""

    toolstack: Toolstack
    kit: Kit
    guests: dict[str, str] = dataclasses.field(default_factory=dict)  # of each UUID

    def spec(self, guest: str = WAITS, **fields: object) -> DomainSpec:
        ident = str(uuid.uuid4())
        values: dict[str, object] = {
            "uuid": ident,
            "name": f"c-{ident[:8]}",
            "boot": self.boot(guest),
            "memory_mib": self.kit.memory_mib,
            "owner": OWNER,
        }
        spec = DomainSpec(**{**values, **fields})  # type: ignore[arg-type]
        self.guests[spec.uuid] = guest
        return spec

    def line(self, uuid_text: str) -> bytes:
        """What this domain's guest prints while booting."""
        return self.kit.lines.get(self.guests[uuid_text], self.kit.line)

    def boot(self, guest: str) -> object:
        if guest not in self.kit.guests:
            pytest.skip(f"the {self.kit.name} kit has no guest that {guest}")
        return self.kit.guests[guest]

    def start(self, guest: str = WAITS, **fields: object) -> DomainInfo:
        """A domain that was let run."""
        info = self.toolstack.create(self.spec(guest, **fields))
        self.toolstack.unpause(info.uuid)
        return info

    def booted(self, guest: str = WAITS, **fields: object) -> DomainInfo:
        """A domain whose guest has printed its line."""
        info = self.start(guest, **fields)
        self.until(lambda: self.line(info.uuid) in self.toolstack.console_log(info.uuid), f"{guest} guest to boot")
        return info

    def image(self, size: int = 1 << 20) -> str:
        """A new raw image of zeros, where the host may use it."""
        if self.kit.image_folder is None:
            pytest.skip(f"the {self.kit.name} kit has no disk images")
        self.kit.image_folder.mkdir(parents=True, exist_ok=True)
        path = self.kit.image_folder / f"{uuid.uuid4()}.img"
        with path.open("wb") as file:
            file.truncate(size)
        return str(path)

    def save_path(self) -> str:
        """A place for a saved image, where nothing is yet."""
        if self.kit.save_folder is None:
            pytest.skip(f"the {self.kit.name} kit has nowhere to save to")
        self.kit.save_folder.mkdir(parents=True, exist_ok=True)
        return str(self.kit.save_folder / f"{uuid.uuid4()}.save")

    def answers(self, uuid_text: str, toolstack: Toolstack | None = None) -> None:
        """The guest, one that echoes, is alive: it prints back what is typed."""
        host = toolstack or self.toolstack
        word = f"alive-{uuid.uuid4().hex[:8]}"
        console = host.open_console(uuid_text)
        try:
            console.write(f"echo {word}\n".encode())
            self.until(lambda: word.encode() in host.console_log(uuid_text), f"{word} from the guest")
        finally:
            console.close()

    def until(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or self.kit.boot_timeout)
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}"
            time.sleep(0.01)  # a poll with a deadline, not a guess

    def needs(self, capability: Capability) -> None:
        if capability not in self.toolstack.capabilities():
            pytest.skip(f"the {self.kit.name} driver has no capability {capability.value}")

    def refused(self, error: type[ToolstackError], spec: DomainSpec) -> ToolstackError:
        """`create` fails with exactly `error` and leaves nothing behind."""
        before = self.toolstack.list_domains()
        free = self.toolstack.host_info().memory_free_mib
        with pytest.raises(ToolstackError) as caught:
            self.toolstack.create(spec)
        assert type(caught.value) is error, repr(caught.value)
        assert_readable(caught.value)
        assert [info.uuid for info in self.toolstack.list_domains()] == [info.uuid for info in before]
        assert self.toolstack.host_info().memory_free_mib == free
        return caught.value


def assert_readable(error: ToolstackError) -> None:
    """One line, a code, and a JSON form."""
    assert error.message and "\n" not in error.message
    assert error.to_json() == {"code": type(error).code, "message": error.message, "retryable": type(error).retryable}
    assert "." in error.code


def unavailable(reason: str) -> None:
    """For kits: skip with a plain reason, but fail where everything must be there (CI=true)."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
