"""A driver process at a real guest: sandboxed domain process, micro-guest, filter, grants, events, deaths."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "guests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import build as guests
from host_rig import SUPPORT, HostRig, alive, kill_process, until

from hypervisor.host import channel as channels
from hypervisor.host.channel import Channel
from hypervisor.host.guest_link_ends import LinkEnds
from hypervisor.host.handles import Handles
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))

WRITABLE, READABLE, MANY = 8, 9, 16


class Driver:
    """`tests/support/guarded_driver.py`, told what to do line by line."""

    def __init__(self, fds: list[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "guarded_driver.py"), *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        channels.close_all(fds)
        assert self._answer() == "ready '' True"

    def _answer(self) -> str:
        out = self._process.stdout
        assert out is not None
        assert select.select([out], [], [], 30)[0], "the driver does not answer"
        return out.readline().strip()

    def __call__(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class AsHost:
    """Takes the place of a host process that was killed: speaks with a domain process by its own socket."""

    def __init__(self, rig: HostRig, ident: str) -> None:
        path = rig.state / "domains" / ident / "sock"
        self._channel = Channel(until(lambda: _connected(path), "the domain process to listen"))
        self.pid = rig.process_of(ident)
        message, fds = self._channel.receive()
        assert message["event"] == "identity"
        self.handles = Handles.unpack(fds)
        self.drivers: list[Driver] = []

    def request(self, op: str, fds: list[int] | None = None, **fields: object) -> dict[str, Any]:
        self._channel.send({"id": 1, "op": op, **fields}, fds or [])
        while True:
            message, _ = self._channel.receive()
            if message.get("id") == 1:
                return message

    def driver(self) -> tuple[int, Driver]:
        """A driver process and the number of its link."""
        ends = LinkEnds.create(self.handles.memory)
        answer = self.request("link", ends.for_domain)
        channels.close_all(ends.for_domain)
        assert "result" in answer, answer
        driver = Driver(ends.for_driver)
        self.drivers.append(driver)
        return answer["result"]["link"], driver

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        self._channel.close()
        self.handles.close()
        if alive(self.pid):
            kill_process(self.pid)


def _connected(path: Path) -> socket.socket | None:
    with contextlib.suppress(OSError):
        sock = channels.connect(path, socket.SOCK_SEQPACKET, 30.0)
        if select.select([sock], [], [], 5)[0]:
            sock.settimeout(30.0)
            return sock
        sock.close()
    return None


@pytest.fixture(params=["", "busy"], ids=["idle guest", "busy guest"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[AsHost, int]]:
    rig = HostRig(tmp_path, REAL_RUNTIME, sandbox="required", memory_mib=256).start()
    ident = str(uuid.uuid4())
    boot = KernelBoot(kernel=str(guests.build_guest("share")), cmdline=request.param)
    toolstack = rig.connect()
    toolstack.create(DomainSpec(uuid=ident, name="share", memory_mib=8, owner="tests", boot=boot))
    toolstack.unpause(ident)
    line = until(lambda: [x for x in toolstack.console_log(ident).split(b"\r\n") if b"share: port " in x], "its port")
    toolstack.close()
    rig.kill()
    made = AsHost(rig, ident)
    yield made, int(line[0].split()[-1])
    made.close()
    rig.stop()


EXCHANGE = """
def exchange(event, page):
    before = page.view[0]
    event.notify()
    import select
    while page.view[0] == before:
        assert select.select([event], [], [], 20)[0], "the guest does not answer"
        event.answer()
    return page.view[0] - before
