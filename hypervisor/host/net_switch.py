"""The switch process of a host: all networks, all nics (`hypervisor.devices.net.switchboard`).

It is started by the host process (`hypervisor.devices.net.keeper`), is given every socket and TAP as a descriptor,
and gives up all rights before the first frame. It outlives the host process, so that guests stay connected; the next
host process connects to its socket, upon which it ends, and starts another. Without a host process and without a nic
it ends too.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from hypervisor.devices.net.switchboard import MAX_MESSAGE, Switchboard
from hypervisor.host import channel as channels
from hypervisor.host import sandbox
from hypervisor.host.driver_loop import EventLoop

LOG = logging.getLogger(__name__)

MAX_OPEN_FILES = 8192
LOOK_EVERY = 5.0
"""Seconds between two looks whether anybody still needs this process, without a host process."""


class SwitchProcess:
    """:param channel: to the host process. :param listener: where the next one calls."""

    def __init__(self, channel: socket.socket, listener: socket.socket, loop: EventLoop) -> None:
        self._channel = channel
        self._loop = loop
        self._board = Switchboard(loop)
        channel.setblocking(False)
        loop.add_reader(channel.fileno(), self._one_message)
        loop.add_reader(listener.fileno(), self._called)

    def _one_message(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self._channel, MAX_MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        if not data:
            self._orphaned()
            return
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("a message too long")
            answer = self._board.handle(json.loads(data), fds[0] if fds else None)
        except (ValueError, KeyError, TypeError, OSError):
            LOG.exception("a message of the host process")
            return
        if answer is not None:
            try:
                self._channel.send(json.dumps(answer).encode())
            except OSError as exc:
                LOG.warning("the host process does not take an answer: %s", exc)

    def _orphaned(self) -> None:
        LOG.info("the host process is gone")
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._look()

    def _look(self) -> None:
        if not self._board.nics:
            self._loop.stop()
        self._loop.call_later(LOOK_EVERY, self._look)

    def _called(self) -> None:
        LOG.info("another host process takes over")
        self._loop.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hypervisor.host.net_switch")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True, help="held until this process ends")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--sandbox", default="auto")
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    options = parser.parse_args(argv)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s switch: %(message)s", stream=sys.stderr
    )
    sandbox.close_other_fds([0, 1, 2, options.channel_fd, options.lifeline_fd])
    channel = socket.socket(fileno=options.channel_fd)
    listener = channels.listen(options.socket, socket.SOCK_SEQPACKET, backlog=1)
    loop = EventLoop()
    process = SwitchProcess(channel, listener, loop)
    report = sandbox.restrict(max_file_size=sandbox.NO_LIMIT, max_open_files=MAX_OPEN_FILES)
    sandbox.lock_down(report, required=options.sandbox == "required")
    channel.send(json.dumps({"ready": True}).encode())
    gc.freeze()
    loop.run()
    del process
    return 0


if __name__ == "__main__":
    os._exit(main())
