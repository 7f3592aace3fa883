"""A machine's part in a move to another host: its state as bytes, taken from a frozen one, given to one made empty.

Nothing of the sender's is believed. What native code uses unseen is checked or replaced (`hypervisor.state_checks`),
the frame table is compared with the page tables that came with the memory, and the engine reaches, whatever tables it
walks, only what is mapped into it: this domain's extent. What a lying sender can do to the guest it holds, it could do
to it anyway; to others it can do what the guest itself can, from a process that has given up all else
(`hypervisor.host.sandbox`).
"""

from __future__ import annotations

import array
import collections
import json
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import zstandard

from hypervisor import domain_state
from hypervisor.errors import HostFailure, MigrationFailed, WrongState
from hypervisor.evtchn.core import ChannelState
from hypervisor.evtchn.hostside import without_drivers
from hypervisor.grants.peer import HOST_DOMID
from hypervisor.hotcode import HotCode
from hypervisor.machine import Machine
from hypervisor.memory.tally import Tally

LOG = logging.getLogger(__name__)

MAGIC = b"reevedom"
VERSION = 1
_HEADER = struct.Struct("<8sHHII")  # magic, version, flags, bytes of JSON, bytes of the frame table's zstd frame
_EARLY = 1
MAX_STATE = 32 << 20
CALL_TIMEOUT = 10.0
AHEAD_S = 2.0
"""For how long at most code is translated ahead."""
MAX_BLOCKS = 100_000
MOST_APART_NS = 10_000_000_000
"""Wall clocks that say more than this has passed between export and import, or less than nothing, are not believed."""

_T = TypeVar("_T")


