"""Verbs on domains: states, repetition, ends of every kind, waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import kit
import pytest
from kit import Bench, assert_readable

from hypervisor import errors
from hypervisor.toolstack.api import Capability, DomainState, OnEvent, ShutdownReason, Toolstack

NOBODY = "00000000-0000-4000-8000-000000000000"
ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
RUNNING = frozenset({DomainState.RUNNING})
VERBS = ("unpause", "pause", "shutdown", "reboot", "reset", "destroy")


def state(bench: Bench, uuid: str) -> DomainState:
    return bench.toolstack.get_domain(uuid).state


def test_unpause_lets_it_run_and_again_does_nothing(bench: Bench) -> None:
    info = bench.booted()
    assert state(bench, info.uuid) is DomainState.RUNNING
    bench.toolstack.unpause(info.uuid)
    assert state(bench, info.uuid) is DomainState.RUNNING
    assert bench.toolstack.get_domain(info.uuid).domid == info.domid


def test_pause_stops_it_and_again_does_nothing(bench: Bench) -> None:
    info = bench.booted()
    bench.toolstack.pause(info.uuid)
    assert state(bench, info.uuid) is DomainState.PAUSED
    bench.toolstack.pause(info.uuid)
    assert state(bench, info.uuid) is DomainState.PAUSED
    bench.toolstack.unpause(info.uuid)
    assert state(bench, info.uuid) is DomainState.RUNNING


def test_pause_of_a_domain_that_never_ran(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    bench.toolstack.pause(info.uuid)
    assert state(bench, info.uuid) is DomainState.PAUSED


def test_a_paused_guest_answers_nothing(bench: Bench) -> None:
    info = bench.booted(kit.ECHOES)
    bench.toolstack.pause(info.uuid)
    console = bench.toolstack.open_console(info.uuid)
    try:
        console.write(b"echo are-you-there\n")
        assert console.read(timeout=0.1) == b""
        bench.toolstack.unpause(info.uuid)
        bench.until(lambda: b"are-you-there" in bench.toolstack.console_log(info.uuid), "the answer after unpause")
    finally:
        console.close()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_no_domain(bench: Bench, verb: str) -> None:
    with pytest.raises(errors.DomainNotFound) as caught:
        getattr(bench.toolstack, verb)(NOBODY)
    assert_readable(caught.value)
    assert NOBODY in caught.value.message


@pytest.mark.parametrize("look", ["get_domain", "get_spec", "console_log", "open_console"])
def test_a_look_at_no_domain(bench: Bench, look: str) -> None:
    with pytest.raises(errors.DomainNotFound):
        getattr(bench.toolstack, look)(NOBODY)


def test_destroy_frees_everything(bench: Bench) -> None:
    free = bench.toolstack.host_info().memory_free_mib
    info = bench.booted()
    bench.toolstack.destroy(info.uuid)
    with pytest.raises(errors.DomainNotFound):
        bench.toolstack.get_domain(info.uuid)
    assert bench.toolstack.list_domains() == []
    assert bench.toolstack.host_info().memory_free_mib == free
    with pytest.raises(errors.DomainNotFound):
        bench.toolstack.destroy(info.uuid)
    again = bench.toolstack.create(bench.spec(uuid=info.uuid, name=info.name))
    assert again.state is DomainState.PAUSED
    assert bench.toolstack.console_log(info.uuid) == b""


def test_destroy_of_a_domain_that_never_ran(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    bench.toolstack.destroy(info.uuid)
    assert bench.toolstack.list_domains() == []


def test_shutdown_is_obeyed_and_the_domain_destroyed(bench: Bench) -> None:
    free = bench.toolstack.host_info().memory_free_mib
    info = bench.booted(kit.OBEYS)
    bench.toolstack.shutdown(info.uuid)
    assert bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout) is None
    assert bench.toolstack.host_info().memory_free_mib == free


def test_shutdown_returns_at_once_when_the_guest_does_not_answer(bench: Bench) -> None:
    info = bench.booted(kit.WAITS)
    began = time.monotonic()
    bench.toolstack.shutdown(info.uuid)
    assert time.monotonic() - began < 5
    assert state(bench, info.uuid) is DomainState.RUNNING


def test_a_preserved_domain_keeps_what_it_held(bench: Bench) -> None:
    free = bench.toolstack.host_info().memory_free_mib
    info = bench.booted(kit.OBEYS, on_poweroff=OnEvent.PRESERVE)
    bench.toolstack.shutdown(info.uuid)
    ended = bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    assert ended is not None
    assert (ended.state, ended.shutdown_reason) == (DomainState.SHUTDOWN, ShutdownReason.POWEROFF)
    assert bench.toolstack.host_info().memory_free_mib < free
    assert bench.line(info.uuid) in bench.toolstack.console_log(info.uuid)


@pytest.mark.parametrize("verb", ["unpause", "pause", "shutdown", "reboot"])
def test_an_ended_domain_refuses(bench: Bench, verb: str) -> None:
    info = bench.start(kit.POWEROFF, on_poweroff=OnEvent.PRESERVE)
    bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    with pytest.raises(errors.WrongState) as caught:
        getattr(bench.toolstack, verb)(info.uuid)
    assert_readable(caught.value)
    assert state(bench, info.uuid) is DomainState.SHUTDOWN


def test_a_crash_is_preserved_with_its_reason(bench: Bench) -> None:
    info = bench.start(kit.CRASHES)
    ended = bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    assert ended is not None
    assert (ended.state, ended.shutdown_reason) == (DomainState.CRASHED, ShutdownReason.CRASH)


def test_a_crash_can_destroy(bench: Bench) -> None:
    info = bench.start(kit.CRASHES, on_crash=OnEvent.DESTROY)
    assert bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout) is None


def test_a_crash_is_that_domains_only(bench: Bench) -> None:
    other = bench.booted(kit.WAITS)
    info = bench.start(kit.CRASHES)
    bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    assert state(bench, other.uuid) is DomainState.RUNNING


def twice(bench: Bench, uuid: str) -> Callable[[], bool]:
    return lambda: bench.toolstack.console_log(uuid).count(bench.line(uuid)) >= 2


def test_reboot_keeps_the_uuid_and_changes_the_domid(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.booted(kit.OBEYS)
    spec = bench.toolstack.get_spec(info.uuid)
    bench.toolstack.reboot(info.uuid)
    bench.until(twice(bench, info.uuid), "the second boot")
    after = bench.toolstack.get_domain(info.uuid)
    assert after.state is DomainState.RUNNING
    assert (after.uuid, after.name, after.owner, after.memory_mib) == (
        info.uuid,
        info.name,
        info.owner,
        info.memory_mib,
    )
    assert after.domid != info.domid
    assert after.shutdown_reason is None
    assert bench.toolstack.get_spec(info.uuid) == spec
    assert len(bench.toolstack.list_domains()) == 1


def test_reboot_holds_no_memory_twice(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.booted(kit.OBEYS)
    free = bench.toolstack.host_info().memory_free_mib
    bench.toolstack.reboot(info.uuid)
    bench.until(twice(bench, info.uuid), "the second boot")
    assert bench.toolstack.host_info().memory_free_mib == free


def test_a_guests_own_reboot_restarts_it(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.start(kit.REBOOTS)
    bench.until(lambda: bench.toolstack.get_domain(info.uuid).domid != info.domid, "a new domid")
    bench.until(lambda: state(bench, info.uuid) is DomainState.RUNNING, "the domain to run again")


def test_reboot_destroys_when_the_spec_says_so(bench: Bench) -> None:
    info = bench.booted(kit.OBEYS, on_reboot=OnEvent.DESTROY)
    bench.toolstack.reboot(info.uuid)
    assert bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout) is None


def test_reboot_preserves_when_the_spec_says_so(bench: Bench) -> None:
    info = bench.booted(kit.OBEYS, on_reboot=OnEvent.PRESERVE)
    bench.toolstack.reboot(info.uuid)
    ended = bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    assert ended is not None
    assert ended.shutdown_reason is ShutdownReason.REBOOT


def test_reset_needs_no_answer_from_the_guest(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.booted(kit.WAITS)
    bench.toolstack.reset(info.uuid)
    bench.until(twice(bench, info.uuid), "the second boot")
    after = bench.toolstack.get_domain(info.uuid)
    assert (after.state, after.name) == (DomainState.RUNNING, info.name)


def test_reset_runs_a_paused_domain(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.toolstack.create(bench.spec())
    bench.toolstack.reset(info.uuid)
    bench.until(lambda: bench.line(info.uuid) in bench.toolstack.console_log(info.uuid), "it to boot")


def test_reset_runs_an_ended_domain(bench: Bench) -> None:
    bench.needs(Capability.REBOOT)
    info = bench.start(kit.CRASHES)
    bench.toolstack.wait(info.uuid, ENDED, bench.kit.boot_timeout)
    bench.toolstack.reset(info.uuid)
    bench.until(twice(bench, info.uuid), "the second boot")


def test_wait_returns_at_once_when_the_state_is_reached(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    found = bench.toolstack.wait(info.uuid, frozenset({DomainState.PAUSED}), 0)
    assert found is not None
    assert found.uuid == info.uuid


def test_wait_gives_up(bench: Bench) -> None:
    info = bench.toolstack.create(bench.spec())
    with pytest.raises(errors.OperationTimeout) as caught:
        bench.toolstack.wait(info.uuid, RUNNING, 0.05)
    assert caught.value.retryable
    assert_readable(caught.value)


def test_wait_for_no_domain_says_gone(bench: Bench) -> None:
    assert bench.toolstack.wait(NOBODY, RUNNING, 5) is None


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


@pytest.mark.parametrize(("act", "gone"), [("unpause", False), ("destroy", True)])
def test_wait_sees_what_another_connection_does(bench: Bench, act: str, gone: bool) -> None:
    info = bench.toolstack.create(bench.spec())
    thread, results = in_thread(lambda: bench.toolstack.wait(info.uuid, RUNNING, bench.kit.boot_timeout))
    other: Toolstack = bench.kit.connect()
    try:
        getattr(other, act)(info.uuid)
    finally:
        other.close()
    thread.join(bench.kit.boot_timeout + 5)
    assert len(results) == 1
    assert (results[0] is None) == gone
