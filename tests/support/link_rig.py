"""A domain on an engine that executes nothing, served by guest links as in a domain process."""

from __future__ import annotations

import collections
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "unit" / "hypervisor" / "grants"))
from grant_rig import PERMIT, READING, READONLY, WRITING, GrantRig

from hypervisor.devices.link import ProcessLink
from hypervisor.evtchn.hostside import HostRouter
from hypervisor.host.channel import close_all
from hypervisor.host.guest_link import GuestLinks
from hypervisor.host.guest_link_ends import LinkEnds
from hypervisor.host.guest_link_state import LinkTarget
from hypervisor.host.poller import Poller

__all__ = ["PERMIT", "READING", "READONLY", "WRITING", "GrantRig", "Served"]


class Served(GrantRig):
    """A domain whose memory is a memfd, with the two threads of a domain process."""

    def __init__(self) -> None:
        super().__init__()
        self.start()
        self.to_host: list[int] = []
        self.router = HostRouter(self.to_host.append)
        self.domain.events.router = self.router
        self.poller = Poller()
        self.posts: collections.deque = collections.deque()
        self.posted = threading.Semaphore(0)
        self.stopping = False
        memory, domain = self.memory, self.domain
        target = LinkTarget(7, memory.frames, memory.index, domain.grants.own, domain.events, self.router, self.post)
        self.links = GuestLinks(target, self.poller)
        self.threads = [threading.Thread(target=self._poll), threading.Thread(target=self._run)]
        for thread in self.threads:
            thread.start()

    def new_mapping(self, size: int) -> mmap.mmap:
        self.memfd = os.memfd_create("rig")
        os.ftruncate(self.memfd, size)
        return mmap.mmap(self.memfd, size)

    def _poll(self) -> None:
        while not self.stopping:
            self.poller.run_once(1000)

    def _run(self) -> None:
        while True:
            self.posted.acquire()
            if self.stopping:
                return
            self.posts.popleft()()

    def post(self, function) -> None:
        self.posts.append(function)
        self.posted.release()

    def in_run_loop(self, function):
        """Its result, from the thread that owns the domain."""
        results: list = []
        done = threading.Event()
        self.post(lambda: (results.append(function()), done.set()))
        assert done.wait(10)
        return results[0]

    def in_poller(self, function):
        results: list = []
        done = threading.Event()
        self.poller.call(lambda: (results.append(_caught(function)), done.set()))
        assert done.wait(10)
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def link(self) -> tuple[int, ProcessLink]:
        ends = LinkEnds.create(self.memfd, 1 << 16)
        try:
            number = self.in_poller(lambda: self.links.open(ends.for_domain))
        except Exception:
            close_all(ends.for_driver)
            raise
        return number, ProcessLink(*ends.for_driver)

    def raw(self) -> socket.socket:
        """A driver that does as it likes."""
        ends = LinkEnds.create(self.memfd, 1 << 16)
        self.in_poller(lambda: self.links.open(ends.for_domain))
        for fd in ends.for_driver[1:]:
            os.close(fd)
        sock = socket.socket(fileno=ends.for_driver[0])
        sock.settimeout(10)
        return sock

    def until_free(self) -> None:
        """All links are gone, and what they held."""
        deadline = time.monotonic() + 10
        while len(self.links) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not len(self.links)
        self.in_poller(lambda: None)  # which takes a link out before it says what is to be given back
        self.in_run_loop(lambda: None)
        assert not len(self.domain.grants.own)

    def unbound(self) -> int:
        return self.in_run_loop(lambda: self.domain.events.alloc_unbound(0x7FF0, 0))

    def stop(self) -> None:
        self.in_poller(lambda: self.links.close(0))
        self.in_run_loop(lambda: None)
        self.stopping = True
        self.posted.release()
        self.poller.call(lambda: None)
        for thread in self.threads:
            thread.join(10)
        self.check()
        os.close(self.memfd)


def _caught(function):
    try:
        return function()
    except Exception as exc:
        return exc
