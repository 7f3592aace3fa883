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

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "movebench.c"
LOAD_SECONDS = 20
NAMES = ("node1", "node2")
WAIT = 90.0
TROUBLE = re.compile(rb"I/O error|blk_update_request|WARNING:|BUG:|Call Trace|MOVEBENCH-(WRONG|FAILED)|BLOCK FAIL")


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

    def logs(self) -> str:
        return "\n".join(f"--- {agent.host}\n{agent.log[-4000:]}" for agent in self.agents)

    def close(self) -> None:
        for agent in self.agents:
            if agent.process is not None:
                agent.stop()


class Load:
    """What the guest does, by its console; it follows the guest."""

    def __init__(self, site: Site, domain: str, peer: Peer) -> None:
        self.site, self.domain = site, domain
        self._wait(0, rb"/ # ", 90)
        found = "[ -d /sys/class/net/eth0 -a -b /dev/xvda ]"
        self._type(
            f"n=0; until {found} || [ $n -gt 300 ]; do usleep 100000; n=$((n+1)); done; "
            "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; "
            f"movebench 10.0.2.2 {peer.port} 5000 8 16 & blockload verify /dev/xvda {LOAD_SECONDS} 2 &"
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
        self._wait(index, rb"BLOCK (OK|FAIL)", LOAD_SECONDS + 60)
        self.well(index)
