"""Front ends that do their worst: the driver answers, breaks that disk alone, and takes bounded memory and time."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from blkfront import PAGE, SECTOR, Front, Rig
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.devices.block.frontend import read_frontend
from hypervisor.devices.block.ring import LAYOUTS, decode
from hypervisor.devices.driver import DeviceBroken

SECTORS = 64
OTHER = 51728
KEY = b"do not read this"
READ, WRITE = 0, 1


class Fuzzed:
    """A hostile disk beside a good one, whose images lie in one file: what is beyond the first must stay unseen."""

    def __init__(self, folder: Path, *, abi: str, persistent: bool) -> None:
        self.rig = Rig(folder, sectors=2 * SECTORS)
        self.rig.path.write_bytes(bytes(SECTORS * SECTOR) + KEY * (SECTORS * SECTOR // len(KEY)))
        self.good_path = folder / "good.img"
        self.good_path.write_bytes(bytes(SECTORS * SECTOR))
        self.refs = [self.rig.guest.grant() for _ in range(12)]
        self.refs += [self.rig.guest.grant(readonly=True), 0, 4711, 0xFFFF_FFFF]
        self.abi, self.persistent = abi, persistent
        self.good = Front(self.rig.guest)
        self.rig.connect(self.good, devid=OTHER, path=self.good_path, sectors=SECTORS)
        self.bad = self.connect()

    def connect(self) -> Front:
        bad = Front(self.rig.guest, abi=self.abi, persistent=self.persistent)
        self.rig.connect(bad, sectors=SECTORS)
        return bad

    def check(self) -> None:
        """The neighbour is served, and nothing of the key has come to the guest or was changed."""
        ident = self.good.request(WRITE, 8, [(self.refs[0], 0, 0)])
        self.rig.loop.run()
        assert self.good.answers() == [(ident, WRITE, 0)]
        assert KEY not in self.rig.guest.memory
        data = self.rig.data()
        assert data[SECTORS * SECTOR :] == KEY * (SECTORS * SECTOR // len(KEY)) and len(data) == 2 * SECTORS * SECTOR
        if 51712 not in self.rig.driver.stats():
            self.bad = self.connect()


operations = st.sampled_from([0, 1, 2, 3, 5, 6]) | st.integers(0, 255)
sectors = st.integers(0, SECTORS + 8) | st.sampled_from([2**32, 2**63, 2**64 - 8, 2**64 - 1])
segment = st.tuples(
    st.integers(0, 15), st.integers(0, 9) | st.integers(0, 255), st.integers(0, 9) | st.integers(0, 255)
)
request = st.tuples(
    st.sampled_from(["plain", "indirect", "discard", "bytes"]),
    operations,
    sectors,
    st.lists(segment, max_size=14),
    st.none() | st.integers(0, 65535),
    st.binary(max_size=112),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(request, max_size=24),
    st.sampled_from(["x86_64-abi", "x86_32-abi"]),
    st.booleans(),
    st.none() | st.tuples(st.integers(0, 3), st.integers(0, 2**32 - 1) | st.integers(0, 40)),
)
def test_requests_without_sense(batch: list, abi: str, persistent: bool, index: tuple[int, int] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzzed = Fuzzed(Path(folder), abi=abi, persistent=persistent)
        bad = fuzzed.bad
        for kind, op, sector, segments, count, raw in batch:
            segs = [(fuzzed.refs[ref], first, last) for ref, first, last in segments]
            if kind == "plain":
                bad.request(op, sector, segs[:11], declared=None if count is None else count & 0xFF, notify=False)
            elif kind == "indirect":
                bad.indirect(op, sector, segs, count=count, notify=False)
            elif kind == "discard":
                bad.discard(sector, (count or 0) << 20, notify=False)
            else:
                bad.put(raw[: bad.layout.slot], notify=False)
        if index is not None:
            bad.set_index(*index)
        fuzzed.rig.guest.notify(bad.ports[0])
        fuzzed.rig.loop.run()
        if index is None:
            assert len(bad.answers()) == len(batch)
        fuzzed.check()
        fuzzed.rig.driver.disconnect(51712)
        fuzzed.rig.driver.disconnect(OTHER)
        assert fuzzed.rig.guest.mapped == 0


@pytest.mark.parametrize("abi", LAYOUTS)
def test_rings_of_noise(tmp_path: Path, abi: str) -> None:
    """Whole rings of random bytes, again and again, with indices that run."""
    dice = random.Random(abi)
    fuzzed = Fuzzed(tmp_path, abi=abi, persistent=True)
    end = time.monotonic() + 2.0
    for turn in range(300):
        bad = fuzzed.bad
        page = fuzzed.rig.guest.granted(bad.rings[0][0])
        page[64:] = dice.randbytes(PAGE - 64)
        for slot in range(bad.size):  # known operations and grants get further
            at = bad.slot_at(slot)
            page[at] = dice.choice([0, 1, 3, 5, 6, page[at]])
            page[at + 1] = dice.choice([0, 1, 6, 11, page[at + 1]])
            struct.pack_into("<I", page, at + bad.layout.segments, dice.choice(fuzzed.refs))
        bad.set_index(0, bad.index(2) + dice.choice([1, 32, 33, dice.randrange(1 << 32)]))
        fuzzed.rig.guest.notify(bad.ports[0])
        fuzzed.rig.loop.run()
        fuzzed.check()
        if time.monotonic() > end and turn > 20:
            break


def test_a_guest_that_never_stops_lets_others_have_their_turn(tmp_path: Path) -> None:
    fuzzed = Fuzzed(tmp_path, abi="x86_64-abi", persistent=True)
    bad = fuzzed.bad
    for _ in range(32):
        bad.request(READ, 0, [(fuzzed.refs[0], 0, 7)], notify=False)
    # It claims more as soon as it is answered: the producer index runs ahead for ever.
    ring = fuzzed.rig.driver._disks[51712].queues[0].ring
    served = 0

    def endless() -> int:
        nonlocal served
        served += 1
        return ring.size

    ring.pending = endless  # type: ignore[method-assign]
    fuzzed.rig.guest.notify(bad.ports[0])
    ident = fuzzed.good.request(READ, 0, [(fuzzed.refs[1], 0, 7)])
    for callback in list(fuzzed.rig.loop._readers.values()):
        callback()
    assert fuzzed.good.answers() == [(ident, READ, 0)]
    assert served <= 8


def test_memory_is_bounded(tmp_path: Path) -> None:
    fuzzed = Fuzzed(tmp_path, abi="x86_64-abi", persistent=True)
    segments = [(fuzzed.refs[n % 12], 0, 7) for n in range(256)]

    def storm() -> None:
        for _ in range(20):
            for _ in range(30):
                fuzzed.bad.indirect(READ, 2**63, segments, notify=False)
            fuzzed.rig.guest.notify(fuzzed.bad.ports[0])
            fuzzed.rig.loop.run()

    rig = fuzzed.rig
    rig.guest._frames = iter(list(range(100, 700)) * 20)  # type: ignore[assignment]
    storm()
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    storm()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert len(os.listdir("/proc/self/fd")) <= before


nodes = st.dictionaries(
    st.sampled_from(
        [
            "protocol",
            "feature-persistent",
            "ring-ref",
            "ring-ref0",
            "ring-ref1",
            "ring-page-order",
            "num-ring-pages",
            "event-channel",
            "multi-queue-num-queues",
            "queue-0/ring-ref",
            "queue-1/ring-ref",
            "queue-0/event-channel",
            "queue-1/event-channel",
        ]
    ),
    st.sampled_from(
        ["0", "1", "2", "4", "8", "9", "16", "-1", "", "x86_64-abi", "x86_32-abi", "٣", "4294967295", "1e3"]
    )
    | st.text(max_size=12),
)


@given(nodes)
def test_front_end_nodes(found: dict[str, str]) -> None:
    try:
        config = read_frontend(found.get)
    except DeviceBroken:
        return
    assert 1 <= len(config["queues"]) <= 4 and config["protocol"] in LAYOUTS
    for queue in config["queues"]:
        assert 1 <= len(queue["refs"]) <= 16 and all(0 <= ref < 1 << 32 for ref in [*queue["refs"], queue["port"]])


@given(st.binary(min_size=112, max_size=112), st.sampled_from(sorted(LAYOUTS)))
def test_any_slot_can_be_decoded(data: bytes, abi: str) -> None:
    layout = LAYOUTS[abi]
    found = decode(data[: layout.slot], layout)
    assert found.operation == data[0] and len(found.segments) <= 11
