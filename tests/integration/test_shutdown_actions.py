"""How a guest's end is dealt with: every reason with every action, acknowledgements, watchdogs. Real processes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig, until

from hypervisor.errors import SpecInvalid, WrongState
from hypervisor.toolstack.api import DomainState, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack
from hypervisor.xenstore.wire import Op, Packet, Parser

ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
RUNNING = frozenset({DomainState.RUNNING})

FIELD_OF = {
    "poweroff": "on_poweroff",
    "reboot": "on_reboot",
    "crash": "on_crash",
    "watchdog": "on_crash",
    "segv": "on_crash",
}
REASON_OF = {"segv": ShutdownReason.CRASH}
OTHER = {OnEvent.DESTROY: OnEvent.PRESERVE, OnEvent.PRESERVE: OnEvent.DESTROY, OnEvent.RESTART: OnEvent.PRESERVE}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("host")).start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    for info in made.list_domains():
        made.destroy(info.uuid)
    made.close()


@pytest.mark.parametrize("action", list(OnEvent))
@pytest.mark.parametrize("end", FIELD_OF)
def test_an_end_and_its_action(rig: HostRig, toolstack: EmbeddedToolstack, end: str, action: OnEvent) -> None:
    # The other events' actions are others: only the one that was asked for may decide.
    fields = {name: OTHER[action] for name in ("on_poweroff", "on_reboot", "on_crash")} | {FIELD_OF[end]: action}
    spec = rig.spec(f"print hello\nonce {end}\nprint again", **fields)
    first = toolstack.create(spec)
    free = toolstack.host_info().memory_free_mib
    toolstack.unpause(spec.uuid)
    if action is OnEvent.RESTART:
        until(lambda: b"again" in toolstack.console_log(spec.uuid), "its next run")
        info = toolstack.wait(spec.uuid, RUNNING, 10)
        assert info is not None and info.domid != first.domid
        assert toolstack.host_info().memory_free_mib == free
        return
    found = toolstack.wait(spec.uuid, ENDED, 10)
    if action is OnEvent.DESTROY:
        assert found is None
        assert toolstack.host_info().memory_free_mib > free
        return
    assert found is not None
    reason = REASON_OF.get(end) or ShutdownReason(end)
    state = DomainState.CRASHED if reason is ShutdownReason.CRASH else DomainState.SHUTDOWN
    assert (found.state, found.shutdown_reason, found.domid) == (state, reason, first.domid)
    # What is kept keeps its memory, unless its process is gone.
    assert (toolstack.host_info().memory_free_mib == free) is (end != "segv")


@pytest.mark.parametrize("action", list(OnEvent))
def test_a_suspended_guest_is_kept_whatever_the_actions(
    rig: HostRig, toolstack: EmbeddedToolstack, action: OnEvent
) -> None:
    fields = {name: action for name in ("on_poweroff", "on_reboot", "on_crash")}
    spec = rig.spec("suspend", **fields)
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    found = toolstack.wait(spec.uuid, ENDED, 10)
    assert found is not None and found.shutdown_reason is ShutdownReason.SUSPEND


def test_whether_the_guest_took_the_request_is_told(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = rig.spec("print hello\ndeaf")
    toolstack.create(spec)
    toolstack.unpause(spec.uuid)
    until(lambda: b"hello" in toolstack.console_log(spec.uuid), "the guest to print")
    info = toolstack.get_domain(spec.uuid)
    assert info.detail == ""
    toolstack.shutdown(spec.uuid)
    assert toolstack.get_domain(spec.uuid).detail == "asked to poweroff, and has not taken the request"
    rig.restart()
    assert toolstack.get_domain(spec.uuid).detail == "asked to poweroff, and has not taken the request"
    toolstack.reboot(spec.uuid)
    node = f"/local/domain/{info.domid}/control/shutdown"
    Store(rig).write(node, "")  # as a guest does that will be long about it
    assert toolstack.get_domain(spec.uuid).detail == "asked to reboot, and has taken the request"
    Store(rig).write(node, "nonsense of the guest\nor two lines")
    assert toolstack.get_domain(spec.uuid).detail == ""


def test_sysrq(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    spec = rig.spec("print hello\nonce deaf")
    info = toolstack.create(spec)
    toolstack.sysrq(spec.uuid, "h")
    assert Store(rig).read(f"/local/domain/{info.domid}/control/sysrq") == "h"
    for key in ("", "hh", "\n", "ä", "-"):
        with pytest.raises(SpecInvalid, match="one letter or digit"):
            toolstack.sysrq(spec.uuid, key)
    ended = rig.spec("poweroff", on_poweroff=OnEvent.PRESERVE)
    toolstack.create(ended)
    toolstack.unpause(ended.uuid)
    toolstack.wait(ended.uuid, ENDED, 10)
    with pytest.raises(WrongState, match="has ended"):
        toolstack.sysrq(ended.uuid, "h")


class Store:
    """A tool's view of xenstore."""

    def __init__(self, rig: HostRig) -> None:
        self._path = rig.state / "xenstored.sock"

    def read(self, path: str) -> str:
        return self._ask(Op.READ, path.encode() + b"\0").decode()

    def write(self, path: str, value: str) -> None:
        assert self._ask(Op.WRITE, path.encode() + b"\0" + value.encode()) == b"OK\0"

    def _ask(self, op: Op, payload: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self._path))
            sock.sendall(Packet(op, 1, 0, payload).encode())
            parser = Parser()
            while (packet := parser.next()) is None:
                parser.feed(sock.recv(parser.wanted))
            return packet.payload
