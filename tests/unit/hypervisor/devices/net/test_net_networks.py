"""The option ``networks``, and what a front end may say of itself."""

from __future__ import annotations

import pytest

from hypervisor.devices.driver import DeviceBroken
from hypervisor.devices.net import frontend, networks
from hypervisor.devices.net.networks import Forward, NetworkConfig
from hypervisor.errors import SpecInvalid


def test_networks_as_configured() -> None:
    lines = [
        "default user",
        "inner internal",
        "lan tap interface=tap0 bridge=br0",
        "dpdk tap interface=tap1 ovs=br1 offload=no",
        "nat user cidr=10.9.0.0/24 mtu=9000 host_loopback=yes dns=no "
        "forward=2222-10.9.0.15:22 forward=udp:127.0.0.2:53-10.9.0.16:5353",
    ]
    assert networks.parse(lines) == {
        "default": NetworkConfig("default", "user"),
        "inner": NetworkConfig("inner", "internal"),
        "lan": NetworkConfig("lan", "tap", "tap0", "br0"),
        "dpdk": NetworkConfig("dpdk", "tap", "tap1", ovs="br1", offload=False),
        "nat": NetworkConfig(
            "nat",
            "user",
            cidr="10.9.0.0/24",
            mtu=9000,
            host_loopback=True,
            dns=False,
            forwards=(
                Forward("tcp", "127.0.0.1", 2222, "10.9.0.15", 22),
                Forward("udp", "127.0.0.2", 53, "10.9.0.16", 5353),
            ),
        ),
    }


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["default"], "give NAME"),
        ([""], "give NAME"),
        (["a/b user"], "give NAME"),
        (["a vxlan"], "give NAME"),
        (["a user", "a internal"], "twice"),
        (["a internal x=1"], "options of internal are none"),
        (["a user colour=red"], "options of user are"),
        (["a user mtu"], "KEY=VALUE"),
        (["a user mtu=20"], "576 to 65520"),
        (["a user mtu=1500 mtu=1500"], "twice"),
        (["a user dns=maybe"], "yes or no"),
        (["a user cidr=10.0.2.1/24"], "host bits"),
        (["a user cidr=10.0.2.0/30"], "/8 to /25"),
        (["a user forward=22"], "give one like"),
        (["a user forward=2222-10.0.2.15:99999"], "give one like"),
        (["a user forward=2222-192.168.1.1:22"], "not in 10.0.2.0/24"),
        (["a tap"], "interface is missing"),
        (["a tap interface=../../etc"], "no interface name"),
        (["a tap interface=t bridge=b ovs=o"], "not both"),
        (["a tap interface=t offload=0"], "yes or no"),
        (["a tap interface=t", "b tap interface=t"], "same interface"),
    ],
)
def test_networks_that_make_no_sense(lines: list[str], why: str) -> None:
    with pytest.raises(SpecInvalid, match=why):
        networks.parse(lines)


LINUX = {
    "request-rx-copy": "1",
    "feature-rx-notify": "1",
    "feature-sg": "1",
    "feature-gso-tcpv4": "1",
    "feature-gso-tcpv6": "1",
    "feature-ipv6-csum-offload": "1",
    "tx-ring-ref": "8",
    "rx-ring-ref": "9",
    "event-channel-tx": "11",
    "event-channel-rx": "12",
}


def test_linux_front_end() -> None:
    assert frontend.read(LINUX.get, 8) == {
        "queues": [{"tx_ref": 8, "rx_ref": 9, "tx_port": 11, "rx_port": 12}],
        "offloads": {"sg": True, "gso4": True, "gso6": True, "csum4": True, "csum6": True},
        "multicast": False,
    }


def test_front_end_with_little() -> None:
    nodes = {
        "request-rx-copy": "1",
        "feature-rx-notify": "1",
        "feature-no-csum-offload": "1",
        "multi-queue-num-queues": "2",
        **{
            f"queue-{number}/{name}": str(number * 10 + 5)
            for number in (0, 1)
            for name in ("tx-ring-ref", "rx-ring-ref")
        },
        "queue-0/event-channel": "3",
        "queue-1/event-channel": "4",
        "request-multicast-control": "1",
    }
    assert frontend.read(nodes.get, 8) == {
        "queues": [
            {"tx_ref": 5, "rx_ref": 5, "tx_port": 3, "rx_port": 3},
            {"tx_ref": 15, "rx_ref": 15, "tx_port": 4, "rx_port": 4},
        ],
        "offloads": {"sg": False, "gso4": False, "gso6": False, "csum4": False, "csum6": False},
        "multicast": True,
    }


@pytest.mark.parametrize(
    ("node", "value", "why"),
    [
        ("request-rx-copy", None, "page flipping"),
        ("feature-rx-notify", "0", "feature-rx-notify"),
        ("tx-ring-ref", None, "tx-ring-ref is missing"),
        ("tx-ring-ref", "-1", "tx-ring-ref is '-1'"),
        ("tx-ring-ref", "9" * 1000, "tx-ring-ref is '9"),
        ("rx-ring-ref", "٣", "rx-ring-ref"),
        ("event-channel-rx", None, "event-channel-rx is missing"),
        ("event-channel-tx", "200000", "event-channel-tx"),
        ("multi-queue-num-queues", "0", "multi-queue-num-queues is '0'"),
        ("multi-queue-num-queues", "9", "multi-queue-num-queues is '9'"),
        ("multi-queue-num-queues", "2", "queue-0/event-channel is missing"),
    ],
)
def test_front_ends_that_make_no_sense(node: str, value: str | None, why: str) -> None:
    nodes: dict[str, str | None] = {**LINUX, node: value}
    with pytest.raises(DeviceBroken, match=why):
        frontend.read(nodes.get, 8)
