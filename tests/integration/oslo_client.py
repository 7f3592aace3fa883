"""A stock oslo.messaging RPC client as a process: one JSON request a line on standard input, one JSON answer a line.

With a target ``{"listen": [topic, ...]}`` it is a notification listener instead.

It is run by the Python of a virtual environment that has oslo.messaging and nothing of Reeve; the tests import nothing
from here. The argument is its configuration file; the first line has the target and ``allowed_remote_exmods``.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.simplefilter("ignore")

import oslo_messaging  # noqa: E402
from oslo_config import cfg  # noqa: E402


def answer(data: dict) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def described(exc: BaseException) -> dict:
    names = ("exc_type", "value", "code", "retryable", "undone", "host", "instruction", "version", "method")
    kinds = [kind.__name__ for kind in type(exc).__mro__]
    attributes = {name: getattr(exc, name) for name in names if hasattr(exc, name)}
    return {"kinds": kinds, "module": type(exc).__module__, "text": str(exc), **attributes}


class Endpoint:
    """Whatever a notification listener hears goes to standard output."""

    def info(self, context: dict, publisher: str, event: str, payload: dict, metadata: dict) -> None:
        heard = {"context": dict(context), "publisher": publisher, "event": event, "payload": payload}
        answer(heard | {"metadata": metadata, "priority": "info"})

    def error(self, context: dict, publisher: str, event: str, payload: dict, metadata: dict) -> None:
        heard = {"context": dict(context), "publisher": publisher, "event": event, "payload": payload}
        answer(heard | {"metadata": metadata, "priority": "error"})


def listen(conf: cfg.ConfigOpts, topics: list) -> None:
    """A notification listener until the end of standard input."""
    transport = oslo_messaging.get_notification_transport(conf)
    targets = [oslo_messaging.Target(topic=topic) for topic in topics]
    listener = oslo_messaging.get_notification_listener(transport, targets, [Endpoint()], executor="threading")
    answer({"ready": True})  # before: it may hear something at once
    listener.start()
    sys.stdin.read()
    listener.stop()
    listener.wait()


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    conf = cfg.CONF
    conf(["--config-file", sys.argv[1]], project="client")
    if "listen" in setup["target"]:
        listen(conf, setup["target"]["listen"])
        return
    transport = oslo_messaging.get_rpc_transport(conf, allowed_remote_exmods=setup.get("exmods", []))
    target = oslo_messaging.Target(**setup["target"])
    get_client = getattr(oslo_messaging, "get_rpc_client", oslo_messaging.RPCClient)
    client = get_client(transport, target, version_cap=setup.get("version_cap"))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        prepared = client.prepare(**request.get("prepare", {}))
        method = getattr(prepared, request["do"])
        try:
            answer({"result": method(request.get("context", {}), request["method"], **request.get("args", {}))})
        except Exception as exc:
            answer({"raised": described(exc)})


if __name__ == "__main__":
    main()
