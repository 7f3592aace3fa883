"""The guest inside a fake domain: it boots at once, prints, reads lines and obeys control/shutdown.

Words of the kernel command line steer it: ``fake.shutdown=ignore`` (no answer to a shutdown or
reboot request), ``fake.boot=poweroff|reboot|crash`` (does so by itself right after its first boot),
``fake.print=TEXT`` (prints TEXT as a line while booting).
"""

from __future__ import annotations

import re

from hypervisor.toolstack.api import DomainState, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store

PROMPT = b"/ # "
BANNER = "fake guest {name}: Linux version 0.0-fake\r\nCommand line: {cmdline}\r\n"
_SUM = re.compile(r"\$\(\(([0-9]{1,9})\+([0-9]{1,9})\)\)")


def option(domain: FakeDomain, key: str) -> str:
    for word in domain.spec.boot.cmdline.split():
        name, _, value = word.partition("=")
        if name == f"fake.{key}":
            return value
    return ""


def run(store: Store, domain: FakeDomain) -> None:
    """Let the guest do all it can do now. The domain is RUNNING; call inside a transaction."""
    if domain.boots == 0:
        _boot(store, domain)
    if domain.state is DomainState.RUNNING and domain.request and option(domain, "shutdown") != "ignore":
        end(store, domain, ShutdownReason(domain.request))
    if domain.state is DomainState.RUNNING:
        _read_lines(store, domain)


def _boot(store: Store, domain: FakeDomain) -> None:
    domain.boots += 1
    domain.request = ""
    text = BANNER.format(name=domain.spec.name, cmdline=domain.spec.boot.cmdline)
    if printed := option(domain, "print"):
        text += printed + "\r\n"
    store.print(domain.uuid, text.encode() + PROMPT)
    store.put(domain)
    by_itself = option(domain, "boot")
    if by_itself:
        end(store, domain, ShutdownReason(by_itself))


def _read_lines(store: Store, domain: FakeDomain) -> None:
    while domain.state is DomainState.RUNNING:
        typed = store.typed_input(domain.uuid).replace(b"\r", b"\n")
        line, newline, rest = typed.partition(b"\n")
        if not newline:
            return
        store.set_input(domain.uuid, rest)
        store.print(domain.uuid, line + b"\r\n")
        command = line.decode(errors="replace").strip()
        if command in ("poweroff", "reboot"):
            end(store, domain, ShutdownReason(command))
        elif command == "crash":
            end(store, domain, ShutdownReason.CRASH)
        else:
            store.print(domain.uuid, _answer(command).encode() + PROMPT)


def _answer(command: str) -> str:
    if not command:
        return ""
    verb, _, rest = command.partition(" ")
    if verb == "echo":
        return _SUM.sub(lambda match: str(int(match[1]) + int(match[2])), rest) + "\r\n"
    return f"sh: {verb}: not found\r\n"


def end(store: Store, domain: FakeDomain, reason: ShutdownReason, detail: str = "") -> None:
    """The domain ended with `reason`; do what its spec says about that."""
    spec = domain.spec
    if reason in (ShutdownReason.CRASH, ShutdownReason.WATCHDOG):
        action, domain.state = spec.on_crash, DomainState.CRASHED
        store.emit("crashed", domain.uuid, detail)
    else:
        action = spec.on_reboot if reason is ShutdownReason.REBOOT else spec.on_poweroff
        domain.state = DomainState.SHUTDOWN
        store.emit("shutdown", domain.uuid, reason.value)
    domain.shutdown_reason = reason
    domain.detail = detail
    domain.request = ""
    if action is OnEvent.DESTROY:
        store.delete(domain.uuid)
        store.emit("destroyed", domain.uuid, f"after {reason.value}")
    elif action is OnEvent.RESTART:
        restart(store, domain)
    else:
        store.put(domain)


def restart(store: Store, domain: FakeDomain) -> None:
    """Build it anew from its spec and run it; the UUID and the console log stay, the domid changes."""
    domain.domid = store.next_domid()
    domain.state = DomainState.RUNNING
    domain.shutdown_reason = None
    domain.detail = ""
    domain.request = ""
    store.set_input(domain.uuid, b"")
    store.put(domain)
    store.emit("rebooted", domain.uuid)
    text = BANNER.format(name=domain.spec.name, cmdline=domain.spec.boot.cmdline)
    domain.boots += 1
    store.print(domain.uuid, text.encode() + PROMPT)
    store.put(domain)
