"""Scripted guests that use their xenstore ring hard: one that checks every answer, and hostile ones."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import Protocol

READ, WATCH, TRANSACTION_START, TRANSACTION_END, WRITE, RM, WATCH_EVENT, ERROR = 2, 4, 6, 7, 11, 13, 15, 16
CONNECTION = 2068


class Bytes(Protocol):
    """A guest's half of a byte ring."""

    def write(self, data: bytes) -> int: ...

    def read(self) -> bytes: ...


class StoreRing:
    """:param sleep: until an event comes; `ring_bell` sends one. `page` is the shared page's memory."""

    def __init__(
        self,
        requests: Bytes,
        replies: Bytes,
        ring_bell: Callable[[], None],
        sleep: Callable[[], None],
        page: memoryview,
    ) -> None:
        self.requests, self.replies = requests, replies
        self.ring_bell, self.sleep, self.page = ring_bell, sleep, page
        self.events: list[tuple[bytes, bytes]] = []
        self._input = b""
        self._number = 0

    def ask(self, kind: int, payload: bytes, tx: int = 0) -> bytes:
        """The answer's payload. Fails if another answer comes than the one to this request."""
        self._number += 1
        self._send(packet(kind, payload, tx, self._number))
        while True:
            answered, number, answer = self._receive()
            if answered == WATCH_EVENT:
                path, token, _ = answer.split(b"\0")
                self.events.append((path, token))
                continue
            assert number == self._number, f"request {self._number} got the answer to {number}"
            assert answered in (kind, ERROR), f"request {kind} was answered with {answered}"
            return answer

    def _send(self, data: bytes) -> None:
        while data:
            data = data[self.requests.write(data) :]
            self.ring_bell()
            if data:
                self.sleep()

    def _receive(self) -> tuple[int, int, bytes]:
        while True:
            self._input += self.replies.read()
            if len(self._input) >= 16:
                kind, number, _, size = struct.unpack_from("<4I", self._input)
                if len(self._input) >= 16 + size:
                    payload, self._input = self._input[16 : 16 + size], self._input[16 + size :]
                    return kind, number, payload
            self.ring_bell()  # there is room again
            self.sleep()


def packet(kind: int, payload: bytes, tx: int = 0, number: int = 0) -> bytes:
    return struct.pack("<4I", kind, number, tx, len(payload)) + payload


def check_all(ring: StoreRing, say: Callable[[str], None]) -> None:
    """Write and read for ever; say ``heard VALUE`` for each change of ``data/asked``, ``wrong …`` at a wrong answer."""
    ring.ask(WATCH, b"data/asked\0token\0")
    count = lost = 0
    while True:
        count += 1
        value = b"%d " % count + b"x" * (count % 7 * 100)
        tx, ended = 0, b""
        if count % 5 == 0:
            tx = int(ring.ask(TRANSACTION_START, b"\0")[:-1])
        done = [ring.ask(WRITE, b"data/n\0" + value, tx), ring.ask(READ, b"data/n\0", tx)]
        if tx:
            ended = ring.ask(TRANSACTION_END, b"T\0", tx)
            lost += ended == b"EAGAIN\0"  # a restart, or somebody else's change
            if ended not in (b"OK\0", b"EAGAIN\0"):
                say(f"wrong end {ended!r}")
        # What a transaction wrote goes with a restart: until its end tells so, it may read what was there before.
        if done != [b"OK\0", value] and ended != b"EAGAIN\0":
            say(f"wrong {count}: {done!r}")
        while ring.events:
            path, token = ring.events.pop(0)
            if (path, token) != (b"data/asked", b"token"):
                say(f"wrong event {path!r}")
            say("heard " + ring.ask(READ, b"data/asked\0").decode())
        if count % 200 == 0:
            say(f"count {count}, {lost} again")


def hostile(kind: str, ring: StoreRing) -> None:
    """Be a nuisance for ever; never sleep."""
    chance = random.Random(kind)
    {
        "flood": _flood,
        "deaf": _deaf,
        "watch": _watch,
        "transactions": _transactions,
        "noise": _noise,
        "bell": _bell,
    }[kind](ring, chance)


def _pour(ring: StoreRing, data: bytes, *, read: bool = True) -> None:
    while data:
        data = data[ring.requests.write(data) :]
        ring.ring_bell()
        if read:
            ring.replies.read()


def _flood(ring: StoreRing, chance: random.Random) -> None:
    while True:
        for number in range(900):
            path = b"data/" + b"/".join([b"%d" % number] * chance.choice([1, 1, 1, 40]))
            _pour(ring, packet(WRITE, path + b"\0" + b"x" * chance.choice([0, 1900])))
        _pour(ring, packet(RM, b"data\0") + packet(WRITE, b"data\0"))


def _deaf(ring: StoreRing, _chance: random.Random) -> None:
    while True:
        _pour(ring, packet(WRITE, b"data/x\0v") + packet(READ, b"data/x\0"), read=False)


def _watch(ring: StoreRing, _chance: random.Random) -> None:
    for number in range(130):
        _pour(ring, packet(WATCH, b"data\0" + b"%d" % number * 300 + b"\0"))
    while True:
        for number in range(200):
            _pour(ring, packet(WRITE, b"data/%d\0v" % number))
        _pour(ring, packet(RM, b"data\0") + packet(WRITE, b"data\0"))


def _transactions(ring: StoreRing, chance: random.Random) -> None:
    while True:
        for ident in range(1, 12):
            _pour(ring, packet(TRANSACTION_START, b"\0"))
            for number in range(100):
                _pour(ring, packet(WRITE, b"data/%d/%d\0v" % (ident, number), chance.randrange(1000)))
        for ident in range(1000):
            _pour(ring, packet(TRANSACTION_END, b"T\0", ident))


def _noise(ring: StoreRing, chance: random.Random) -> None:
    words = ring.page.cast("I")
    while True:
        what = chance.randrange(4)
        if what == 0:
            ring.page[:2048] = os.urandom(2048)
        elif what == 1:
            words[chance.randrange(512, 519)] = chance.getrandbits(32)
        elif what == 2:
            words[513] = (words[512] + chance.randrange(1025)) & 0xFFFF_FFFF
        else:
            words[CONNECTION // 4] = 1
        ring.ring_bell()


def _bell(ring: StoreRing, _chance: random.Random) -> None:
    while True:
        ring.ring_bell()
