"""How long a guest stands still when it moves between two hosts, and where that time goes.

Two host processes on this machine, each with its own state folder, its own switch and its own way out (slirp4netns). A
Debian guest writes memory at a steady rate, checks what it wrote, and sends a packet every 2 ms to a socket of this
program, which notes when it came and what the guest's own clock said. The guest goes back and forth; for each move

* ``downtime`` is the longest time between two packets by the guest's clock, less the usual one;
* ``outage`` the longest time between two that arrived, less the usual one: what a peer on the network sees;
* ``host`` what the source's host process counted from the pause to the target's word that the guest runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from common import PROMPT, READY, BenchFailed, Result, count, packaged_image, parser, positive, rounded, run, say
from sides import Terminal

from agent.images import Image
from hypervisor.errors import HostUnavailable, ToolstackError, from_json
from hypervisor.toolstack.api import DomainSpec, KernelBoot, MigrationOptions, MigrationPhase, MigrationStatus
from hypervisor.toolstack.devices import NicSpec
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack

SOURCE = Path(__file__).with_name("movebench.c")
MODULES = ("drivers/net/xen-netfront.ko",)
START = "#!/bin/busybox sh\n/bin/busybox insmod /lib/bench/xen-netfront.ko\n/bin/busybox ip link set lo up\n"
ADDRESS, HOST = "10.0.2.15", "10.0.2.2"
WHITE_PAPER_MS = (30.0, 60.0)
SETTLE_SECONDS = 0.3
"""Packets before and after a move that belong to it."""


# -- the peer


@dataclasses.dataclass(frozen=True, slots=True)
class Packet:
    """:ivar sent: by the guest's clock, `came` by ours; seconds."""

    number: int
    sent: float
    came: float


class Peer:
    """Takes the guest's packets in a thread of its own."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.port = int(self._sock.getsockname()[1])
        self.packets: list[Packet] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            data = self._sock.recv(64)
            came = time.monotonic()
            if len(data) == 16:
                number, sent = struct.unpack("<QQ", data)
                self.packets.append(Packet(number, sent / 1e9, came))

    def between(self, begin: float, end: float) -> list[Packet]:
        return [packet for packet in list(self.packets) if begin <= packet.came <= end]


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """:ivar lost: packets that never came; `repeated` those that came twice or late."""

    downtime_ms: float
    outage_ms: float
    lost: int
    repeated: int


def gap(packets: Sequence[Packet]) -> Gap:
    """:raises BenchFailed: none came."""
    if len(packets) < 20:
        raise BenchFailed("the guest's packets do not arrive: see host.log of both hosts (--keep)")
    sent = [later.sent - earlier.sent for earlier, later in itertools.pairwise(packets)]
    came = [later.came - earlier.came for earlier, later in itertools.pairwise(packets)]
    steps = [later.number - earlier.number for earlier, later in itertools.pairwise(packets)]
    return Gap(
        downtime_ms=max(0.0, max(sent) - statistics.median(sent)) * 1000,
        outage_ms=max(0.0, max(came) - statistics.median(came)) * 1000,
        lost=sum(step - 1 for step in steps if step > 1),
        repeated=sum(step < 1 for step in steps),
    )


# -- the hosts


class Host:
    """One host process."""

    def __init__(self, folder: Path, tls: dict[str, str], memory_mib: int) -> None:
        self.folder, self.state = folder, folder / "state"
        folder.mkdir()
        lines = [f"memory_mib = {memory_mib}", "networks = default user host_loopback=yes"]
        lines += [f"{name} = {value}" for name, value in tls.items()]
        (folder / "hypervisor.conf").write_text("[hypervisor]\n" + "\n".join(lines) + "\n")
        command = [sys.executable, "-m", "hypervisor.host.main", "--state-dir", str(self.state)]
        with (folder / "host.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--config-file", str(folder / "hypervisor.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.toolstack = self._connect()

    def _connect(self) -> EmbeddedToolstack:
        deadline = time.monotonic() + 60
        while True:
            toolstack = EmbeddedToolstack(self.state / "hypervisor.sock")
            try:
                toolstack.host_info()
                return toolstack
            except HostUnavailable:
                toolstack.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchFailed(f"a host process does not start: see {self.folder / 'host.log'}") from None
                time.sleep(0.05)

    def steps(self, ident: str) -> dict[str, float]:
        """Of a downtime, as the host process noted them; milliseconds."""
        record = json.loads((self.state / "migrations" / f"{ident}.json").read_text())
        return {str(name): float(value) for name, value in record["downtime"].items()}

    def stop(self) -> None:
        try:
            for info in self.toolstack.list_domains():
                self.toolstack.destroy(info.uuid)
        except ToolstackError as exc:
            say(f"{self.folder.name}: {exc}")
        self.toolstack.close()
        self._process.terminate()
        self._process.wait(timeout=30)


def authority(folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Certificates of all hosts. :raises BenchFailed: openssl is missing."""
    if shutil.which("openssl") is None:
        raise BenchFailed("openssl is not installed, and the hosts need certificates: apt-get install openssl")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    ca, key = str(folder / "ca.pem"), str(folder / "ca.key")
    openssl("req", "-x509", *new, "-subj", "/CN=bench", "-keyout", key, "-out", ca)
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    found = []
    for name in names:
        own, request, made = (str(folder / f"{name}.{end}") for end in ("key", "csr", "pem"))
        openssl("req", *new[:-2], "-subj", f"/CN={name}", "-keyout", own, "-out", request)
        openssl(
            *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-CAcreateserial"),
            *("-days", "2", "-extfile", str(folder / "san"), "-out", made),
        )
        found.append({"migration_ca": ca, "migration_certificate": made, "migration_key": own})
    return found