class MovingState:
    """One thread, not the run loop's, may call; what is done happens there.

    :param boot: what the host was told of the guest's start; travels with it.
    :param incoming: the machine was made empty and waits for `take`.
    :ivar frozen: the run loop stands still: no guest instruction, no timer, no event that becomes pending.
    """

    def __init__(self, machine: Machine, boot: dict[str, Any], *, incoming: bool = False) -> None:
        self._machine = machine
        self.boot = boot
        self.incoming = incoming
        self.frozen = incoming
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tally: Tally | None = None
        self._hot: HotCode | None = None
        self._done: threading.Event | None = None  # of the call that is under way
        self._over = False

    @property
    def address(self) -> int:
        """Of the mapping through which engine and hypervisor write, in this process."""
        return self._machine.domain.memory.address

    @property
    def pages(self) -> int:
        return self._machine.domain.memory.frames

    @property
    def punched(self) -> collections.deque[tuple[int, int]] | None:
        """See `hypervisor.memory.physical.DomainMemory.punched`."""
        return self._machine.domain.memory.punched

    @punched.setter
    def punched(self, value: collections.deque[tuple[int, int]] | None) -> None:
        self._machine.domain.memory.punched = value

    # -- the run loop

    def stand_still(self) -> None:
        """In the run loop's thread: do what `call` brings and nothing else, until `thaw`. Posts wait meanwhile."""
        while (work := self._work.get()) is not None:
            work()

    def freeze(self) -> None:
        """Harmless when repeated. :raises HostFailure: the run loop does not answer."""
        if not self.frozen:
            self._machine.post(self.stand_still)
            self.frozen = True
            try:
                self.call(lambda: None)
            except HostFailure:
                self.thaw()
                raise

    def thaw(self) -> None:
        """Harmless when repeated."""
        if self.frozen and not self.incoming:
            self.frozen = False
            self._work.put(None)

    def settle(self) -> None:
        """All of its memory is in its descriptor from now on. :raises OSError, HostFailure."""
        self.call(self._machine.domain.memory.settle)

    def call(self, function: Callable[[], _T]) -> _T:
        """`function` in the run loop's thread; its result, or what it raises. :raises HostFailure: it does not run."""
        done = threading.Event()
        result: list[_T] = []
        failure: list[Exception] = []

        def work() -> None:
            try:
                result.append(function())
            except Exception as exc:
                failure.append(exc)
            finally:
                done.set()

        self._done = done
        if self.frozen:
            self._work.put(work)
        else:
            self._machine.post(work)
        if not self._over and not done.wait(CALL_TIMEOUT):
            raise HostFailure("the machine does not answer: see domain.log")
        if failure:
            raise failure[0]
        if not result:
            raise WrongState("the guest has ended: destroy or reset the domain")
        return result[0]

    def ended(self) -> None:
        """The run loop is over."""
        self._over = True
        if self._done is not None:
            self._done.set()

    def host_pages(self) -> set[int]:
        """Pages that the host process writes to: the rings of console and store."""
        memory = self._machine.domain.memory
        return {memory.index(self.boot[name]) for name in ("store_mfn", "console_mfn")}

    def facts(self) -> dict[str, Any]:
        """What the machine that takes the guest over is made from; JSON."""
        domain = self._machine.domain
        return {
            "boot": self.boot,
            "bits": domain.config.bits,
            "lazy_nx": domain.tables.lazy_nx,
            "cpu_policy": domain.cpuid.policy.save(),
            "mcg_cap": domain.config.mcg_cap,
        }

    def obstacles(self) -> str:
        """Why the guest cannot go elsewhere now, because of its grants and channels; "" if it can."""
        return self.call(self._obstacles)

    def _obstacles(self) -> str:
        domain = self._machine.domain
        if domain.tables.foreign:
            return "it has frames of another domain mapped"
        for port, channel in enumerate(domain.events.channels):
            if channel.state is ChannelState.INTERDOMAIN and channel.peer not in (0, domain.config.domid):
                return f"its event channel {port} leads to domain {channel.peer}"
        return ""

    # -- on the source

    def give(self, *, early: bool = False, served: bool = False) -> bytes:
        """The state; of a frozen machine, whose memory is the caller's to carry.

        :param early: the frame table alone, of a machine that may run: what the target can make ready with.
        :param served: drivers stay linked, and do nothing now; the state says that they are not.
        :raises WrongState: it cannot be taken now.
        """
        if not (early or self.frozen) or self.incoming:
            raise WrongState("the domain is not frozen: call migration_freeze first")
        if early:
            return self._give_early()
        return self.call(self._give_served if served else self._give)

    def _give_early(self) -> bytes:
        """The frame table, and which code is translated here."""
        domain = self._machine.domain
        ahead = domain.engine.ahead
        blocks, mode = ahead.known() if ahead is not None else (array.array("Q"), 0)
        said = json.dumps({"blocks": len(blocks), "mode": mode}).encode()
        return _pack(said, self.call(domain.frames.raw) + blocks.tobytes(), _EARLY)

    def _give_served(self) -> bytes:
        domain = self._machine.domain
        with domain.grants.own.set_aside(HOST_DOMID), without_drivers(domain.events):
            return self._give()

    def _give(self) -> bytes:
        machine, domain = self._machine, self._machine.domain
        if obstacle := self._obstacles():
            raise WrongState(f"the domain cannot be moved: {obstacle}")
        if len(domain.grants.own):
            raise WrongState("drivers still use the domain's grants: end their links first")
        try:
            state = domain_state.save_but_frames(domain)
        except ValueError as exc:
            raise WrongState(f"the domain cannot be moved: {exc}") from exc
        state["clock"]["now"], wall_ns = domain.clock.now(), time.time_ns()
        said = {
            "state": state,
            "boot": self.boot,
            "wall_ns": wall_ns,
            "cpu_time_ns": machine.stats()["cpu_time_ns"],
        }
        return _pack(json.dumps(said, separators=(",", ":")).encode(), domain.frames.raw(), 0)

    # -- on the target

    def take(self, data: bytes, marks: int | None = None) -> None:
        """Become what `give` gave; for an early part, make ready for the whole. The memory is in place already.

        :param marks: descriptor of a file with a byte for each page, in which whoever writes the memory sets those of
            pages that it wrote (`Receiver.marks`). Without it no code is translated ahead.
        :raises MigrationFailed: it is none, or of another version, build or domain, or contradicts the memory; an early
            part does no harm then.
        """
        if not self.incoming:
            raise WrongState("the domain has a guest already")
        said, frames, flags = _unpack(data, self._machine.domain.frames.raw_bytes)
        try:
            if flags & _EARLY:
                self.call(lambda: self._make_ready(said, frames, marks))
                return
            self.call(lambda: self._take(said, frames, marks))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError) as exc:
            raise MigrationFailed(f"the domain's state cannot be taken over: {exc}") from exc
        self.incoming = False
        self.thaw()

    def _make_ready(self, said: dict[str, Any], content: bytes, marks: int | None) -> None:
        domain = self._machine.domain
        size = domain.frames.raw_bytes
        domain.frames.load_raw(content[:size])
        if self._tally is None:
            self._tally = Tally(domain.tables)
            domain_state.make_ready(domain)
        self._tally.look()
        if marks is None:
            return
        if self._hot is None:
            try:
                os.pwrite(marks, bytes(self.pages), 0)
            except OSError as exc:  # a guest whose marks are more than the sandbox lets a file be
                LOG.info("no code is translated ahead: %s", exc)
                return
            self._hot = HotCode(domain)
        blocks = array.array("Q")
        blocks.frombytes(content[size:])
        done = self._hot.translate(blocks, said["mode"], AHEAD_S)
        LOG.info("%d of %d blocks translated ahead", done, len(blocks))

    def _take(self, said: dict[str, Any], frames: bytes, marks: int | None) -> None:
        machine, domain = self._machine, self._machine.domain
        state, sent, cpu_time = said["state"], said["wall_ns"], said["cpu_time_ns"]
        if said["boot"] != self.boot:
            raise ValueError("it is of another guest than the one that was announced")
        if not isinstance(sent, int) or not isinstance(cpu_time, int) or cpu_time < 0:
            raise ValueError("its times are of no use")
        domain.frames.load_raw(frames)
        if self._hot is not None:
            written = np.ones(self.pages, dtype=np.uint8)
            if marks is not None and len(told := os.pread(marks, self.pages, 0)) == self.pages:
                written = np.frombuffer(told, dtype=np.uint8)
            self._hot.settle(written)
            self._hot = None
        passed = time.time_ns() - sent
        if 0 < passed < MOST_APART_NS:
            state["clock"]["now"] += passed
        tally = self._tally or Tally(domain.tables)
        ready = self._tally is not None
        domain_state.restore_but_frames(domain, state, lambda: tally.agrees(domain.holds()), ready=ready)
        self._tally = None
        machine.came_from_elsewhere(cpu_time)


