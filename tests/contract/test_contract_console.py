"""The console: a log that stays until destroy, and attachment in both directions."""

from __future__ import annotations

import select
import time

import kit
import pytest
from kit import Bench

from hypervisor.toolstack.api import Capability, Console, OnEvent


def read_until(console: Console, wanted: bytes, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    seen = b""
    while wanted not in seen:
        assert time.monotonic() < deadline, f"{wanted!r} not in {seen!r}"
        seen += console.read(timeout=0.2)
    return seen


def test_the_log_holds_what_the_guest_printed(bench: Bench) -> None:
    info = bench.booted()
    log = bench.toolstack.console_log(info.uuid)
    assert bench.line(info.uuid) in log
    assert bench.toolstack.console_log(info.uuid, 4) == log[-4:]
    assert bench.toolstack.console_log(info.uuid, 0) == b""


def test_the_log_is_kept_while_an_ended_domain_is_kept(bench: Bench) -> None:
    info = bench.start(kit.POWEROFF, on_poweroff=OnEvent.PRESERVE)
    bench.until(lambda: bench.toolstack.get_domain(info.uuid).shutdown_reason is not None, "it to end")
    assert bench.line(info.uuid) in bench.toolstack.console_log(info.uuid)


def test_an_attached_console_shows_the_boot(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.toolstack.create(bench.spec())
    console = bench.toolstack.open_console(info.uuid)
    try:
        assert console.read(timeout=0.05) == b""
        bench.toolstack.unpause(info.uuid)
        assert bench.line(info.uuid) in read_until(console, bench.line(info.uuid), bench.kit.boot_timeout)
    finally:
        console.close()


def test_what_is_typed_reaches_the_guest(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.booted(kit.ECHOES)
    console = bench.toolstack.open_console(info.uuid)
    try:
        console.write(b"echo hello-")
        console.write(b"guest\n")
        read_until(console, b"hello-guest", bench.kit.boot_timeout)
    finally:
        console.close()
    assert b"hello-guest" in bench.toolstack.console_log(info.uuid)


def test_fileno_polls(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.toolstack.create(bench.spec())
    console = bench.toolstack.open_console(info.uuid)
    try:
        poll = select.poll()
        poll.register(console.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        bench.toolstack.unpause(info.uuid)
        assert poll.poll(bench.kit.boot_timeout * 1000) == [(console.fileno(), select.POLLIN)]
        assert console.read(timeout=0.2) != b""
    finally:
        console.close()


def test_an_attached_console_ends_with_its_domain(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.booted()
    console = bench.toolstack.open_console(info.uuid)
    try:
        bench.toolstack.destroy(info.uuid)
        deadline = time.monotonic() + bench.kit.boot_timeout
        with pytest.raises(EOFError):
            while time.monotonic() < deadline:
                console.read(timeout=0.2)
    finally:
        console.close()


def test_a_console_can_be_attached_again(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.booted(kit.ECHOES)
    for word in (b"first", b"second"):
        console = bench.toolstack.open_console(info.uuid)
        try:
            console.write(b"echo " + word + b"\n")
            read_until(console, word, bench.kit.boot_timeout)
        finally:
            console.close()


def test_closing_a_console_does_not_stop_the_guest(bench: Bench) -> None:
    bench.needs(Capability.CONSOLE)
    info = bench.booted()
    bench.toolstack.open_console(info.uuid).close()
    assert bench.toolstack.get_domain(info.uuid).state == "running"
