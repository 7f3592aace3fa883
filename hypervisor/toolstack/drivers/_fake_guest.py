"""The guest inside a fake domain: it boots at once, prints, reads lines and obeys control/shutdown.

Words of the kernel command line steer it: ``fake.shutdown=ignore`` (no answer to a shutdown or
reboot request), ``fake.boot=poweroff|reboot|crash`` (does so by itself right after its first boot),
``fake.print=TEXT`` (prints TEXT as a line while booting), ``fake.memory=keep`` (gives no memory back) or ``slow``
(`SLOW_MIB` each time somebody looks), ``fake.min=MIB`` (says that it needs so much), ``fake.vcpus=ignore`` (their
number stays), ``fake.rounds=N`` (so many rounds of copying until it can be moved) or ``never``,
``fake.devices=keep`` (does not let go of a device) or ``ignore`` (does not take one up).
"""

from __future__ import annotations

import re

from hypervisor.toolstack.api import DomainState, OnEvent, ShutdownReason
from hypervisor.toolstack.devices import DeviceState
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store

SLOW_MIB = 16
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
        follow(store, domain)
        _read_lines(store, domain)


def follow(store: Store, domain: FakeDomain) -> None:
    """Take up what the toolstack wrote into xenstore: vCPUs, the balloon's target, devices."""
    if option(domain, "vcpus") != "ignore":
        domain.online = domain.wanted_vcpus
    how = option(domain, "memory")
    if how == "" or (how == "keep" and domain.target_mib > domain.memory_mib):
        domain.memory_mib = domain.target_mib
    if option(domain, "devices") != "ignore":
        for device in domain.devices.values():
            device.update(state=DeviceState.CONNECTED)
    store.put(domain)


def looked_at(store: Store, domain: FakeDomain) -> None:
    """A slow balloon gets a step further."""
    left = domain.target_mib - domain.memory_mib
    if left and domain.state is DomainState.RUNNING and option(domain, "memory") == "slow":
        domain.memory_mib += max(-SLOW_MIB, min(SLOW_MIB, left))
        store.put(domain)


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
    """Build it anew from its spec and run it; the UUID and the console log stay, the domid changes.

    Without room it is as with the embedded driver: what ran is gone, the domain holds nothing and can be reset.
    """
    free = store.free_mib(without=domain)
    if domain.spec.memory_mib > free:
        domain.state, domain.shutdown_reason = DomainState.CRASHED, ShutdownReason.CRASH
        domain.detail = f"restart failed: it needs {domain.spec.memory_mib} MiB, {free} MiB are free"
        domain.memory_mib = domain.target_mib = 0
        store.put(domain)
        store.emit("crashed", domain.uuid, domain.detail)
        return
    domain.domid = store.next_domid()
    domain.state = DomainState.RUNNING
    domain.shutdown_reason = None
    domain.detail = ""
    domain.request = ""
    domain.begin_run()
    store.set_input(domain.uuid, b"")
    store.put(domain)
    store.emit("rebooted", domain.uuid)
    text = BANNER.format(name=domain.spec.name, cmdline=domain.spec.boot.cmdline)
    domain.boots += 1
    store.print(domain.uuid, text.encode() + PROMPT)
    follow(store, domain)
