"""A driver process sees granted frames only: a real process under the filter tries to get at others."""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grant_rig import PERMIT, READONLY
from pv_rig import PAGE

sys.path.insert(0, str(Path(__file__).parent))
from test_guest_link import Served

from hypervisor.errors import HostFailure
from hypervisor.host import guarded_link, seccomp_guard
from hypervisor.host.guest_link_ends import LinkEnds

SUPPORT = Path(__file__).resolve().parents[3] / "support"


class Driver:
    """`tests/support/guarded_driver.py` as a process."""

    def __init__(self, rig: Served) -> None:
        ends = LinkEnds.create(rig.memfd, 1 << 16)
        self.number = rig.in_poller(lambda: rig.links.open(ends.for_domain))
        fds = ends.for_driver
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "guarded_driver.py"), *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for fd in fds:
            os.close(fd)
        assert self._answer() == "ready '' True"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "the driver does not answer"
        return self.process.stdout.readline().strip()

    def __call__(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def rig():
    if why := seccomp_guard.unavailable(ctypes.CDLL(None, use_errno=True)):
        pytest.skip(why)
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def driver(rig):
    made = Driver(rig)
    yield made
    made.kill()
    until(lambda: len(rig.links) == 0)


@pytest.fixture(scope="module")
def guarded(rig):
    """One driver for what ends none."""
    made = Driver(rig)
    yield made
    made.kill()


def pins(rig) -> int:
    return rig.in_run_loop(lambda: len(rig.domain.grants.own))


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_granted_frames_are_mapped_and_given_back(rig, driver):
    rig.grant(9, 20, domid=0)
    rig.grant(10, 21, PERMIT | READONLY, domid=0)
    rig.put(20 * PAGE, b"granted")
    assert driver("pages = link.map([9])") == "None"
    assert driver("bytes(pages[0].view[:7])") == "b'granted'"
    assert driver("pages[0].view.__setitem__(0, 71)") == "None"
    assert rig.get(20 * PAGE, 7) == b"Granted"
    assert driver("more = link.map([10, 9], readonly=True)") == "None"
    assert driver("more[1].view[0]") == "71"
    assert driver("link.unmap(pages + more)") == "None"
    assert pins(rig) == 0
    assert driver("link.map([10])") == "LINK -1"
    assert driver("[link.unmap(link.map([9, 10], readonly=True)) for _ in range(50)].count(None)") == "50"
    assert driver("link.copy([Copy(9, 0, 7, 0, to_guest=False)]), bytes(link.buffer[:7])") == "([0], b'Granted')"


MAP = "map_memory({length}, {prot}, {flags}, {fd}, {offset}, {address})"


def attempt(**changes: str) -> str:
    """An mmap of slot 3 (where page 20 was granted), changed in one thing."""
    usual = {"length": "PAGE", "prot": "RW", "flags": "SHARED | FIXED", "fd": "memory", "offset": "20 * PAGE"}
    return MAP.format(**{**usual, "address": "window.at(3)", **changes})


def test_what_was_not_granted_is_not_mapped(rig, driver):
    """A MAP request says what may be mapped: one page, once, at one place, with one kind of access."""
    rig.grant(9, 20, domid=0)
    assert driver("link._call(1 + 1, [(9, 3)])[0]") == "[(20,)]"
    for changes in (
        {"offset": "21 * PAGE"},
        {"length": "2 * PAGE"},
        {"address": "window.at(4)"},
        {"address": "window.at(3) + PAGE"},
        {"address": "window.at(3) - PAGE", "length": "3 * PAGE"},
        {"address": "None", "flags": "SHARED"},
        {"flags": "PRIVATE | FIXED"},
        {"prot": "RW | 4"},
        {"prot": "RO"},
        {"prot": "RO", "fd": "memory_ro"},
        {"fd": "memory_ro"},
    ):
        assert driver(attempt(**changes)) == "ERROR EPERM", changes
    # The kernel looks at 32 bits of the descriptor, and so must the filter.
    assert driver("call(9, window.at(3), PAGE, RO, SHARED | FIXED, memory_ro + (1 << 32), 20 * PAGE)") == "ERROR EPERM"
    assert driver(f"{attempt()} == window.at(3)") == "True"
    assert driver(attempt()) == "ERROR EPERM", "twice"


def test_a_readonly_grant_stays_so(rig, driver):
    rig.grant(10, 21, PERMIT | READONLY, domid=0)
    assert driver("pages = link.map([10], readonly=True)") == "None"
    assert driver("call(10, window.at(pages[0].slot), PAGE, RW)") == "ERROR EACCES"
    assert driver("call(28, window.at(pages[0].slot), PAGE, 9)") == "ERROR EACCES", "MADV_REMOVE"


def test_a_mapping_is_neither_moved_nor_doubled(rig, driver):
    rig.grant(9, 20, domid=0)
    assert driver("at = window.at(link.map([9])[0].slot)") == "None"
    assert driver("call(25, at, PAGE, PAGE, 1)") == "ERROR EPERM"
    assert driver("call(25, at, 0, PAGE, 1)") == "ERROR EPERM"
    assert driver("call(25, at, PAGE, PAGE, 3, window.at(50))") == "ERROR EPERM"
    assert driver("call(25, link._buffer_at, PAGE, PAGE, 3, at)") == "ERROR EPERM"
    assert driver("call(25, link._buffer_at, PAGE, PAGE, 5)") == "ERROR EPERM"


def test_a_grant_is_given_back_only_when_nothing_maps_it(rig, driver):
    rig.grant(9, 20, domid=0)
    assert driver("page = link.map([9])[0]") == "None"
    # Not from another thread, whose munmap could overtake or be overtaken.
    assert driver("in_thread(lambda: unmap_memory(window.at(page.slot), PAGE))") == "ERROR EPERM"
    assert driver("unmap_memory(window.at(page.slot), 2 * PAGE)") == "ERROR EPERM"
    assert driver("unmap_memory(window.address, STRIDE * 100)") == "ERROR EPERM"
    # Unmapped, but nothing proves yet that the munmap is over; other threads' calls do not.
    assert driver("unmap_memory(window.at(page.slot), PAGE)") == "None"
    assert driver("in_thread(window.settle)") == "None"
    assert driver("link._call(3, [(page.slot,)])").startswith("LINK"), "the link has ended"
    assert pins(rig) == 1
    assert driver("window.settle()") == "None"
    assert pins(rig) == 1, "it is given back with the process now"
    driver.kill()
    until(lambda: len(rig.links) == 0)
    assert pins(rig) == 0


def test_a_driver_that_hangs_up_but_keeps_its_mapping(rig, driver):
    rig.grant(9, 20, domid=0)
    port = rig.unbound()
    assert driver(f"page = link.map([9])[0], link.bind({port})") == "None"
    assert driver("link._socket.close()") == "None"
    until(lambda: rig.in_run_loop(lambda: rig.domain.events.status(port).state.name) == "UNBOUND")
    rig.put(20 * PAGE, b"still")
    assert driver("bytes(page[0].view[:5])") == "b'still'"
    assert pins(rig) == 1 and len(rig.links) == 1
    assert driver(attempt()) == "ERROR EPERM"
    driver.kill()
    until(lambda: len(rig.links) == 0)
    assert pins(rig) == 0


def test_kernels_without_it(rig, monkeypatch):
    """No guard: a warning that goes into the report, or a refusal."""

    class Old:
        def syscall(self, *_arguments: object) -> int:
            return -1

    reason = seccomp_guard.unavailable(Old())  # type: ignore[arg-type]
    assert "user notification" in reason
    monkeypatch.setattr(seccomp_guard, "unavailable", lambda _libc: reason)
    with pytest.raises(HostFailure, match="sandbox=auto"):
        guarded_link.connect(-1, -1, -1, -1, required=True)
    ends = LinkEnds.create(rig.memfd, 1 << 16)
    rig.in_poller(lambda: rig.links.open(ends.for_domain))
    link, missing = guarded_link.connect(*ends.for_driver, required=False)
    assert "sees all of its guest's memory" in missing
    rig.grant(9, 20, domid=0)
    link.unmap(link.map([9]))
    link.close()


def test_more_mappings_than_a_window_has(rig, driver):
    """A window has an end; what was mapped goes back."""
    refs = [rig.grant(ref, 20 + ref % 8, domid=0) for ref in range(16, 116)]
    assert driver(f"full = link.map({refs} * 80)") == "None"
    assert driver("len(full)") == "8000"
    assert driver(f"link.map({refs} * 2)") == "LINK 0"
    assert driver("link.unmap(full)") == "None"
    assert pins(rig) == 0


def test_nothing_is_mapped_without_a_request(guarded):
    assert guarded(attempt()) == "ERROR EPERM"
    assert guarded("map_memory(PAGE, RO, PRIVATE, memory, 0)") == "ERROR EPERM"
    assert guarded("map_memory(PAGE, RO, SHARED, memory_ro, 0)") == "ERROR EPERM"
    assert guarded("len(mmap.mmap(-1, 1 << 20))") == str(1 << 20), "its own memory is its own affair"


@pytest.mark.parametrize(
    "line",
    [
        "os.read({fd}, 8)",
        "os.pread({fd}, 8, 0)",
        "os.preadv({fd}, [bytearray(8)], 0)",
        "os.readv({fd}, [bytearray(8)])",
        "os.write({fd}, b'x')",
        "os.pwrite({fd}, b'x', 0)",
        "os.pwritev({fd}, [b'x'], 0)",
        "os.dup({fd})",
        "os.dup2({fd}, 90)",
        "call(33, {fd}, 90)",
        "call(72, {fd}, 1030, 0)",
        "call(292, {fd}, 90, 0)",
        "call(0, {fd} + (1 << 32), link._buffer_at, 8)",
        "os.sendfile(sock, {fd}, 0, 8)",
        "call(275, {fd}, 0, sock, 0, 8, 0)",
        "call(326, {fd}, 0, sock, 0, 8, 0)",
        "call(77, {fd}, 0)",
        "call(285, {fd}, 3, 0, PAGE)",
        "call(216, link._buffer_at, PAGE, 0, 1, 0)",
        "os.open('/proc/self/fd/%d' % {fd}, os.O_RDWR)",
        "call(438, 0, {fd}, 0)",
        "__import__('socket').send_fds(link._socket, [b'x'], [{fd}])",
        "call(307, sock, link._buffer_at, 1, 0)",
        "call(425, 8, link._buffer_at)",
    ],
)
@pytest.mark.parametrize("fd", ["memory", "memory_ro"])
def test_the_descriptors_are_good_for_nothing_else(guarded, line, fd):
    assert guarded(line.format(fd=fd)) == "ERROR EPERM"