"""


def _define(driver: Driver, source: str) -> None:
    assert driver(f"exec({source!r}, globals())") == "None"


def test_a_driver_serves_a_guest_is_killed_and_replaced(host: tuple[AsHost, int]) -> None:
    made, port = host
    number, driver = made.driver()
    _define(driver, EXCHANGE)
    assert driver("domid = link.domid; domid > 0") in ("None", "True")
    assert driver(f"page, event = link.map([{WRITABLE}])[0], link.bind({port})") == "None"
    assert driver("[exchange(event, page) for _ in range(20)] == [1] * 20") == "True"
    assert driver(f"bytes(link.map([{READABLE}], readonly=True)[0].view[:15])") == "b'only to be read'"
    assert driver(f"link.map([{READABLE}])") == "LINK -1"
    assert (
        driver(f"link.copy([Copy({READABLE}, 5, 5, 0, to_guest=False)]), bytes(link.buffer[:5])") == "([0], b'to be')"
    )
    # The guest sees that its page is in use: GTF_reading and GTF_writing.
    assert driver("page.view.__setitem__(4, 2), exchange(event, page), page.view[8]") == "(None, 1, 25)"

    driver.kill()
    _, following = made.driver()
    _define(following, EXCHANGE)
    assert following(f"page, event = link.map([{WRITABLE}])[0], link.bind({port})") == "None"
    assert following("event.answer(), event.answer()") == "(True, False)"
    assert following("[exchange(event, page) for _ in range(5)] == [1] * 5") == "True"
    assert made.request("unlink", link=number) == {"id": 1, "result": {}}, "it is gone already"
    assert made.request("unlink", link=-1)["error"]["code"]
    assert made.request("unlink", link=0) == {"id": 1, "result": {}}
    assert following("link.alive()") == "False"

    _, last = made.driver()
    _define(last, EXCHANGE)
    assert last(f"page, event = link.map([{WRITABLE}])[0], link.bind({port})") == "None"
    assert last("exchange(event, page)") == "1"
    assert made.request("pause")["result"]["state"] == DomainState.PAUSED
    assert last(f"len(link.map(range({MANY}, {MANY} + 64)))") == "64", "a paused guest's grants are there"
    assert made.request("unpause")["result"]["state"] == DomainState.RUNNING
    # The guest ends itself; the driver notices.
    assert last("page.view.__setitem__(4, 1), event.notify()") == "(None, None)"
    assert last("bool(__import__('select').select([link], [], [], 20)[0]), link.alive()") == "(True, False)"
    ends = LinkEnds.create(made.handles.memory)
    assert "ended" in made.request("link", ends.for_domain)["error"]["message"]
    ends.close()


MEASURE = """
def measure(function, times=200):
    import time
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        spent.append((time.perf_counter() - start) * 1e6)
    return spent
"""


@pytest.mark.skipif("REEVE_MEASURE" not in os.environ, reason="a measurement, not a test: set REEVE_MEASURE")
def test_measure_round_trips(host: tuple[AsHost, int], capsys: pytest.CaptureFixture[str]) -> None:
    made, port = host
    _, driver = made.driver()
    _define(driver, MEASURE)
    _define(driver, EXCHANGE)
    assert driver(f"page, event = link.map([{WRITABLE}])[0], link.bind({port})") == "None"
    assert driver(f"one, many = [{MANY}], list(range({MANY}, {MANY} + 64))") == "None"
    assert driver("copies = [Copy(r, 0, 4096, 4096 * i, to_guest=True) for i, r in enumerate(many)]") == "None"
    for what, line in {
        "copy of nothing in 1 item": "link.copy([Copy(one[0], 0, 0, 0, to_guest=False)])",
        "copy of 1 page": "link.copy(copies[:1])",
        "copy of 64 pages": "link.copy(copies)",
        "map and unmap of 1 page": "link.unmap(link.map(one))",
        "map and unmap of 64 pages": "link.unmap(link.map(many))",
        "event and answer": "exchange(event, page)",
    }.items():
        spent = sorted(float(x) for x in driver(f"measure(lambda: {line})").strip("[]").split(","))
        median, worst = statistics.median(spent), spent[int(len(spent) * 0.99)]
        with capsys.disabled():
            sys.stdout.write(f"\n{what}: {median:.0f} µs median, {worst:.0f} µs 99 %")
