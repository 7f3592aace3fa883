"""Guests on a Linux bridge and on Open vSwitch, by TAPs: two hosts that meet on the bridge, and a machine beyond it.

All of it in network namespaces of the test's own, so it needs root. The first host makes its TAP itself; the second has
no CAP_NET_ADMIN and finds one that was made for it. Needs what test_net.py needs, iproute2, and for Open vSwitch
Debian's openvswitch-switch, whose daemons the test runs with files of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_guests import Guest, build_net_image, build_netload, driver_pid, net_host, switch_pid
from test_net import killing, stream

from agent.images import Image
from hypervisor.errors import NetworkUnknown
from hypervisor.toolstack.api import Toolstack
from hypervisor.toolstack.devices import NicSpec

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces and bridges"),
]

FIRST, SECOND = "00:16:3e:00:0b:01", "00:16:3e:00:0b:02"
BRIDGE, FAR = "10.9.0.1", "10.9.0.9"
NO_ADMIN = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
NETLOAD_SECONDS = 2


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return str(done.stdout)


class Lab:
    """A namespace with a bridge, where the hosts are, and one with a machine on the other end of a cable.

    :ivar here, far: what a command is run by, to be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tag = uuid.uuid4().hex[:8]
        self._names = [f"reeve-{tag}", f"reeve-{tag}-far"]
        self.here, self.far = (("ip", "netns", "exec", name) for name in self._names)

    def make(self) -> None:
        for name in self._names:
            run("ip", "netns", "add", name)
        run(*self.here, "ip", "link", "add", "br0", "type", "bridge")
        run(*self.here, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "eth0", "netns", self._names[1])
        for command in ("set lo up", "set cable master br0 up", "set br0 up"):
            run(*self.here, "ip", "link", *command.split())
        run(*self.here, "ip", "address", "add", f"{BRIDGE}/24", "dev", "br0")
        run(*self.far, "ip", "address", "add", f"{FAR}/24", "dev", "eth0")
        run(*self.far, "ip", "link", "set", "eth0", "up")
        # For the host that may not make one.
        for name in ("ready0", "ready1"):
            run(*self.here, "ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr", "user", "root")
            run(*self.here, "ip", "link", "set", name, "up")
        run(*self.here, "ip", "link", "set", "ready0", "master", "br0")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("bridge"))
    try:
        made.make()
    except (OSError, AssertionError) as exc:
        made.close()
        pytest.skip(f"this machine makes no network namespaces, bridges or TAPs: {exc}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_netload(tmp_path_factory.mktemp("netload"))


@pytest.fixture(scope="module")
def image(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build_net_image(tmp_path_factory.mktemp("image"), program)


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> Iterator[tuple[Toolstack, Toolstack]]:
    first = [
        "lan tap interface=made0 bridge=br0",
        "lost tap interface=made1 bridge=nowhere",
        "ovs tap interface=made2 ovs=ovsbr offload=no",
    ]
    second = [
        "lan tap interface=ready0 bridge=br0",
        "forbidden tap interface=made3 bridge=br0",
        "ovs tap interface=ready1 offload=no",
    ]
    environment = {"OVS_RUNDIR": str(lab.folder / "ovs")}
    with (
        net_host(lab.folder / "first", first, prefix=lab.here, environment=environment) as one,
        net_host(lab.folder / "second", second, prefix=(*lab.here, *NO_ADMIN)) as two,
    ):
        yield one, two


@pytest.fixture(scope="module")
def pair(hosts: tuple[Toolstack, Toolstack], image: Image) -> Iterator[tuple[Guest, Guest]]:
    guests = [
        Guest(toolstack, image, [NicSpec(0, mac, "lan")]) for toolstack, mac in zip(hosts, (FIRST, SECOND), strict=True)
    ]
    for number, guest in enumerate(guests, 1):
        guest.booted().address(f"10.9.0.{10 + number}/24")
    yield guests[0], guests[1]
    for guest in guests:
        guest.destroy()


def test_the_taps_are_ports_of_the_bridge(lab: Lab, pair: tuple[Guest, Guest]) -> None:
    ports = run(*lab.here, "ip", "-o", "link", "show", "master", "br0")
    assert {"made0", "ready0", "cable"} <= set(re.findall(r"^\d+: (\w+)", ports, re.M))
    assert "UP,LOWER_UP" in run(*lab.here, "ip", "link", "show", "made0")
    for guest in pair:
        guest.run(f"ping -c 2 -W 10 {BRIDGE}")
        guest.run(f"ping -c 2 -W 10 -s 4000 {FAR}")
    learnt = run(*lab.here, "bridge", "fdb", "show", "br", "br0")
    assert re.search(f"{FIRST} dev made0", learnt) and re.search(f"{SECOND} dev ready0", learnt)


def test_guests_of_two_hosts_meet_on_the_bridge(pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    first.run("ping -c 2 -W 10 10.9.0.12")
    assert stream(first, second, "10.9.0.12", NETLOAD_SECONDS, lambda: None) > 100_000
    assert stream(second, first, "10.9.0.11", NETLOAD_SECONDS, lambda: None) > 100_000
    counters = first.nic()
    assert counters["tx_bytes"] / counters["tx_packets"] > 1500, "large frames go to the TAP whole"


@pytest.mark.parametrize("place", ["bridge", "far"])
def test_a_guest_and_a_server_beyond_the_tap(lab: Lab, pair: tuple[Guest, Guest], program: Path, place: str) -> None:
    """Both ways, with large frames and sums that the kernel or the guest has to finish."""
    within, address = (lab.here, BRIDGE) if place == "bridge" else (lab.far, FAR)
    serve_and_reach(pair[0], within, address, program)


def serve_and_reach(guest: Guest, within: tuple[str, ...], address: str, program: Path) -> None:
    for mode, command in (("sink", "source"), ("give", "fetch")):
        server = subprocess.Popen([*within, str(program), mode, "5001"], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None and server.stdout.readline().startswith(b"LISTENING")
            text = guest.run(f"netload {command} {address} 5001 {NETLOAD_SECONDS}", 240)
            found = re.search(r"bytes=(\d+)", text)
            assert found is not None and int(found[1]) > 100_000, text
            server.wait(timeout=60)
        finally:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()


def test_a_stolen_mac_does_not_reach_the_bridge(lab: Lab, pair: tuple[Guest, Guest]) -> None:
    first, _ = pair
    stolen = "00:16:3e:00:0b:99"
    first.run(f"ip link set eth0 down; ip link set eth0 address {stolen}; ip link set eth0 up")
    assert first.end(first.begin(f"ping -c 2 -W 2 {BRIDGE}"))[0] != 0
    assert stolen not in run(*lab.here, "bridge", "fdb", "show", "br", "br0")
    first.run(f"ip link set eth0 down; ip link set eth0 address {FIRST}; ip link set eth0 up")
    first.run(f"ping -c 2 -W 10 {BRIDGE}")


def test_kills_under_load_lose_nothing(lab: Lab, pair: tuple[Guest, Guest]) -> None:
    """Of the driver, and of the switch, which has the TAP."""
    first, second = pair
    kills: list[int] = []

    def kill() -> None:
        kills.append(killing(lambda: driver_pid(lab.folder / "first", first.uuid), 3))
        kills.append(killing(lambda: switch_pid(lab.folder / "second"), 3))

    assert stream(first, second, "10.9.0.12", 6, kill) > 10_000
    assert kills == [3, 3]
    assert "made0" in run(*lab.here, "ip", "-o", "link", "show", "master", "br0")


def test_what_cannot_be(hosts: tuple[Toolstack, Toolstack], pair: tuple[Guest, Guest]) -> None:
    first, second = pair
    with pytest.raises(NetworkUnknown, match=r"bridge nowhere \(No such device\): run ip link add nowhere"):
        hosts[0].attach_nic(first.uuid, NicSpec(1, "00:16:3e:00:0b:11", "lost"))
    with pytest.raises(NetworkUnknown, match=r"made3 .*CAP_NET_ADMIN.*ip tuntap add made3"):
        hosts[1].attach_nic(second.uuid, NicSpec(1, "00:16:3e:00:0b:12", "forbidden"))
    for guest, toolstack in zip(pair, hosts, strict=True):
        assert [info.id for info in toolstack.list_devices(guest.uuid)] == ["0"]
        guest.run(f"ping -c 1 -W 10 {BRIDGE}")


@pytest.fixture(scope="module")
def ovs(lab: Lab) -> Iterator[None]:
    """Open vSwitch with its datapath in user space, which needs no module of the kernel."""
    for tool in ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install openvswitch-switch")
    folder = lab.folder / "ovs"
    folder.mkdir()
    env = {**os.environ, "OVS_RUNDIR": str(folder), "OVS_LOGDIR": str(folder), "OVS_DBDIR": str(folder)}
    database = folder / "conf.db"
    run("ovsdb-tool", "create", str(database), "/usr/share/openvswitch/vswitch.ovsschema", env=env)
    remote = f"punix:{folder}/db.sock"
    daemons = []
    try:
        with (folder / "log").open("wb") as log:
            for command in (["ovsdb-server", str(database), f"--remote={remote}"], ["ovs-vswitchd"]):
                daemons.append(
                    subprocess.Popen([*lab.here, *command], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
                end = time.monotonic() + 30
                while command[0] == "ovsdb-server" and not (folder / "db.sock").exists():
                    assert daemons[0].poll() is None and time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.02)  # a poll with a deadline
        control = (*lab.here, "ovs-vsctl", "--timeout=30")
        run(*control, "add-br", "ovsbr", "--", "set", "bridge", "ovsbr", "datapath_type=netdev", env=env)
        run(*control, "add-port", "ovsbr", "ready1", env=env)
        yield
    finally:
        for daemon in reversed(daemons):
            with contextlib.suppress(ProcessLookupError):
                daemon.terminate()
            daemon.wait(timeout=30)


def test_guests_of_two_hosts_meet_in_open_vswitch(
    ovs: None, lab: Lab, hosts: tuple[Toolstack, Toolstack], pair: tuple[Guest, Guest]
) -> None:
    """Its datapath in user space finishes no checksum and takes no large frame: hence offload=no."""
    for number, (guest, toolstack) in enumerate(zip(pair, hosts, strict=True), 1):
        toolstack.attach_nic(guest.uuid, NicSpec(1, f"00:16:3e:00:0b:2{number}", "ovs"))
        guest.address(f"10.8.0.{number}/24", 1)
    env = {**os.environ, "OVS_RUNDIR": str(lab.folder / "ovs")}
    assert "made2" in run(*lab.here, "ovs-vsctl", "--timeout=10", "list-ports", "ovsbr", env=env).split()
    first, second = pair
    first.run("ping -c 2 -W 10 10.8.0.2")
    assert stream(first, second, "10.8.0.2", NETLOAD_SECONDS, lambda: None) > 100_000
    assert stream(second, first, "10.8.0.1", NETLOAD_SECONDS, lambda: None) > 100_000
