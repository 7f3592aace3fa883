"""The other side of bench/rpc.py: oslo.messaging's own server with a method that does nothing.

Run by a Python that has oslo.messaging: CONFIG-FILE TOPIC SERVER.
"""

from __future__ import annotations

import sys
import warnings

warnings.simplefilter("ignore")

import oslo_messaging  # noqa: E402
from oslo_config import cfg  # noqa: E402


class Endpoint:
    target = oslo_messaging.Target(version="1.0")

    def noop(self, _context: dict, n: int = 0) -> dict:
        return {"n": n}


def main() -> None:
    config, topic, name = sys.argv[1:]
    cfg.CONF(["--config-file", config], project="bench")
    transport = oslo_messaging.get_rpc_transport(cfg.CONF)
    target = oslo_messaging.Target(topic=topic, server=name)
    server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
    server.start()
    server.wait()


if __name__ == "__main__":
    main()
