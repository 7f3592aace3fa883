"""A Debian guest with a disk and a nic under load, and two hosts with their agents between which it goes."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

from agent_process import AgentProcess
from block_guest import LOG_BYTES
from host_rig import until
from moving_pair import Pair, processes
from xs_client import XsClient

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "movebench.c"
LOAD_SECONDS = 20
WRONG = "CPU''-WRONG"  # so that the echo of what is typed does not count
NAMES = ("node1", "node2")
WAIT = 90.0
BACKENDS = "/local/domain/0/backend"
TROUBLE = re.compile(
    rb"I/O error|blk_update_request|WARNING:|BUG:|Call Trace|MOVEBENCH-(WRONG|FAILED)|BLOCK FAIL|CPU-WRONG"
)


def resident_kib(pid: int) -> int:
    """Of its own; memory that it shares with others is theirs, too."""
    said = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", said)[1])  # type: ignore[index]


def compile_movebench(folder: Path) -> Path:
    program = folder / "movebench"
    subprocess.run(["gcc", "-static", "-O2", "-o", str(program), str(SOURCE)], check=True, timeout=120)
    return program


class Peer:
    """Takes the guest's packets: their numbers."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        self.port = int(self._sock.getsockname()[1])
        self.numbers: list[int] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while len(data := self._sock.recv(64)) == 16:
            self.numbers.append(struct.unpack("<QQ", data)[0])

    def more(self) -> None:
        """Packets still come."""
        before = len(self.numbers)
        until(lambda: len(self.numbers) > before + 20, "packets of the guest", 30)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", ("127.0.0.1", self.port))
        self._thread.join(10)
        self._sock.close()


class Site:
    """Two hosts, each with its agent, and a broker in a folder."""

    def __init__(self, folder: Path, pair: Pair) -> None:
        self.pair = pair
        self.agents: list[AgentProcess] = []
        for name, rig in zip(NAMES, pair.rigs, strict=True):
            driver = ("--driver-name", "embedded", "--driver-socket", str(rig.socket))
            home = folder / name
            home.mkdir()
            agent = AgentProcess(home, f"filesystem://{folder}/broker", driver, name)
            self.agents.append(agent)
            agent.start()

    def call(self, index: int, verb: str, args: dict[str, Any]) -> dict[str, Any]:
        with self.agents[index].client() as client:
            reply = client.call(verb, args, timeout=WAIT)
        assert reply.ok and reply.result is not None, (reply.error, self.logs())
        return reply.result

    def log(self, index: int, domain: str) -> bytes:
        return self.pair.toolstack(self.pair.rigs[index]).console_log(domain, LOG_BYTES)

    def settled(self) -> None:
        """No half, journal row or claim is left."""
        for agent, rig in zip(self.agents, self.pair.rigs, strict=True):
            assert self.pair.toolstack(rig).migration_list() == []
            until(lambda r=rig: not processes(r, "mover"), "movers to end")
            journal = agent.journal()
            counts = journal.counts()
            journal.close()
            assert (counts["unfinished"], counts["claims"]) == (0, 0), counts

    def held(self, index: int) -> dict[str, int]:
        """What a host holds, to be compared: processes, their memory, its nodes, its journal's rows."""
        rig = self.pair.rigs[index]
        store = XsClient(rig.state / "xenstored.sock")
        nodes = sum(len(store.names(path)) for path in ("/local/domain", "/vm", "/libxl"))
        nodes += sum(len(store.names(f"{BACKENDS}/{kind}")) for kind in store.names(BACKENDS))
        store.close()
        children = processes(rig, "")
        kib = sum(resident_kib(pid) for pid in (rig.pid, *children))
        files = len(list(Path(f"/proc/{rig.pid}/fd").iterdir()))
        return {"nodes": nodes, "processes": len(children), "files": files, "kib": kib}

    def logs(self) -> str:
        return "\n".join(f"--- {agent.host}\n{agent.log[-4000:]}" for agent in self.agents)

    def close(self) -> None:
        for agent in self.agents:
            if agent.process is not None:
                agent.stop()


class Load:
    """What the guest does, by its console: a CPU, memory, a disk and a nic are at work, and what comes out is checked.

    :param seconds: of the disk's load.
    """

    def __init__(self, site: Site, domain: str, peer: Peer, seconds: int = LOAD_SECONDS) -> None:
        self.site, self.domain, self.seconds = site, domain, seconds
        self._wait(0, rb"/ # ", 90)
        found = "[ -d /sys/class/net/eth0 -a -b /dev/xvda ]"
        self._type(
            f"n=0; until {found} || [ $n -gt 300 ]; do usleep 100000; n=$((n+1)); done; "
            "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; "
            "a=$(sha256sum /bin/busybox); "
            f'while [ "$(sha256sum /bin/busybox)" = "$a" ] || echo {WRONG}; do usleep 100000; done & '
            f"movebench 10.0.2.2 {peer.port} 5000 8 16 & blockload verify /dev/xvda {seconds} 2 &"
        )
        self._wait(0, rb"MOVEBENCH-STARTED", 60)
        self._wait(0, rb"FLUSHED", 30)
        peer.more()

    def _type(self, line: str) -> None:
        toolstack = self.site.pair.toolstack(self.site.pair.rigs[0])
        with contextlib.closing(toolstack.open_console(self.domain)) as console:
            console.write(f"{line}\n".encode())

    def _wait(self, index: int, pattern: bytes, seconds: float) -> None:
        until(lambda: re.search(pattern, self.site.log(index, self.domain)), pattern.decode(), seconds)

    def at_work(self, index: int, peer: Peer) -> None:
        """It goes on: packets, and what it says."""
        peer.more()
        before = self.site.log(index, self.domain).count(b"FLUSHED")
        until(lambda: self.site.log(index, self.domain).count(b"FLUSHED") > before, "the disk to be written", 30)
        self.well(index)

    def well(self, index: int) -> None:
        said = self.site.log(index, self.domain)
        assert not TROUBLE.search(said), said[-3000:]

    def verified(self, index: int) -> None:
        self._wait(index, rb"BLOCK (OK|FAIL)", self.seconds + 60)
        self.well(index)