# -- the guest


def image(images: Path, folder: Path) -> Image:
    """:raises BenchFailed, ImageError: it cannot be made."""
    program, start = folder / "movebench", folder / "start"
    if shutil.which("gcc") is None:
        raise BenchFailed("gcc is not installed, and the guest's program is in C: apt-get install gcc libc6-dev")
    command = ["gcc", "-static", "-O2", "-Wall", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise BenchFailed(f"gcc refuses {SOURCE.name}: {done.stderr[:300]}")
    start.write_text(START)
    start.chmod(0o755)
    digest = hashlib.sha256(SOURCE.read_bytes() + START.encode()).hexdigest()[:8]
    add = [(program, "/bin/movebench"), (start, "/etc/init.d/net")]
    return packaged_image(images, f"bench-move-{digest}", MODULES, add, folder)


class Guest:
    """Where it is, `host` says; its console follows it."""

    def __init__(self, host: Host, made: Image, peer: Peer, options: argparse.Namespace) -> None:
        self.host = host
        self.uuid = str(uuid.uuid4())
        boot = KernelBoot(kernel=made.kernel, ramdisk=made.ramdisk, cmdline=made.cmdline)
        nic = NicSpec(0, f"52:54:00:{secrets.randbelow(256):02x}:{secrets.randbelow(256):02x}:01", "default")
        host.toolstack.create(
            DomainSpec(
                uuid=self.uuid,
                name=f"bench-{self.uuid[:8]}",
                boot=boot,
                memory_mib=options.memory_mib,
                vcpus=options.vcpus,
                nics=(nic,),
                owner="bench",
            )
        )
        host.toolstack.unpause(self.uuid)
        console = host.toolstack.open_console(self.uuid)
        terminal = Terminal("the guest", lambda seconds: console.read(timeout=seconds), console.write)
        terminal.until(READY, options.timeout)
        terminal.until(PROMPT, options.timeout)
        found = "[ -d /sys/class/net/eth0 ]"
        terminal.type(f"n=0; until {found} || [ $n -gt 100 ]; do usleep 100000; n=$((n+1)); done; echo U''P\r".encode())
        terminal.until(rb"UP\r?\n", options.timeout)
        terminal.type(f"ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up; echo U''P\r".encode())
        terminal.until(rb"UP\r?\n", options.timeout)
        period = int(options.period_ms * 1000)
        words = f"movebench {HOST} {peer.port} {period} {options.dirty_mib} {options.working_set_mib}"
        terminal.type(f"{words}\r".encode())
        terminal.until(rb"MOVEBENCH-STARTED", options.timeout)
        console.close()

    def check(self) -> None:
        """:raises BenchFailed: it has found its memory changed."""
        said = self.host.toolstack.console_log(self.uuid)
        if found := re.search(rb"MOVEBENCH-(WRONG|FAILED)[^\r\n]*", said):
            raise BenchFailed(f"the guest says {found[0].decode()!r}: see the console's log (--keep)")


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    status: MigrationStatus
    gap: Gap
    steps: dict[str, float]


def move(guest: Guest, target: Host, peer: Peer, options: MigrationOptions) -> Moved:
    """:raises BenchFailed: it did not move."""
    here, there = guest.host.toolstack, target.toolstack
    ident, token = str(uuid.uuid4()), secrets.token_hex(16)
    time.sleep(SETTLE_SECONDS)
    begin = time.monotonic()
    offer = here.migration_offer(guest.uuid)
    ticket = there.migration_prepare(offer, ident=ident, token=token, owner="bench", peer="here")
    here.migration_start(guest.uuid, ident=ident, token=token, ticket=ticket, options=options, peer="there")
    while not (status := here.migration_status(ident)).phase.ended:
        time.sleep(0.02)
    if status.phase is not MigrationPhase.MOVED:
        why = from_json(status.error).message if status.error else "nothing is said"
        raise BenchFailed(f"the guest did not move ({status.phase}): {why}")
    while not there.migration_status(ident).phase.ended:
        time.sleep(0.02)
    time.sleep(SETTLE_SECONDS)
    packets = peer.between(begin - SETTLE_SECONDS / 2, time.monotonic())
    steps = guest.host.steps(ident)
    for toolstack in (here, there):
        toolstack.migration_forget(ident)
    guest.host = target
    guest.check()
    return Moved(status, gap(packets), steps)


# -- the result


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def figures(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": rounded(statistics.median(values)),
        "p99": rounded(percentile(values, 0.99)),
        "max": rounded(max(values)),
    }


def measure(options: argparse.Namespace, folder: Path) -> Result:
    os.nice(-options.priority) if options.priority else None
    peer = Peer()
    made = image(options.images_dir, folder)
    names = ("a", "b")
    hosts = []
    try:
        for name, tls in zip(names, authority(folder, names), strict=True):
            hosts.append(Host(folder / name, tls, options.memory_mib * 2 + 256))
        say(f"booting a guest of {options.memory_mib} MiB with {options.vcpus} vCPUs")
        guest = Guest(hosts[0], made, peer, options)
        asked = MigrationOptions(downtime_ms=options.downtime_ms, compress=options.compress)
        moves = []
        for number in range(options.moves):
            moves.append(move(guest, hosts[(number + 1) % 2], peer, asked))
            last = moves[-1]
            say(
                f"{number + 1}: downtime {last.gap.downtime_ms:.1f} ms, outage {last.gap.outage_ms:.1f} ms, "
                f"{last.gap.lost} packets lost, {last.status.rounds} rounds, {last.status.total_s:.2f} s"
            )
    finally:
        for host in hosts:
            host.stop()
    return result(moves, options)


def result(moves: Sequence[Moved], options: argparse.Namespace) -> Result:
    downtime, outage = figures([m.gap.downtime_ms for m in moves]), figures([m.gap.outage_ms for m in moves])
    names = list(dict.fromkeys(name for m in moves for name in m.steps))
    return {
        "memory_mib": options.memory_mib,
        "vcpus": options.vcpus,
        "dirty_mib_per_second": options.dirty_mib,
        "period_ms": options.period_ms,
        "moves": len(moves),
        "downtime_ms_median": downtime["median"],
        "downtime_ms_p99": downtime["p99"],
        "downtime_ms": downtime,
        "outage_ms": outage,
        "host_ms": figures([m.status.downtime_ms for m in moves]),
        "steps_ms_median": {name: rounded(statistics.median(m.steps.get(name, 0.0) for m in moves)) for name in names},
        "packets_lost": sum(m.gap.lost for m in moves),
        "packets_repeated": sum(m.gap.repeated for m in moves),
        "total_s": rounded(statistics.median(m.status.total_s for m in moves)),
        "bytes": int(statistics.median(m.status.bytes_sent for m in moves)),
        "rounds": statistics.median(m.status.rounds for m in moves),
        "white_paper_downtime_ms": list(WHITE_PAPER_MS),
    }


def table(found: Result) -> list[list[object]]:
    rows: list[list[object]] = [["what", "median", "p99", "max"]]
    for name, text in (
        ("downtime_ms", "downtime, guest's clock, ms"),
        ("outage_ms", "outage, peer's clock, ms"),
        ("host_ms", "pause to run, hosts, ms"),
    ):
        rows.append([text, found[name]["median"], found[name]["p99"], found[name]["max"]])
    rows.append(["the white paper's downtime, ms", *WHITE_PAPER_MS, ""])
    rows.append(["all of a move, s", found["total_s"], "", ""])
    rows.append(["sent, MiB", rounded(found["bytes"] / (1 << 20)), "", ""])
    rows += [[f"  {name}", value, "", ""] for name, value in found["steps_ms_median"].items()]
    return rows


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--moves", type=count, default=50, help="back and forth, altogether (%(default)s)")
    made.add_argument("--memory-mib", type=int, default=256, metavar="MIB", help="of the guest (%(default)s)")
    made.add_argument("--vcpus", type=int, default=1, metavar="N", help="of the guest (%(default)s)")
    made.add_argument("--dirty-mib", type=int, default=20, metavar="MIB", help="written each second (%(default)s)")
    made.add_argument(
        "--working-set-mib",
        type=int,
        default=64,
        metavar="MIB",
        help="of which this much again and again (%(default)s)",
    )
    made.add_argument("--period-ms", type=positive, default=2.0, metavar="MS", help="between packets (%(default)s)")
    made.add_argument(
        "--downtime-ms", type=positive, default=30.0, metavar="MS", help="that is asked for (%(default)s)"
    )
    made.add_argument("--compress", choices=["none", "zstd"], default="none", help="of pages (%(default)s)")
    made.add_argument(
        "--priority", type=int, default=0, metavar="N", help="run everything with nice -N, on a machine that is busy"
    )
    return run(made.parse_args(), "migration", measure, table)


if __name__ == "__main__":
    sys.exit(main())
