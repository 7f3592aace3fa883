"""Debian guests on networks: each other, the host, and what happens when drivers and the switch are killed.

Needs Debian's packages (from the mirror or the cache), a gcc that links statically, and slirp4netns for the user
network. REEVE_NET_KILLS sets how often a process is killed in each of the tests that do so.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from net_guests import Guest, build_net_image, build_netload, driver_pid, missing, net_host, switch_pid

from hypervisor.errors import DeviceExists, NetworkUnknown
from hypervisor.toolstack.api import Toolstack
from hypervisor.toolstack.devices import DeviceState, Limits, NicSpec

pytestmark = pytest.mark.timeout(600)

LOAD_SECONDS = 8.0
KILLS = int(os.environ.get("REEVE_NET_KILLS") or 6)
TRANSFER_SECONDS = 240.0
FIRST, SECOND = "00:16:3e:00:00:0a", "00:16:3e:00:00:0b"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Place:
    """:ivar forwarded: a port of the host that leads to the first guest's 22."""

    def __init__(self, folder: Path, toolstack: Toolstack, forwarded: int) -> None:
        self.folder = folder
        self.toolstack = toolstack
        self.forwarded = forwarded


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_netload(tmp_path_factory.mktemp("netload"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, port = tmp_path_factory.mktemp("net") / "host", free_port()
    networks = ["lan internal", f"default user host_loopback=yes forward=127.0.0.1:{port}-10.0.2.15:22"]
    with net_host(folder, networks) as toolstack:
        yield Place(folder, toolstack, port)


@pytest.fixture(scope="module")
def pair(place: Place, program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, Guest]]:
    """Two guests on one network; the second may only use its address."""
    image = build_net_image(tmp_path_factory.mktemp("image"), program)
    first = Guest(place.toolstack, image, [NicSpec(0, FIRST, "lan", queues=2)])
    second = Guest(place.toolstack, image, [NicSpec(0, SECOND, "lan", addresses=("10.1.0.2",))])
    first.booted().address("10.1.0.1/24")
    second.booted().address("10.1.0.2/24")
    yield first, second
    first.destroy()
    second.destroy()


def stream(source: Guest, sink: Guest, address: str, seconds: float, meanwhile: Callable[[], None]) -> int:
    """Send checked bytes; how many arrived. `meanwhile` is called once while they flow."""
    received = sink.begin("netload sink 5000")
    sink.until(rb"LISTENING", 30)
    sent = source.begin(f"netload source {address} 5000 {seconds:g}")
    meanwhile()
    code, text = source.end(sent, seconds + TRANSFER_SECONDS)
    assert code == 0, text
    assert sink.end(received, 30)[0] == 0
    found = re.search(r"SOURCE bytes=(\d+)", text)
    assert found is not None, text
    return int(found[1])


def test_guests_reach_each_other(pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    first.run("ping -c 3 -W 10 10.1.0.2")
    second.run("ping -c 1 -W 10 -s 4000 10.1.0.1")
    assert stream(first, second, "10.1.0.2", 2, lambda: None) > 100_000
    assert stream(second, first, "10.1.0.1", 2, lambda: None) > 100_000
    first.run("[ -d /sys/class/net/eth0/queues/tx-0 ]")
    counters = first.nic()
    assert counters["tx_bytes"] > 100_000 and counters["rx_bytes"] > 100_000
    assert counters["tx_bytes"] / counters["tx_packets"] > 1500, "large frames pass whole"


def test_ipv6_with_its_offloads(pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    text = second.run("ip -6 addr show dev eth0 scope link")
    found = re.search(r"inet6 (fe80:[0-9a-f:]+)/64", text)
    assert found is not None, text
    first.run(f"ping -6 -c 2 -W 10 -I eth0 {found[1]}")


def test_a_stolen_address_is_of_no_use(pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    second.run("ip addr add 10.1.0.77/24 dev eth0")
    assert second.end(second.begin("ping -c 2 -W 2 -I 10.1.0.77 10.1.0.1"))[0] != 0
    second.run("ip addr del 10.1.0.77/24 dev eth0; ping -c 1 -W 10 10.1.0.1")
    first.run("ip link set eth0 down; ip link set eth0 address 00:16:3e:00:00:99; ip link set eth0 up")
    assert first.end(first.begin("ping -c 2 -W 2 10.1.0.2"))[0] != 0
    first.run(f"ip link set eth0 down; ip link set eth0 address {FIRST}; ip link set eth0 up; ping -c 1 -W 10 10.1.0.2")


def killing(find: Callable[[], int | None], times: int, seconds: float = 60.0) -> int:
    """Kill what `find` finds, again and again, each time another process; how often, within so many seconds."""
    done, last = 0, None
    deadline = time.monotonic() + seconds
    while done < times and time.monotonic() < deadline:
        pid = None
        with contextlib.suppress(OSError):
            pid = find()
        if pid is not None and pid != last:
            time.sleep(0.3)  # let it work
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                done, last = done + 1, pid
        time.sleep(0.02)  # a poll with a deadline
    return done


def kill_under_load(pair: tuple[Guest, Guest], find: Callable[[], int | None]) -> None:
    """`KILLS` times, while the first guest sends to the second, in as many streams as that takes."""
    first, second = pair
    kills: list[int] = []

    def kill() -> None:
        kills.append(killing(find, KILLS - sum(kills), LOAD_SECONDS - 1))

    while sum(kills) < KILLS:
        assert stream(first, second, "10.1.0.2", LOAD_SECONDS, kill) > 10_000
        assert kills[-1] > 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_driver_killed_under_load(place: Place, pair: tuple[Guest, Guest], direction: str) -> None:
    """The guest sees a pause: not a byte is lost, doubled or changed."""
    victim = pair[0] if direction == "out" else pair[1]
    before = victim.nic()["restarts"]
    kill_under_load(pair, lambda: driver_pid(place.folder, victim.uuid))
    assert victim.nic()["restarts"] == before + KILLS
    infos = {info.kind: info for info in place.toolstack.list_devices(victim.uuid)}
    assert infos["nic"].state is DeviceState.CONNECTED and not infos["nic"].detail


@pytest.mark.timeout(3600)
def test_the_switch_killed_under_load(place: Place, pair: tuple[Guest, Guest]) -> None:
    kill_under_load(pair, lambda: switch_pid(place.folder))
    pair[0].run("ping -c 1 -W 10 10.1.0.2")


def user_network(place: Place) -> None:
    if shutil.which("slirp4netns") is None:
        missing("slirp4netns is not installed")


def test_hotplug_to_the_user_network(place: Place, pair: tuple[Guest, Guest], program: Path) -> None:
    """A nic attached to a running guest: an address by DHCP, a server on the host, a port of the host, and away."""
    user_network(place)
    first, _ = pair
    nic = NicSpec(1, "00:16:3e:00:01:0a", "default", limits=Limits(bytes_per_second=50_000_000))
    place.toolstack.attach_nic(first.uuid, nic)
    first.run("n=0; until ip link set eth1 up 2>/dev/null || [ $n -gt 100 ]; do usleep 100000; n=$((n+1)); done")
    text = first.run("udhcpc -i eth1 -n -q -t 10 -s /etc/lease")
    assert "LEASE 10.0.2.15/24 via 10.0.2.2, names from 10.0.2.3" in text
    reach_the_host(first, program)
    be_reached_from_the_host(first, place.forwarded, program)
    assert first.nic("1")["tx_packets"] > 0
    place.toolstack.detach_device(first.uuid, "nic", "1", 60.0)
    # The front end has let go; its kernel takes the interface away a moment later.
    first.run(
        "n=0; while [ -d /sys/class/net/eth1 ] && [ $n -lt 100 ]; do usleep 100000; n=$((n+1)); done; [ $n -lt 100 ]"
    )
    first.run("ping -c 1 -W 10 10.1.0.2")


def reach_the_host(guest: Guest, program: Path) -> None:
    port = str(free_port())
    for mode, command in (("sink", "source"), ("give", "fetch")):
        server = subprocess.Popen([str(program), mode, port], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None and server.stdout.readline().startswith(b"LISTENING")
            text = guest.run(f"netload {command} 10.0.2.2 {port} 2", TRANSFER_SECONDS)
            found = re.search(r"bytes=(\d+)", text)
            assert found is not None and int(found[1]) > 50_000, text
            server.wait(timeout=60)
        finally:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()


def be_reached_from_the_host(guest: Guest, port: int, program: Path) -> None:
    """As SSH would: a connection to a port of the host ends at the guest's port 22."""
    done = guest.begin("netload echo 22")
    guest.until(rb"LISTENING", 30)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        for text in (b"hello", os.urandom(3000)):
            sock.sendall(text)
            back = b""
            while len(back) < len(text):
                piece = sock.recv(4096)
                assert piece, "the connection ended early"
                back += piece
            assert back == text
    assert guest.end(done)[0] == 0


def test_what_cannot_be_attached(place: Place, pair: tuple[Guest, Guest]) -> None:
    first, _ = pair
    with pytest.raises(NetworkUnknown, match="has default, lan"):
        place.toolstack.attach_nic(first.uuid, NicSpec(3, "00:16:3e:00:03:01", "nowhere"))
    with pytest.raises(DeviceExists, match="00:16:3e:00:00:0b"):
        place.toolstack.attach_nic(first.uuid, NicSpec(3, SECOND, "lan"))
    with pytest.raises(DeviceExists):
        place.toolstack.attach_nic(first.uuid, NicSpec(0, "00:16:3e:00:03:01", "lan"))
    first.run("ping -c 1 -W 10 10.1.0.2")
