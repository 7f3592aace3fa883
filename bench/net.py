"""What a guest's network does: in Reeve and in QEMU TCG with virtio-net, with the same kernel.

Two guests on each side, each with two nics: one to the other guest, one to the host (Reeve: its switch,
slirp4netns; QEMU: a socket between the two processes, libslirp inside). A small C program sends checked bytes over
one TCP connection, or one byte there and back, and measures with the guest's own clock. While one side works the other
is idle.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import (
    PROMPT,
    READY,
    BenchFailed,
    Result,
    count,
    median,
    packaged_image,
    parser,
    positive,
    qemu_version,
    rounded,
    run,
    say,
)
from sides import Meter, Node, QemuGuest, Terminal, describe

from agent.images import Image
from hypervisor.toolstack.devices import NicSpec

SOURCE = Path(__file__).resolve().parents[1] / "tests" / "guests" / "net" / "netload.c"
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "drivers/net/xen-netfront.ko",
)
"""In the order in which they depend on each other; those of the other side load and find nothing."""
START = "#!/bin/busybox sh\n" + "".join(
    f"/bin/busybox insmod /lib/bench/{Path(module).name} 2>/dev/null\n" for module in MODULES
)
NETWORKS = "networks = lan internal\nnetworks = default user host_loopback=yes\n"
HOST = "10.0.2.2"
SIDES = ("reeve", "qemu_tcg")
NAMES = {
    "guest_to_guest": ("MiB/s", "one TCP connection between two guests"),
    "guest_to_host": ("MiB/s", "one TCP connection from a guest to the host"),
    "host_to_guest": ("MiB/s", "one TCP connection from the host to a guest"),
    "guest_guest_rtt": ("us", "one byte to another guest and back over TCP"),
    "guest_host_rtt": ("us", "one byte to the host and back over TCP"),
}


class Side:
    """Two guests that know each other. :ivar program: netload, on the host."""

    def __init__(
        self, first: Terminal, second: Terminal, meter: Meter, program: Path, options: argparse.Namespace
    ) -> None:
        self.first = first
        self.second = second
        self._meter = meter
        self._program = program
        self._options = options
        self._used = 0.0

    def set_up(self) -> None:
        for number, guest in enumerate((self.first, self.second)):
            guest.until(READY, self._options.timeout)
            guest.until(PROMPT, self._options.timeout)
            for name, address in (("eth0", f"10.1.0.{number + 1}"), ("eth1", f"10.0.2.{number + 15}")):
                found = f"[ -d /sys/class/net/{name} ]"
                self.say_and_wait(guest, f"n=0; until {found} || [ $n -gt 100 ]; do usleep 100000; n=$((n+1)); done")
                self.say_and_wait(guest, f"ip addr add {address}/24 dev {name}; ip link set {name} up")

    def say_and_wait(self, guest: Terminal, command: str, seconds: float = 60.0) -> str:
        """:returns: what it printed."""
        guest.type(f"{command}; echo DO''NE\r".encode())
        text = guest.until(rb"DONE\r?\n|NETLOAD-[A-Z]+[^\n]*\n", seconds).decode(errors="replace")
        if failed := re.search(r"NETLOAD-[A-Z]+.*", text):
            raise BenchFailed(f"{guest.label}: {failed[0]}")
        guest.until(PROMPT, seconds)
        return text

    def measure(self, name: str) -> tuple[float, float]:
        """(one figure in the unit of `NAMES`, us of CPU time for each MiB or round trip)."""
        seconds, options = f"{self._options.time:g}", self._options
        port = str(free_port())
        if name == "guest_to_guest":
            with self._guest_server(f"netload sink {port}"):
                text = self._client(f"netload source 10.1.0.2 {port} {seconds}")
        elif name == "guest_guest_rtt":
            with self._guest_server(f"netload echo {port}"):
                text = self._client(f"netload rtt 10.1.0.2 {port} {options.count}")
        else:
            mode = {"guest_to_host": "sink", "host_to_guest": "give", "guest_host_rtt": "echo"}[name]
            with self._host_server(mode, port):
                client = {"sink": f"source {HOST} {port} {seconds}", "give": f"fetch {HOST} {port} {seconds}"}
                text = self._client(f"netload {client.get(mode, f'rtt {HOST} {port} {options.count}')}")
        found, amount = figure(name, text)
        return found, self._used * 1e6 / amount

    def _client(self, command: str) -> str:
        self._meter.start()
        try:
            return self.say_and_wait(self.first, command, self._options.timeout + 20 * self._options.time)
        finally:
            self._used = self._meter.stop()

    @contextlib.contextmanager
    def _guest_server(self, command: str) -> Iterator[None]:
        self.second.type(f"{command}; echo DO''NE\r".encode())
        self.second.until(rb"LISTENING", 60)
        yield
        self.second.until(rb"DONE\r?\n", self._options.timeout)
        self.second.until(PROMPT, 60)

    @contextlib.contextmanager
    def _host_server(self, mode: str, port: str) -> Iterator[None]:
        server = subprocess.Popen([str(self._program), mode, port], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield
        finally:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()


def figure(name: str, text: str) -> tuple[float, float]:
    """What netload printed, and how many MiB or round trips it were. :raises BenchFailed: something else."""
    if name.endswith("_rtt"):
        found = re.search(r"RTT count=(\d+) us=([0-9.]+)", text)
        if found and float(found[2]) > 0 and int(found[1]) > 0:
            return float(found[2]), float(found[1])
    else:
        found = re.search(r"(?:SOURCE|FETCH) bytes=(\d+) seconds=([0-9.]+)", text)
        if found and float(found[2]) > 0 and int(found[1]) > 0:
            mib = int(found[1]) / (1 << 20)
            return mib / float(found[2]), mib
    raise BenchFailed(f"{name}: the guest printed no figure, but {text[-200:]!r}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def compile_netload(folder: Path) -> Path:
    """:raises BenchFailed: there is no compiler, or it refuses."""
    target = folder / "netload"
    if shutil.which("gcc") is None:
        raise BenchFailed(
            "gcc is not installed, and the program to measure with is in C: apt-get install gcc libc6-dev"
        )
    command = ["gcc", "-std=gnu11", "-static", "-O2", "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise BenchFailed(f"gcc refuses {SOURCE.name}: {done.stderr[:300]}")
    return target


def net_image(images: Path, program: Path, folder: Path) -> Image:
    """:raises ImageError: it cannot be made."""
    start = folder / "start"
    start.write_text(START)
    start.chmod(0o755)
    digest = hashlib.sha256(SOURCE.read_bytes() + START.encode()).hexdigest()[:8]
    add = [(program, "/bin/netload"), (start, "/etc/init.d/net")]
    return packaged_image(images, f"bench-net-{digest}", MODULES, add, folder)


@contextlib.contextmanager
def qemu_guests(image: Image, memory: int, folder: Path) -> Iterator[tuple[QemuGuest, QemuGuest]]:
    path = folder / "lan.sock"

    def devices(number: int) -> list[str]:
        address = f"addr.type=unix,addr.path={path}"
        return [
            *("-netdev", f"stream,id=lan,server={'off' if number else 'on'},{address}"),
            *("-device", f"virtio-net-pci,netdev=lan,mac=00:16:3e:00:00:1{number},addr=10"),
            *("-netdev", "user,id=out", "-device", f"virtio-net-pci,netdev=out,mac=00:16:3e:00:00:2{number},addr=11"),
        ]

    with QemuGuest(image, memory, devices=devices(0)) as first:
        wait_for(path.exists)
        with QemuGuest(image, memory, devices=devices(1)) as second:
            yield first, second


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not there():
        if time.monotonic() > deadline:
            raise BenchFailed("QEMU does not make its socket: see its version (7.2 or later)")
        time.sleep(0.02)


def measure(options: argparse.Namespace, folder: Path) -> Result:
    version = qemu_version()
    program = compile_netload(folder)
    image = net_image(options.images_dir, program, folder)
    with Node(folder, options.images_dir, options.timeout, NETWORKS) as node:
        say("booting two guests in Reeve, then two in QEMU")
        guests = [node.create(image, options.memory) for _ in range(2)]
        for number, guest in enumerate(guests):
            node.toolstack.attach_nic(guest.uuid, NicSpec(0, f"00:16:3e:00:00:0{number}", "lan"))
            node.toolstack.attach_nic(guest.uuid, NicSpec(1, f"00:16:3e:00:01:0{number}", "default"))
        reeve = Side(guests[0].terminal, guests[1].terminal, node.meter(), program, options)
        reeve.set_up()
        with qemu_guests(image, options.memory, folder) as (first, second):
            meter = Meter(lambda: [first.pid, second.pid])
            qemu = Side(first.terminal, second.terminal, meter, program, options)
            qemu.set_up()
            results = {name: one(name, reeve, qemu, options) for name in options.only or NAMES}
        about = describe(node, image)
        for guest in guests:
            node.destroy(guest)
    return {
        "results": results,
        "ratio": min(result["ratio"] for result in results.values()),
        "ratio_means": "how fast Reeve is compared with QEMU TCG and virtio-net: above 1, Reeve is faster; "
        "the one at the top is the worst",
        "rounds": options.rounds,
        "seconds_each": options.time,
        "memory_mib": options.memory,
        "with": about | {"qemu": version},
    }


def one(name: str, reeve: Side, qemu: Side, options: argparse.Namespace) -> Result:
    unit, what = NAMES[name]
    figures: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for label, side in zip(SIDES, (reeve, qemu), strict=True):
            value, cost = side.measure(name)
            figures[label].append(value)
            cpu[label].append(cost)
    found = {label: median(values) for label, values in figures.items()}
    costs = {label: median(values) for label, values in cpu.items()}
    better, worse = ("reeve", "qemu_tcg") if unit != "us" else ("qemu_tcg", "reeve")
    ratio = rounded(found[better] / found[worse])
    say(f"{name}: Reeve {found['reeve']:g}, QEMU TCG {found['qemu_tcg']:g} {unit}, ratio {ratio:g}")
    about: Result = {"unit": "us/round trip" if unit == "us" else "us/MiB"}
    about |= {**costs, "ratio": rounded(costs["qemu_tcg"] / costs["reeve"])}
    return {**found, "unit": unit, "ratio": ratio, "what": what, "cpu": about}


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["", "unit", "Reeve", "QEMU TCG", "ratio", "CPU", "Reeve", "QEMU TCG", "ratio"]]
    for name, found in result["results"].items():
        times = [found["cpu"][column] for column in ("unit", "reeve", "qemu_tcg", "ratio")]
        rows.append([name, found["unit"], found["reeve"], found["qemu_tcg"], found["ratio"], *times])
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", action="append", choices=list(NAMES), help="measure this; may be repeated")
    options.add_argument("--time", type=positive, default=5.0, metavar="SECONDS", help="for each rate (%(default)s)")
    options.add_argument("--count", type=count, default=500, help="round trips for each figure (%(default)s)")
    options.add_argument("--rounds", type=count, default=3, help="figures of each, of which the median counts")
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    return run(options.parse_args(argv), "net", measure, table)


if __name__ == "__main__":
    sys.exit(main())
