"""``reeve-hypervisor``: the host process's command line."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from oslo_config import cfg

from hypervisor.errors import ToolstackError
from hypervisor.host import conf as options
from hypervisor.host import protocol
from hypervisor.host.server import serve
from hypervisor.host.settings import HostSettings

LOG = logging.getLogger(__name__)

DESCRIPTION = """\
The host process of Reeve's embedded hypervisor: keeps the table of domains, gives
out memory, serves xenstore and consoles, and starts one process for each domain.
The agent and the command `reeve` speak with it through its control socket.
"""

EPILOG = """\
Domains go on running when this process is stopped, killed or upgraded; the next one
started with the same state folder takes them over. To end domains, destroy them.

Examples:
  reeve-hypervisor --state-dir ~/reeve-test     a host of its own in that folder
  XENSTORED_PATH=~/reeve-test/xenstored.sock xenstore-ls -f
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    conf = cfg.ConfigOpts()
    options.register(conf)
    try:
        conf(
            args=words,
            project="reeve",
            prog="reeve-hypervisor",
            version=protocol.version(),
            description=DESCRIPTION,
            default_config_files=cfg.find_config_files("reeve", "hypervisor"),
        )
        settings = options.settings(conf)
    except SystemExit as exc:
        if not exc.code and {"-h", "--help"} & set(words):
            sys.stdout.write(f"\n{EPILOG}")  # as it is: the parser would run its lines together
        raise
    except cfg.Error as exc:
        sys.stderr.write(f"reeve-hypervisor: configuration: {exc}\n")
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_run(settings))
    except ToolstackError as exc:
        sys.stderr.write(f"reeve-hypervisor: {exc.message}\n")
        return 1
    return 0


async def _run(settings: HostSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)


if __name__ == "__main__":
    sys.exit(main())
