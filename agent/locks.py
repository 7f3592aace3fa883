"""Which instruction may run: a queue for each lane, and a lock for each domain.

An instruction holds its domain's lock from when it is the next one for that domain until it has ended; those that come
after it for the same domain wait behind it, in their order. A lock is given up by whoever holds it; somebody else may
`break_lock` it, and it cannot be given up twice.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from agent import clock


class Job(NamedTuple):
    """:ivar key: the domain's, "" for none."""

    ident: str
    key: str
    lane: str


@dataclasses.dataclass(slots=True)
class Lock:
    """:ivar since: seconds since the epoch; `began` by `agent.clock.elapsed`.

    :ivar worker: who carries it out; None: nobody yet.
    """

    job: Job
    since: float = dataclasses.field(default_factory=time.time)
    began: float = dataclasses.field(default_factory=clock.elapsed)
    worker: threading.Thread | None = None
    behind: collections.deque[Job] = dataclasses.field(default_factory=collections.deque)

    @property
    def state(self) -> str:
        """``queued``, ``running``, or ``abandoned``: whoever carried it out has ended without a word."""
        if self.worker is None:
            return "queued"
        return "running" if self.worker.is_alive() else "abandoned"

    def to_json(self) -> dict[str, Any]:
        return {
            "domain": self.job.key,
            "instruction": self.job.ident,
            "state": self.state,
            "since": self.since,
            "seconds": round(max(0.0, clock.elapsed() - self.began), 3),
            "waiting": [job.ident for job in self.behind],
        }


class Queues:
    """Safe to use from several threads."""

    def __init__(self, lanes: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._ready: dict[str, collections.deque[Job]] = {lane: collections.deque() for lane in lanes}
        self._came = {lane: threading.Condition(self._lock) for lane in self._ready}
        self._held: dict[str, Lock] = {}
        self._pending: set[str] = set()
        self._draining = False

    @property
    def pending(self) -> int:
        """How many instructions are queued or under way."""
        with self._lock:
            return len(self._pending)

    def submit(self, job: Job) -> None:
        with self._lock:
            self._pending.add(job.ident)
            if job.key and job.key in self._held:
                self._held[job.key].behind.append(job)
                return
            if job.key:
                self._held[job.key] = Lock(job)
            self._put(job)

    def take(self, lane: str) -> Job | None:
        """The next one of a lane, for the calling thread, as soon as there is one; None: no more."""
        ready = self._ready[lane]
        with self._lock:
            self._came[lane].wait_for(lambda: ready or self._draining)
            if self._draining:
                return None
            job = ready.popleft()
            held = self._holding(job)
            if held is not None:
                held.worker = threading.current_thread()
            return job

    def again(self, job: Job) -> None:
        """It has to be run once more."""
        with self._lock:
            held = self._holding(job)
            if held is not None:
                held.worker = None
            self._put(job)

    def put_back(self, job: Job) -> None:
        """One that `remove` gave out: to where it was."""
        with self._lock:
            held = self._held.get(job.key)
            if held is not None and held.job.ident != job.ident:
                held.behind.appendleft(job)
                return
            if job.key and held is None:
                self._held[job.key] = Lock(job)
            self._put(job)

    def done(self, job: Job) -> None:
        """It has ended: the next one for its domain may begin."""
        with self._lock:
            self._pending.discard(job.ident)
            held = self._holding(job)
            if held is not None:
                self._pass_on(held)

    def remove(self, ident: str) -> Job | None:
        """Take one out that no worker has yet; None when there is no such one. It is then the caller's to end."""
        with self._lock:
            for queue in (*self._ready.values(), *(held.behind for held in self._held.values())):
                for job in queue:
                    if job.ident == ident:
                        queue.remove(job)
                        return job
        return None

    def drain(self) -> None:
        """`take` gives nothing out any more."""
        with self._lock:
            self._draining = True
            for came in self._came.values():
                came.notify_all()

    def locks(self) -> list[dict[str, Any]]:
        """Every lock that is held, the oldest first."""
        with self._lock:
            return [held.to_json() for held in sorted(self._held.values(), key=lambda held: held.began)]

    def break_lock(self, key: str, *, force: bool) -> dict[str, Any] | None:
        """Give a domain's lock to the next in line although its holder has not given it up.

        Only one whose holder is abandoned; with `force` also one whose holder runs, which then goes on side by side
        with the next one.

        :returns: the lock as it was, with ``broken``, and ``next``: who has it now. None: nobody had it.
        """
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return None
            found = held.to_json()
            abandoned = found["state"] == "abandoned"
            if not abandoned and not (force and found["state"] == "running"):
                return found | {"broken": False, "next": ""}
            if abandoned:
                self._pending.discard(held.job.ident)
            self._pass_on(held)
            return found | {"broken": True, "next": next(iter(found["waiting"]), "")}

    def _holding(self, job: Job) -> Lock | None:
        """Its lock, unless it has none or it was taken away."""
        held = self._held.get(job.key)
        return held if held is not None and held.job.ident == job.ident else None

    def _pass_on(self, held: Lock) -> None:
        if not held.behind:
            del self._held[held.job.key]
            return
        following = held.behind.popleft()
        self._held[following.key] = Lock(following, behind=held.behind)
        self._put(following)

    def _put(self, job: Job) -> None:
        self._ready[job.lane].append(job)
        self._came[job.lane].notify()