def _pack(said: bytes, frames: bytes, flags: int) -> bytes:
    packed = zstandard.ZstdCompressor(level=1).compress(frames)
    return _HEADER.pack(MAGIC, VERSION, flags, len(said), len(packed)) + said + packed


def _unpack(data: bytes, frame_bytes: int) -> tuple[dict[str, Any], bytes, int]:
    """:param frame_bytes: how long the frame table must be. :raises MigrationFailed."""
    try:
        magic, version, flags, size, packed = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("it is none")
        if version != VERSION or flags & ~_EARLY:
            raise ValueError(f"it has version {version} and flags {flags:#x}; this is version {VERSION}")
        if len(data) != _HEADER.size + size + packed or len(data) > MAX_STATE:
            raise ValueError(f"it has {len(data)} bytes")
        said = json.loads(data[_HEADER.size : _HEADER.size + size])
        frame = data[_HEADER.size + size :]
        blocks = said.get("blocks", 0) if isinstance(said, dict) else -1
        if not (type(blocks) is int and 0 <= blocks <= MAX_BLOCKS and type(said.get("mode", 0)) is int):
            raise ValueError("it is of another form")
        if zstandard.frame_content_size(frame) != frame_bytes + 8 * blocks:
            raise ValueError("it is not of a domain like this")
        return said, zstandard.ZstdDecompressor().decompress(frame), flags
    except (ValueError, RecursionError, struct.error, zstandard.ZstdError) as exc:
        raise MigrationFailed(f"a domain's state that is of no use: {exc}") from exc
