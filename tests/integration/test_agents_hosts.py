"""Instructions to agents of real host processes: a standby that is taken over, a running domain that is cloned."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
from build import available, build_guest
from host_rig import kill_process, until
from moved_guest import NAMES, Site
from moving_pair import moving_pair

from hypervisor.toolstack.api import DomainState

if why := available():
    pytest.skip(why, allow_module_level=True)

RUNNING = DomainState.RUNNING


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with moving_pair(tmp_path, log_level="info") as pair:
        made = Site(tmp_path, pair)
        try:
            yield made
        finally:
            pair.clear()
            made.close()


def create(site: Site, kernel: str, cmdline: str, line: bytes) -> str:
    """A domain on the first host that has said `line`."""
    ident = str(uuid.uuid4())
    args = {"uuid": ident, "name": "web", "memory_mib": 16, "kernel": str(build_guest(kernel)), "cmdline": cmdline}
    site.call(0, "create", args)
    until(lambda: line in site.log(0, ident), "the guest to boot")
    return ident


def test_a_standby_is_taken_over_ended_and_taken_over_from_the_dead(site: Site) -> None:
    domain = create(site, "memtouch", "forever", b"memtouch:")
    options = {"interval_ms": 20}
    begun = site.call(0, "standby", {"uuid": domain, "target": NAMES[1], "options": options})
    assert begun["standby"]["phase"] == "standby" and begun["standby"]["epochs"] > 0
    taken = site.call(1, "standby_takeover", {"uuid": domain})
    assert (taken["lost_ms"], taken["source"]["dropped"]) == (0, True), taken
    assert site.pair.places(domain) == {1: RUNNING}
    site.settled()

    site.call(1, "standby", {"uuid": domain, "target": NAMES[0], "options": options})
    site.call(1, "standby_stop", {"uuid": domain})
    assert site.pair.places(domain) == {1: RUNNING}
    site.settled()

    site.call(1, "standby", {"uuid": domain, "target": NAMES[0], "options": options})
    source = site.pair.rigs[1]
    pid = source.process_of(domain)
    source.kill()
    kill_process(pid)
    taken = site.call(0, "standby_takeover", {"uuid": domain, "force": True})
    assert taken["lost_ms"] > 0 and taken["domain"]["state"] == RUNNING.value
    source.start()
    assert site.pair.places(domain)[0] is RUNNING


def test_a_running_domain_is_cloned_and_goes_on(site: Site) -> None:
    domain = create(site, "suspend", "", b"suspend: ready")
    cloned = site.call(0, "clone", {"uuid": domain, "names": ["web-2", "web-3"]})
    idents = [clone["uuid"] for clone in cloned["domains"]]
    assert len({domain, *idents}) == 3 and cloned["template_left"] == ""
    toolstack = site.pair.toolstack(site.pair.rigs[0])
    for ident in (domain, *idents):
        assert site.pair.places(ident) == {0: RUNNING}
        console = toolstack.open_console(ident)
        console.write(ident.encode() + b"\n")
        until(lambda i=ident: f"echo: {i}".encode() in site.log(0, i), "its answer")
        console.close()
    assert toolstack.template_list() == []
    for ident in idents:
        site.call(0, "destroy", {"uuid": ident})
