from __future__ import annotations

import pytest

from hypervisor.devices.xenbus import DevicePaths, XenbusDevice, XenbusState
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.server import Server

PATHS = DevicePaths(7, "vif", 0)


@pytest.fixture
def handle() -> Handle:
    return Handle(Server())


@pytest.fixture
def bus(handle: Handle) -> XenbusDevice:
    made = XenbusDevice(handle, PATHS)
    made.lay_out({"feature-sg": "1"}, {"mac": "00:16:3e:00:00:01"})
    return made


def test_nodes_are_those_of_libxl(handle: Handle, bus: XenbusDevice) -> None:
    front = {name: handle.read(f"{PATHS.frontend}/{name}") for name in handle.directory(PATHS.frontend)}
    back = {name: handle.read(f"{PATHS.backend}/{name}") for name in handle.directory(PATHS.backend)}
    assert front == {"backend": PATHS.backend, "backend-id": "0", "state": "1", "mac": "00:16:3e:00:00:01"}
    assert back == {"frontend": PATHS.frontend, "frontend-id": "7", "online": "1", "state": "1", "feature-sg": "1"}
    assert handle.perms(PATHS.frontend) == handle.perms(f"{PATHS.frontend}/state") == "n7,r0"
    assert handle.perms(PATHS.backend) == handle.perms(f"{PATHS.backend}/state") == "n0,r7"
    assert handle.read(f"{PATHS.libxl}/backend") == PATHS.backend and handle.perms(PATHS.libxl) == "n0"


def test_nothing_is_left_and_neighbours_stay(handle: Handle, bus: XenbusDevice) -> None:
    other = XenbusDevice(handle, DevicePaths(7, "vif", 1))
    other.lay_out({}, {})
    bus.set_error("broken")
    bus.remove()
    bus.remove()
    assert not bus.is_laid_out() and handle.directory(PATHS.frontend) == [] and not handle.exists(PATHS.error)
    assert other.is_laid_out() and other.frontend_state() is XenbusState.INITIALISING
    other.remove()
    assert not handle.exists("/local/domain/0/backend/vif/7")


@pytest.mark.parametrize("text", ["", "9", "-1", "4 ", "44", "four", "\x04", "4\n", "x" * 1000])
def test_what_is_no_state(handle: Handle, bus: XenbusDevice, text: str) -> None:
    handle.write(f"{PATHS.frontend}/state", text)
    assert bus.frontend_state() is XenbusState.UNKNOWN


def test_states_and_nodes_come_together(handle: Handle, bus: XenbusDevice) -> None:
    seen: list[str | None] = []
    handle.watch(f"{PATHS.backend}/state", lambda path: seen.append(handle.read(f"{PATHS.backend}/sectors")))
    seen.clear()
    bus.switch(XenbusState.CONNECTED, {"sectors": "8"})
    bus.switch(XenbusState.CONNECTED, {"sectors": "16"})
    assert seen == ["8", "16"], "the same state again is told, too"
    assert bus.state() is XenbusState.CONNECTED


def test_an_error_is_one_line_of_ascii(handle: Handle, bus: XenbusDevice) -> None:
    bus.set_error("bad\n\x1b[2J ring é" + "x" * 500)
    text = handle.read(f"{PATHS.error}/error")
    assert text is not None and text.startswith("bad??[2J ring ?x") and len(text) == 200
    bus.set_error("")
    assert not handle.exists(PATHS.error)


def test_a_watch_ends(handle: Handle, bus: XenbusDevice) -> None:
    seen: list[str] = []
    unwatch = bus.watch_frontend(seen.append)
    assert len(seen) == 1
    handle.write(f"{PATHS.frontend}/state", "3")
    assert len(seen) == 2
    handle.remove(PATHS.frontend)
    assert len(seen) == 3
    unwatch()
    handle.write(f"{PATHS.frontend}/state", "3")
    assert len(seen) == 3
