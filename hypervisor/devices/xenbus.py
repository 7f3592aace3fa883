"""The xenstore side of a split device: nodes of front and back end, and their states (public/io/xenbus.h).

Paths, values and permissions are those of libxl (Xen 4.17, libxl_device.c): the front end's directory
belongs to the guest and domain 0 may read it, the back end's belongs to domain 0 and the guest may read it.
What a guest writes is its own affair: nothing in its directory is believed but its state and what
`hypervisor.devices.driver.Backend.frontend` has checked.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.path import domain_path

BACKEND_HOME = "/local/domain/0/backend"
MAX_ERROR = 200


class XenbusState(enum.IntEnum):
    """enum xenbus_state."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


@dataclass(frozen=True, slots=True)
class DevicePaths:
    """:ivar type: ``vbd`` or ``vif``. :ivar devid: its number below that."""

    domid: int
    type: str
    devid: int

    @property
    def frontend(self) -> str:
        return f"{domain_path(self.domid)}/device/{self.type}/{self.devid}"

    @property
    def backend(self) -> str:
        return f"{BACKEND_HOME}/{self.type}/{self.domid}/{self.devid}"

    @property
    def libxl(self) -> str:
        return f"/libxl/{self.domid}/device/{self.type}/{self.devid}"

    @property
    def error(self) -> str:
        """Where Linux's back ends put what went wrong (xenbus_dev_error)."""
        return f"/local/domain/0/error/backend/{self.type}/{self.domid}/{self.devid}"


class XenbusDevice:
    """One device's nodes, as the back end uses them. :raises XenstoreError: from every method."""

    def __init__(self, handle: Handle, paths: DevicePaths) -> None:
        self._handle = handle
        self.paths = paths

    def lay_out(self, backend: Mapping[str, str], frontend: Mapping[str, str]) -> None:
        """Write both directories anew, all or nothing; both sides Initialising.

        :param backend: further nodes of the back end; `frontend` of the front end.
        """
        paths, domid = self.paths, self.paths.domid
        front = {"backend": paths.backend, "backend-id": "0", "state": "1", **frontend}
        back = {"frontend": paths.frontend, "frontend-id": str(domid), "online": "1", "state": "1", **backend}
        with self._handle.transaction():
            self._directory(paths.frontend, f"n{domid},r0", front)
            self._directory(paths.backend, f"n0,r{domid}", back)
            self._directory(paths.libxl, "n0", {**back, "backend": paths.backend})

    def is_laid_out(self) -> bool:
        return self._handle.exists(self.paths.backend)

    def remove(self) -> None:
        """Remove all its nodes; those that are not there are no error."""
        paths, handle = self.paths, self._handle
        with handle.transaction():
            for path in (paths.frontend, paths.backend, paths.libxl, paths.error):
                handle.remove(path)
            for parent in (paths.frontend, paths.backend):
                above = parent.rpartition("/")[0]
                if not handle.directory(above):
                    handle.remove(above)

    def watch_frontend(self, changed: Callable[[str], object]) -> Callable[[], None]:
        """Call `changed` when the front end's state may have changed, and once at first. Returns what ends it."""
        return self._handle.watch(f"{self.paths.frontend}/state", changed)

    def read_frontend(self, name: str) -> str | None:
        return self._handle.read(f"{self.paths.frontend}/{name}")

    def frontend_state(self) -> XenbusState:
        """UNKNOWN for what is no state, and for a front end that is not there."""
        return _state(self.read_frontend("state"))

    def state(self) -> XenbusState:
        return _state(self._handle.read(f"{self.paths.backend}/state"))

    def switch(self, state: XenbusState, nodes: Mapping[str, str] | None = None) -> None:
        """Write `nodes` and the back end's state in one transaction; the state also if it is the same, as
        Linux's blkback does to make the front end look at the nodes again.
        """
        with self._handle.transaction():
            for name, value in (nodes or {}).items():
                self._handle.write(f"{self.paths.backend}/{name}", value)
            self._handle.write(f"{self.paths.backend}/state", str(int(state)))

    def set_online(self, online: bool) -> None:
        self._handle.write(f"{self.paths.backend}/online", "1" if online else "0")

    def is_online(self) -> bool:
        return self._handle.read(f"{self.paths.backend}/online") == "1"

    def set_error(self, text: str) -> None:
        """Say what went wrong where people and tools look for it; "" takes it back."""
        if text:
            self._handle.write(f"{self.paths.error}/error", printable(text))
        else:
            self._handle.remove(self.paths.error)

    def _directory(self, path: str, perms: str, nodes: Mapping[str, str]) -> None:
        handle = self._handle
        handle.remove(path)
        handle.mkdir(path)
        handle.set_perms(path, perms)
        for name, value in nodes.items():
            handle.write(f"{path}/{name}", value)


def printable(text: str) -> str:
    """One short line of ASCII: parts of it may come from a guest."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:MAX_ERROR]


def _state(text: str | None) -> XenbusState:
    if text is None or len(text) != 1 or not "0" <= text <= "8":
        return XenbusState.UNKNOWN
    return XenbusState(int(text))
