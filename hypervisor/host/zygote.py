"""The zygote: a small single-threaded process from which every domain and driver process is forked.

It is started by exec beside the host process, loads the runtime (engine, machine,
builder) and the drivers of devices once and forks on request, so that a new domain starts in milliseconds
and shares those pages. It reaps its children and tells how they ended. It ends when its
host does; domains do not care.

Messages from the host: ``{"op": "spawn", "id", "request", "directory", "sandbox"}`` with
the child's descriptors, ``{"op": "spawn-driver", "id", "order", "directory", "sandbox"}`` likewise, and
``{"op": "spawn-mover", "id", "order", "sandbox"}`` (`hypervisor.host.mover`). To the host: ``ready`` with the
runtime's facts, ``spawned`` with the child's pid and a pidfd, ``failed``, ``exited`` with pid and exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hypervisor.devices import registry
from hypervisor.host import channel as channels
from hypervisor.host import domain_process, driver_process, runtime
from hypervisor.host.channel import BadMessage, Channel, ChannelClosed, Message
from hypervisor.host.driver_process import DriverOrder
from hypervisor.host.handles import Handles
from hypervisor.host.runtime import BuildRequest, Runtime

LOG = logging.getLogger(__name__)

CHILD_FDS = 2 + Handles.COUNT
"""Channel, log file, handles."""


class Zygote:
    def __init__(self, channel: Channel, guest_runtime: Runtime, log_level: int) -> None:
        self._channel = channel
        self._runtime = guest_runtime
        self._log_level = log_level
        self._children: dict[int, int] = {}  # pidfd -> pid
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Until the host is gone."""
        self._channel.send({"event": "ready", "pid": os.getpid(), "facts": self._runtime.facts().to_json()})
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._children:
                    self._reap(fd)
                elif not self._one_message():
                    return

    def _one_message(self) -> bool:
        try:
            message, fds = self._channel.receive()
        except ChannelClosed:
            return False
        except BadMessage as exc:
            LOG.warning("host: %s", exc)
            return True
        try:
            self._spawn(message, fds)
        except ChannelClosed:
            return False
        except Exception as exc:
            LOG.exception("spawn failed")
            self._channel.send({"event": "failed", "id": message.get("id"), "why": f"{type(exc).__name__}: {exc}"})
        finally:
            channels.close_all(fds)
        return True

    def _spawn(self, message: Message, fds: list[int]) -> None:
        child = self._child(message, fds)
        pid = os.fork()
        if pid == 0:
            if message.get("op") != "spawn":
                self._runtime.shed()
            child()
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._channel.send({"event": "spawned", "id": message.get("id"), "pid": pid}, [pidfd])

    def _child(self, message: Message, fds: list[int]) -> Callable[[], NoReturn]:
        """What the forked child does; the message is looked at before the fork."""
        op, required = message.get("op"), message["sandbox"] == "required"
        if op == "spawn-mover":
            return self._mover(message, fds, required=required)
        directory = Path(message["directory"])
        if op == "spawn" and CHILD_FDS <= len(fds) <= CHILD_FDS + 2:
            request = BuildRequest.from_json(message["request"])
            if len(fds) != CHILD_FDS + request.sources:
                raise ValueError(f"op {op!r} with {len(fds)} descriptors")
            return lambda: domain_process.run_child(
                request, fds, directory, self._runtime, sandbox_required=required, log_level=self._log_level
            )
        if op == "spawn-driver" and len(fds) >= driver_process.OWN_FDS:
            order = DriverOrder.from_json(message["order"])
            # Loaded here, once: the next driver starts with it.
            registry.attribute(order.factory)
            if threads() != 1:
                raise ValueError(f"{order.factory} started threads: a fork would copy their locks")
            return lambda: driver_process.run_child(
                order, fds, directory, sandbox_required=required, log_level=self._log_level
            )
        raise ValueError(f"op {op!r} with {len(fds)} descriptors")

    def _mover(self, message: Message, fds: list[int], *, required: bool) -> Callable[[], NoReturn]:
        # Loaded with the first one: most hosts move nothing.
        from hypervisor.host.mover import order, process

        if len(fds) != order.FDS or threads() != 1:
            raise ValueError(f"a mover with {len(fds)} descriptors, {threads()} threads")
        made = order.MoverOrder.from_json(message["order"])
        return lambda: process.run_child(made, fds, sandbox_required=required, log_level=self._log_level)

    def _reap(self, pidfd: int) -> None:
        pid = self._children[pidfd]
        waited, status = os.waitpid(pid, os.WNOHANG)
        if waited == 0:
            return
        self._poll.unregister(pidfd)
        os.close(pidfd)
        del self._children[pidfd]
        self._channel.send({"event": "exited", "pid": pid, "code": os.waitstatus_to_exitcode(status)})


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reeve-zygote", description="Started by reeve-hypervisor, not by hand.")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    options = parser.parse_args(argv)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s zygote %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = channels.from_fd(options.channel_fd)
    os.set_inheritable(options.channel_fd, False)
    guest_runtime = runtime.load(options.runtime)
    if threads() != 1:
        LOG.error("the runtime started threads: a fork would copy their locks; refusing")
        return 1
    gc.collect()
    gc.freeze()
    with contextlib.suppress(ChannelClosed):
        Zygote(channel, guest_runtime, options.log_level).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
