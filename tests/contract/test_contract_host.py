"""The host as a whole: capacity, the list, foreign domains, events, connections."""

from __future__ import annotations

import threading

import kit
import pytest
from kit import Bench

from hypervisor.toolstack.api import Capability, DomainEvent, DomainState, HostInfo, Toolstack

ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})


def test_it_is_a_toolstack(bench: Bench) -> None:
    assert isinstance(bench.toolstack, Toolstack)
    assert bench.toolstack.name == bench.kit.name


def test_host_info(bench: Bench) -> None:
    info = bench.toolstack.host_info()
    assert info.driver == bench.toolstack.name
    assert info.hostname and info.driver_version
    assert info.cpus >= 1
    assert 0 < info.memory_free_mib <= info.memory_total_mib
    assert info.domains == 0
    assert set(info.capabilities) == {item.value for item in bench.toolstack.capabilities()}
    assert HostInfo.from_json(info.to_json()) == info


def test_an_empty_host_has_no_domains(bench: Bench) -> None:
    assert bench.toolstack.list_domains() == []


def test_the_list_is_ordered_by_domid(bench: Bench) -> None:
    made = [bench.toolstack.create(bench.spec()) for _ in range(3)]
    bench.toolstack.destroy(made[0].uuid)
    made.append(bench.toolstack.create(bench.spec()))
    listed = bench.toolstack.list_domains()
    assert [info.uuid for info in listed] == [info.uuid for info in made[1:]]
    domids = [info.domid for info in listed]
    assert domids == sorted(set(domids))


def test_foreign_domains_are_listed_and_left_alone(bench: Bench) -> None:
    foreign = bench.spec(name="foreign", owner="")
    if bench.kit.add_foreign is not None:
        bench.kit.add_foreign(foreign)
    else:
        bench.toolstack.create(foreign)
    before = bench.toolstack.get_domain(foreign.uuid)
    assert before.owner == ""
    ours = bench.booted()
    assert {info.uuid for info in bench.toolstack.list_domains()} == {foreign.uuid, ours.uuid}
    bench.toolstack.destroy(ours.uuid)
    after = bench.toolstack.get_domain(foreign.uuid)
    assert (after.state, after.domid, after.owner) == (before.state, before.domid, "")


def test_closing_a_connection_touches_no_domain(bench: Bench) -> None:
    other = bench.kit.connect()
    info = other.create(bench.spec())
    other.unpause(info.uuid)
    other.close()
    assert bench.toolstack.get_domain(info.uuid).state is DomainState.RUNNING


def test_two_connections_see_the_same(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    other = bench.kit.connect()
    try:
        assert other.list_domains() == bench.toolstack.list_domains()
        assert other.get_spec(info.uuid) == bench.toolstack.get_spec(info.uuid)
    finally:
        other.close()


def test_domains_survive_the_host_process(bench: Bench) -> None:
    bench.needs(Capability.ADOPTION)
    if bench.kit.restart_host is None:
        pytest.skip(f"the {bench.kit.name} kit cannot restart its host")
    running = bench.booted(kit.ECHOES)
    paused = bench.toolstack.create(bench.spec())
    bench.kit.restart_host()
    other = bench.kit.connect()
    try:
        assert other.get_domain(running.uuid).state is DomainState.RUNNING
        assert other.get_domain(running.uuid).domid == running.domid
        assert other.get_domain(paused.uuid).state is DomainState.PAUSED
        assert bench.line(running.uuid) in other.console_log(running.uuid)
        console = other.open_console(running.uuid)
        console.write(b"echo still-here\n")
        bench.until(lambda: b"still-here" in other.console_log(running.uuid), "the guest to answer")
        console.close()
    finally:
        other.close()
    bench.toolstack.close()
    bench.toolstack = bench.kit.connect()


class Events:
    """A listener that keeps what it heard and can be waited for."""

    def __init__(self) -> None:
        self.heard: list[DomainEvent] = []
        self.changed = threading.Condition()

    def __call__(self, event: DomainEvent) -> None:
        with self.changed:
            self.heard.append(event)
            self.changed.notify_all()

    def kinds(self, uuid: str) -> list[str]:
        with self.changed:
            return [event.kind for event in self.heard if event.uuid == uuid]

    def wait_for(self, uuid: str, kind: str, timeout: float) -> None:
        with self.changed:
            arrived = self.changed.wait_for(
                lambda: any(event.uuid == uuid and event.kind == kind for event in self.heard), timeout
            )
        assert arrived, f"no {kind}: {self.heard}"


def in_order(wanted: list[str], heard: list[str]) -> bool:
    rest = iter(heard)
    return all(kind in rest for kind in wanted)


def test_events_tell_a_domains_life_in_order(bench: Bench) -> None:
    events = Events()
    stop = bench.toolstack.subscribe(events)
    try:
        info = bench.booted(kit.OBEYS)
        bench.toolstack.pause(info.uuid)
        bench.toolstack.unpause(info.uuid)
        bench.toolstack.shutdown(info.uuid)
        events.wait_for(info.uuid, "destroyed", bench.kit.boot_timeout)
    finally:
        stop()
    wanted = ["created", "unpaused", "paused", "unpaused", "shutdown", "destroyed"]
    assert in_order(wanted, events.kinds(info.uuid)), events.kinds(info.uuid)
    times = [event.time for event in events.heard]
    assert times == sorted(times)


def test_events_tell_of_crash_and_reboot(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    events = Events()
    stop = bench.toolstack.subscribe(events)
    try:
        crashed = bench.start(kit.CRASHES)
        events.wait_for(crashed.uuid, "crashed", bench.kit.boot_timeout)
        rebooted = bench.booted(kit.OBEYS)
        bench.toolstack.reboot(rebooted.uuid)
        events.wait_for(rebooted.uuid, "rebooted", bench.kit.boot_timeout)
    finally:
        stop()
    assert "destroyed" not in events.kinds(crashed.uuid)


def test_no_event_after_unsubscribe(bench: Bench) -> None:
    stopped, kept = Events(), Events()
    stop = bench.toolstack.subscribe(stopped)
    stop_kept = bench.toolstack.subscribe(kept)
    stop()
    try:
        info = bench.toolstack.create(bench.spec())
        kept.wait_for(info.uuid, "created", bench.kit.boot_timeout)
    finally:
        stop_kept()
    assert stopped.heard == []


def test_a_listener_that_fails_harms_no_other(bench: Bench) -> None:
    def fails(_event: DomainEvent) -> None:
        raise RuntimeError("a listener's own mistake")

    events = Events()
    stops = [bench.toolstack.subscribe(fails), bench.toolstack.subscribe(events)]
    try:
        first = bench.toolstack.create(bench.spec())
        second = bench.toolstack.create(bench.spec())
        events.wait_for(first.uuid, "created", bench.kit.boot_timeout)
        events.wait_for(second.uuid, "created", bench.kit.boot_timeout)
    finally:
        for stop in stops:
            stop()


def test_events_of_another_connection_are_heard(bench: Bench) -> None:
    events = Events()
    stop = bench.toolstack.subscribe(events)
    other = bench.kit.connect()
    try:
        info = other.create(bench.spec())
        events.wait_for(info.uuid, "created", bench.kit.boot_timeout)
    finally:
        other.close()
        stop()
