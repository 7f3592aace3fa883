"""Two domains of one host share grants and events: real sandboxed domain processes, introduced by the host process."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "guests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import build as guests
from host_rig import HostRig, kill_process, until

from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, OnEvent
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

pytestmark = pytest.mark.skipif(guests.available() is not None, reason=str(guests.available()))


class Pair:
    """Domains 1 and 2 of a host of their own."""

    def __init__(self, rig: HostRig) -> None:
        self.rig = rig
        self.toolstack: EmbeddedToolstack = rig.connect()
        self.number = 0

    def start(self, cmdline: str) -> str:
        self.number += 1
        ident = str(uuid.uuid4())
        boot = KernelBoot(kernel=str(guests.build_guest("pair")), cmdline=cmdline)
        kept = {"on_poweroff": OnEvent.PRESERVE, "on_crash": OnEvent.PRESERVE}  # what it said last is still there
        spec = DomainSpec(uuid=ident, name=f"d{self.number}", memory_mib=8, owner="tests", boot=boot, **kept)
        self.toolstack.create(spec)
        assert self.toolstack.get_domain(ident).domid == self.number
        self.toolstack.unpause(ident)
        return ident

    def says(self, ident: str, wanted: str, timeout: float = 60) -> str:
        """The line with `wanted` on its console."""

        def found() -> str | None:
            text = self.toolstack.console_log(ident).decode(errors="replace")
            lines = text.rpartition("\n")[0].splitlines()
            failed = [line for line in lines if line.startswith("FAIL")]
            assert not failed, failed
            return next((line for line in lines if wanted in line), None)

        return str(until(found, repr(wanted), timeout))

    def type(self, ident: str, line: str) -> None:
        console = self.toolstack.open_console(ident)
        console.write(line.encode() + b"\n")
        console.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    rig = HostRig(tmp_path, REAL_RUNTIME, sandbox="required", memory_mib=256)
    rig.state.mkdir()
    (rig.state / "next-domid").write_text("0")  # a new state folder begins at a random number
    made = Pair(rig.start())
    yield made
    made.toolstack.close()
    rig.stop()


def test_grants_copies_and_events(pair: Pair) -> None:
    offering = pair.start("offer peer=2")
    port = pair.says(offering, "pair: offers port").split()[-1]
    using = pair.start(f"peer=1 use port={port}")
    pair.says(using, "pair: OK")


def test_two_that_ask_each_other_at_once(pair: Pair) -> None:
    one, two = pair.start("storm peer=2"), pair.start("storm peer=1")
    for ident in (one, two):
        assert pair.says(ident, "storm over").endswith("300 good, 0 bad")


def test_the_granter_dies_while_mapped(pair: Pair) -> None:
    offering = pair.start("offer peer=2")
    pair.says(offering, "pair: offers port")
    keeping = pair.start("keep peer=1")
    pair.says(keeping, "pair: mapped 0")
    kill_process(pair.rig.process_of(offering))
    pair.type(keeping, "look")
    pair.says(keeping, "pair: sees 1234")
    pair.type(keeping, "map")
    pair.says(keeping, "pair: mapped -2")
    pair.type(keeping, "unmap")
    pair.says(keeping, "pair: unmapped 0")


def test_the_mapper_dies(pair: Pair) -> None:
    """All is given back: the next one of the same kind finds the grant unused, and the granter lives on."""
    offering = pair.start("offer peer=2")
    pair.says(offering, "pair: offers port")
    keeping = pair.start("keep peer=1")
    pair.says(keeping, "pair: mapped 0")
    pair.toolstack.destroy(keeping)
    assert pair.toolstack.get_domain(offering).state is DomainState.RUNNING
    record = pair.rig.state / "domains" / offering / "domain.log"
    until(lambda: "the link to domain 2 ends" in record.read_text(), "the granter to notice")


def test_a_neighbour_that_hangs(pair: Pair) -> None:
    """A stopped process answers nobody: the hypercall fails within a second or two, its domain goes on."""
    offering = pair.start("offer peer=2")
    port = pair.says(offering, "pair: offers port").split()[-1]
    pid = pair.rig.process_of(offering)
    os.kill(pid, signal.SIGSTOP)
    try:
        using = pair.start(f"peer=1 use port={port}")
        until(
            lambda: b"FAIL map the neighbour's page: got -1, want 0" in pair.toolstack.console_log(using),
            "the refusal",
        )
    finally:
        os.kill(pid, signal.SIGCONT)


def test_they_go_on_without_a_host_process(pair: Pair) -> None:
    one, two = pair.start("storm peer=2"), pair.start("storm peer=1")
    pair.says(one, "pair: storms")
    pair.says(two, "pair: storms")
    pair.toolstack.close()
    pair.rig.restart()
    pair.toolstack = pair.rig.connect()
    for ident in (one, two):
        assert pair.says(ident, "storm over").endswith(" 0 bad")
