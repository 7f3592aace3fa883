"""The switch against a model that remembers everything, and its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hypervisor.devices.net import switch
from hypervisor.devices.net.guard import Guard
from hypervisor.devices.net.message import GSO_TCPV4, NEEDS_CSUM, PLAIN, Header
from hypervisor.devices.net.switch import Network

NICS = [bytes((0, 22, 62, 0, 0, number)) for number in range(4)]
OUTSIDE = [bytes((2, 0, 0, 0, 0, number)) for number in range(5)]
GROUPS = [b"\xff" * 6, b"\x01\0\x5e\0\0\1"]


class Sink:
    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard
        self.got: list[bytes] = []

    def deliver(self, header: Header, data: memoryview) -> None:
        self.got.append(bytes(data))


def frame(target: bytes, source: bytes, body: bytes = b"body") -> memoryview:
    return memoryview(PLAIN + target + source + b"\x88\xb5" + body)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SwitchMachine(RuleBasedStateMachine):
    """The model: a dictionary of nics, a list of what was heard where and when."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.network = Network(self.clock)
        self.nics: dict[bytes, Sink] = {}
        self.uplinks = [Sink(), Sink()]
        for uplink in self.uplinks:
            self.network.add_uplink(uplink)
        self.heard: dict[bytes, tuple[Sink, float]] = {}
        self.number = 0

    @rule(mac=st.sampled_from(NICS))
    def add(self, mac: bytes) -> None:
        sink = Sink(Guard(mac))
        if mac in self.nics:
            with pytest.raises(ValueError, match="there already"):
                self.network.add_nic(mac, sink)
        else:
            self.network.add_nic(mac, sink)
            self.nics[mac] = sink
            self.heard.pop(mac, None)

    @rule(mac=st.sampled_from(NICS))
    def remove(self, mac: bytes) -> None:
        sink = self.nics.pop(mac, None)
        if sink is not None:
            self.network.remove(sink)

    @rule(seconds=st.sampled_from([1.0, 200.0, 301.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(
        sender=st.sampled_from([*NICS, 0, 1]),
        source=st.sampled_from([*NICS, *OUTSIDE, *GROUPS]),
        destination=st.sampled_from([*NICS, *OUTSIDE, *GROUPS, b"\x01\x80\xc2\0\0\0"]),
    )
    def send(self, sender: bytes | int, source: bytes, destination: bytes) -> None:
        port = self.uplinks[sender] if isinstance(sender, int) else self.nics.get(sender)
        if port is None:
            return
        self.number += 1
        data = frame(destination, source, self.number.to_bytes(4, "big"))
        before = {id(sink): len(sink.got) for sink in (*self.nics.values(), *self.uplinks)}
        self.network.receive(port, data)
        got = {id(sink) for sink in (*self.nics.values(), *self.uplinks) if len(sink.got) > before[id(sink)]}
        assert got == {id(sink) for sink in self.expected(port, source, destination)}

    def expected(self, port: Sink, source: bytes, target: bytes) -> list[Sink]:
        if port in self.uplinks:
            if source[0] & 1 or source in self.nics:
                return []
            self.heard[source] = (port, self.clock.now)
        elif self.nics.get(source) is not port:
            return []
        if target in self.nics:
            return [sink for sink in [self.nics[target]] if sink is not port]
        if target.startswith(b"\x01\x80\xc2"):
            return []
        if target[0] & 1:
            return [sink for sink in (*self.nics.values(), *self.uplinks) if sink is not port]
        where, when = self.heard.get(target, (None, 0.0))
        if where is not None and self.clock.now - when <= switch.AGE:
            return [where] if where is not port else []
        return [sink for sink in self.uplinks if sink is not port]

    @invariant()
    def bounded(self) -> None:
        assert self.network.learnt <= len(OUTSIDE) + len(NICS)


TestSwitch = SwitchMachine.TestCase
TestSwitch.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_table_is_bounded() -> None:
    network, uplink = Network(Clock()), Sink()
    network.add_uplink(uplink)
    for number in range(switch.MAX_LEARNT + 100):
        network.receive(uplink, frame(b"\xff" * 6, b"\x02" + number.to_bytes(5, "big")))
    assert network.learnt == switch.MAX_LEARNT


@pytest.mark.parametrize(
    "header",
    [
        Header(flags=4),
        Header(gso_type=3),
        Header(gso_type=GSO_TCPV4, gso_size=100),
        Header(NEEDS_CSUM, GSO_TCPV4, gso_size=0, csum_start=34, csum_offset=16),
        Header(NEEDS_CSUM, csum_start=0),
        Header(NEEDS_CSUM, csum_start=60, csum_offset=60),
    ],
)
def test_a_header_that_lies_is_dropped(header: Header) -> None:
    network, nic, other = Network(Clock()), Sink(Guard(NICS[0])), Sink(Guard(NICS[1]))
    network.add_nic(NICS[0], nic)
    network.add_nic(NICS[1], other)
    network.receive(nic, memoryview(header.pack() + bytes(frame(NICS[1], NICS[0], bytes(60)))[10:]))
    assert not other.got
    assert network.counters.malformed == 1


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_random_messages_do_no_harm(data: bytes) -> None:
    network, nic = Network(Clock()), Sink(Guard(NICS[0], ["10.0.0.1"]))
    network.add_nic(NICS[0], nic)
    network.add_uplink(Sink())
    network.receive(nic, memoryview(data))
