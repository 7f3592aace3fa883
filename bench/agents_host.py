"""Several agents in one process, for bench/agents.py: each with its own host name, state folder, journal and threads.

Arguments: the broker's URL, a folder, the number of the first one, how many, and the seconds between two reports. Says
``ready`` when all take instructions; ends when its standard input does.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from agent import conf, logs
from agent.service import SWITCH_SECONDS, Service
from hypervisor.toolstack.drivers.fake import FakeToolstack

READY_SECONDS = 300.0


def main(url: str, folder: str, first: str, number: str, interval: str) -> int:
    logs.setup("warning", "", "text")
    sys.setswitchinterval(SWITCH_SECONDS)  # as the agent's own main does
    services = []
    for n in range(int(first), int(first) + int(number)):
        options = [
            "--broker-url", url, "--agent-host", f"node{n}", "--agent-state-dir", str(Path(folder) / f"node{n}"),
            "--reports-interval", interval, "--oslo-noenabled", "--http-noenabled",
        ]  # fmt: skip
        services.append(Service(conf.load([], options), FakeToolstack(None)))
    for service in services:
        service.start()
        threading.Thread(target=service.run, daemon=True).start()
    for service in services:
        if not service.consumer.connected.wait(READY_SECONDS) or not service.publisher.connected.wait(READY_SECONDS):
            sys.stderr.write(f"{service.settings.host} did not reach the broker\n")
            return 1
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    for service in services:
        service.stop()
        service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
