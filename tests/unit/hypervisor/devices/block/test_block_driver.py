"""Rings served by the driver over a fake link: data, checks, restarts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from blkfront import PAGE, SECTOR, Front, Rig, pattern

from hypervisor.devices.block import queue as queues
from hypervisor.devices.block.image.base import Action, ImageGone
from hypervisor.devices.block.journal import load_ring, ring_text
from hypervisor.devices.driver import DeviceBroken, LinkClosed

READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6
OKAY, ERROR, UNSUPPORTED = 0, -1, -2


KINDS = [
    pytest.param({"abi": abi, "order": order, "persistent": persistent}, id=f"{abi}-{order}-{persistent}")
    for abi in ("x86_64-abi", "x86_32-abi")
    for order in (0, 2, 4)
    for persistent in (True, False)
]


@pytest.mark.parametrize("kind", KINDS)
def test_write_and_read_back(rig: Rig, kind: dict[str, Any]) -> None:
    front = Front(rig.guest, **kind)
    rig.connect(front)
    frames = [rig.guest.new_frame(pattern(n)) for n in range(3)]
    refs = [rig.guest.grant(frame) for frame in frames]
    # More requests than the ring has slots, so that every slot is used, also those over a page's end.
    for turn in range(min(front.size, 140) + 5):
        sector = turn % 100 * 8
        wrote = front.request(WRITE, sector, [(refs[0], 0, 7), (refs[1], 2, 4), (refs[2], 7, 7)])
        rig.loop.run()
        assert front.answers() == [(wrote, WRITE, OKAY)]
    expected = pattern(0) + pattern(1)[1024:2560] + pattern(2)[3584:]
    assert rig.data()[sector * SECTOR : sector * SECTOR + len(expected)] == expected
    target = rig.guest.grant()
    read = front.request(READ, sector + 8, [(target, 5, 7)])
    rig.loop.run()
    assert front.answers() == [(read, READ, OKAY)]
    assert bytes(rig.guest.granted(target)) == bytes(5 * SECTOR) + pattern(1)[1024:2560]
    stats = rig.driver.stats()[51712]
    assert stats["write_requests"] == min(front.size, 140) + 5 and stats["read_bytes"] == 3 * SECTOR


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("abi", ["x86_64-abi", "x86_32-abi"])
def test_indirect(rig: Rig, abi: str, persistent: bool) -> None:
    front = Front(rig.guest, abi=abi, persistent=persistent)
    rig.connect(front)
    refs = [rig.guest.grant(rig.guest.new_frame(pattern(n))) for n in range(200)]
    wrote = front.indirect(WRITE, 16, [(ref, 0, 7) for ref in refs])
    targets = [rig.guest.grant() for _ in range(200)]
    rig.loop.run()
    read = front.indirect(READ, 16, [(ref, 0, 7) for ref in targets])
    rig.loop.run()
    assert front.answers() == [(wrote, WRITE, OKAY), (read, READ, OKAY)]
    assert rig.data()[16 * SECTOR :][: 200 * PAGE] == b"".join(pattern(n) for n in range(200))
    assert [bytes(rig.guest.granted(ref)) for ref in targets] == [pattern(n) for n in range(200)]


def test_flush_discard_and_their_counters(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    ref = rig.guest.grant(rig.guest.new_frame(b"x" * PAGE))
    ids = [front.request(FLUSH, 0), front.request(FLUSH, 8, [(ref, 0, 7)]), front.discard(8, 4)]
    rig.loop.run()
    assert front.answers() == [(ids[0], FLUSH, OKAY), (ids[1], FLUSH, OKAY), (ids[2], DISCARD, OKAY)]
    assert rig.data()[8 * SECTOR : 16 * SECTOR] == bytes(4 * SECTOR) + b"x" * 4 * SECTOR
    stats = rig.driver.stats()[51712]
    assert (stats["flushes"], stats["discards"], stats["errors"]) == (2, 1, 0)


def bad_requests(front: Front, ref: int) -> list[tuple[int, int, int]]:
    """What must fail, and how."""
    far = 2048
    readonly = front.guest.grant(readonly=True)
    return [
        (front.request(READ, 0), READ, ERROR),
        (front.request(READ, 0, [(ref, 0, 7)], declared=12), READ, ERROR),
        (front.request(READ, 0, [(ref, 0, 7)], declared=255), READ, ERROR),
        (front.request(READ, 0, [(ref, 3, 2)]), READ, ERROR),
        (front.request(READ, 0, [(ref, 0, 8)]), READ, ERROR),
        (front.request(READ, far, [(ref, 0, 0)]), READ, ERROR),
        (front.request(WRITE, far - 7, [(ref, 0, 7)]), WRITE, ERROR),
        (front.request(WRITE, 2**64 - 1, [(ref, 0, 7)]), WRITE, ERROR),
        (front.request(READ, 0, [(999999, 0, 7)]), READ, ERROR),
        (front.request(READ, 0, [(readonly, 0, 7)]), READ, ERROR),
        (front.request(BARRIER, 0, [(ref, 0, 7)]), BARRIER, UNSUPPORTED),
        (front.request(4, 0), 4, UNSUPPORTED),
        (front.request(255, 0), 255, UNSUPPORTED),
        (front.discard(far, 1), DISCARD, ERROR),
        (front.discard(0, 0), DISCARD, ERROR),
        (front.discard(2**64 - 1, 2**64 - 1), DISCARD, ERROR),
        (front.indirect(READ, 0, [(ref, 0, 7)], count=0), READ, ERROR),
        (front.indirect(READ, 0, [(ref, 0, 7)], count=257), READ, ERROR),
        (front.indirect(READ, 0, [(ref, 0, 7)], count=65535), READ, ERROR),
        (front.indirect(INDIRECT, 0, [(ref, 0, 7)]), INDIRECT, UNSUPPORTED),
        (front.indirect(FLUSH, 0, [(ref, 0, 7)]), FLUSH, UNSUPPORTED),
        (front.indirect(DISCARD, 0, [(ref, 0, 7)]), DISCARD, UNSUPPORTED),
        (front.indirect(READ, far, [(ref, 0, 7)]), READ, ERROR),
        (front.indirect(READ, 0, []), READ, ERROR),
    ]


@pytest.mark.parametrize("persistent", [True, False])
def test_bad_requests_fail_alone(rig: Rig, persistent: bool) -> None:
    front = Front(rig.guest, persistent=persistent)
    rig.connect(front)
    ref = rig.guest.grant(rig.guest.new_frame(b"y" * PAGE))
    expected = bad_requests(front, ref)
    good = front.request(WRITE, 0, [(ref, 0, 7)])
    rig.loop.run()
    assert front.answers() == [*expected, (good, WRITE, OKAY)]
    assert rig.data() == b"y" * PAGE + bytes(2040 * SECTOR)
    assert not [report for report in rig.reports if report[1] == "broken"]


def test_readonly_disk_is_not_written(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front, readonly=True)
    ref = rig.guest.grant(rig.guest.new_frame(b"z" * PAGE))
    ids = [front.request(WRITE, 0, [(ref, 0, 7)]), front.request(FLUSH, 0), front.discard(0, 8)]
    read = front.request(READ, 0, [(ref, 0, 7)])
    rig.loop.run()
    statuses = {ident: status for ident, _, status in front.answers()}
    assert statuses == {ids[0]: ERROR, ids[1]: ERROR, ids[2]: UNSUPPORTED, read: OKAY}
    assert not any(rig.data())


@pytest.mark.parametrize("claimed", [33, 1 << 31, 0xFFFF_FFFF])
def test_impossible_producer_breaks_only_this_disk(rig: Rig, claimed: int) -> None:
    front, other = Front(rig.guest), Front(rig.guest)
    rig.connect(front)
    rig.connect(other, devid=51728)
    front.set_index(0, claimed)
    rig.guest.notify(front.ports[0])
    rig.loop.run()
    assert [(devid, what) for devid, what, _ in rig.reports] == [(51712, "broken")]
    assert "32" in rig.reports[0][2]
    ref = rig.guest.grant()
    read = other.request(READ, 0, [(ref, 0, 7)])
    rig.loop.run()
    assert other.answers() == [(read, READ, OKAY)]
    assert list(rig.driver.stats()) == [51728]


def test_nothing_is_left_behind(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    front = Front(rig.guest)
    rig.connect(front)
    front.request(READ, 0, [(rig.guest.grant(), 0, 7)])
    rig.loop.run()
    assert rig.guest.mapped == 2
    rig.driver.disconnect(51712)
    assert rig.guest.mapped == 0
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("what", ["ring", "port"])
def test_unusable_connection(rig: Rig, what: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    front = Front(rig.guest)
    front.connection["queues"][0]["refs" if what == "ring" else "port"] = [4711] if what == "ring" else 4711
    with pytest.raises(DeviceBroken, match="4711" if what == "port" else "mapped"):
        rig.connect(front)
    assert rig.guest.mapped == 0
    assert len(os.listdir("/proc/self/fd")) <= before


def test_guest_that_ends(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    front.request(READ, 0, [(rig.guest.grant(), 0, 7)])
    rig.link.close()
    with pytest.raises(LinkClosed):
        rig.loop.run()
    rig.driver.disconnect(51712)


# -- notifications


def test_notifies_only_when_asked(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    ref = rig.guest.grant()
    assert rig.guest.notifications(front.ports[0]) == 1  # for what a driver before this one may have left
    front.set_index(3, 3)  # rsp_event: after the third
    for expected in (0, 0, 1, 0):
        front.request(READ, 0, [(ref, 0, 7)])
        rig.loop.run()
        assert rig.guest.notifications(front.ports[0]) == expected
    assert front.index(1) == 5  # req_event


def test_a_front_end_that_has_closed_is_woken_for_what_it_has_left(rig: Rig) -> None:
    front = Front(rig.guest, queues=2, order=1)
    rig.connect(front)
    rig.loop.run()
    for port in front.ports:
        rig.guest.notifications(port)  # those of the connection
    ref = rig.guest.grant(rig.guest.new_frame(pattern(3)))
    rig.driver.finish(51712)
    assert [rig.guest.notifications(port) for port in front.ports] == [1, 1]
    wrote = front.request(WRITE, 8, [(ref, 0, 7)], queue=1)
    rig.driver.finish(51712)
    assert front.answers(1) == [(wrote, WRITE, OKAY)] and rig.driver.stats()[51712]["write_requests"] == 1
    rig.driver.finish(51728)  # of none


def test_several_queues(rig: Rig) -> None:
    front = Front(rig.guest, queues=4, order=1)
    rig.connect(front)
    refs = [rig.guest.grant(rig.guest.new_frame(pattern(n))) for n in range(4)]
    ids = [front.request(WRITE, 8 * n, [(refs[n], 0, 7)], queue=n) for n in range(4)]
    rig.loop.run()
    assert [front.answers(n) for n in range(4)] == [[(ids[n], WRITE, OKAY)] for n in range(4)]
    assert rig.data()[: 4 * PAGE] == b"".join(pattern(n) for n in range(4))


# -- persistent grants


def test_grants_are_mapped_once(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    refs = [rig.guest.grant() for _ in range(8)]
    for _ in range(20):
        front.request(READ, 0, [(ref, 0, 7) for ref in refs])
        rig.loop.run()
    assert rig.link.calls.count("map") == 2 and "unmap" not in rig.link.calls


def test_mapped_grants_are_bounded_and_the_oldest_goes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.devices.block.driver.MAX_MAPPED_EACH", 0)
    front = Front(rig.guest)  # so the least there may be: 320
    rig.connect(front)
    refs = [rig.guest.grant() for _ in range(700)]
    for ref in refs:
        front.request(READ, 0, [(ref, 0, 7)])
        rig.loop.run()
        front.answers()
        assert rig.guest.mapped <= 321
    assert rig.guest.grants[refs[-1]].mapped and not rig.guest.grants[refs[0]].mapped
    assert rig.guest.revoke(refs[0])
    wide = front.indirect(READ, 0, [(ref, 0, 7) for ref in refs[100:350]])
    rig.loop.run()
    assert front.answers() == [(wide, READ, OKAY)]
    assert rig.guest.mapped <= 321


# -- the image's errors


class OddImage:
    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.gone = False
        self.ran: list[Action] = []

    def run(self, operations: Any) -> None:
        if self.gone:
            raise ImageGone("test")
        for operation in operations:
            self.ran.append(operation.action)
            operation.error = self.error

    def close(self) -> None: ...


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_image_reach_the_guest(rig: Rig, error: int) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    rig.driver._disks[51712].image = OddImage(error)
    ref = rig.guest.grant()
    ids = [front.request(WRITE, 0, [(ref, 0, 7)]), front.request(FLUSH, 0), front.discard(0, 8)]
    rig.loop.run()
    assert [status for _, _, status in front.answers()] == [ERROR] * len(ids)
    assert rig.driver.stats()[51712]["errors"] == 3
    # One line for people, not one for each.
    assert len(rig.reports) == 1 and errno.errorcode[error] in rig.reports[0][2]


def test_discard_that_the_image_cannot_do(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    rig.driver._disks[51712].image = OddImage(errno.EOPNOTSUPP)
    ident = front.discard(0, 8)
    rig.loop.run()
    assert front.answers() == [(ident, DISCARD, UNSUPPORTED)]


def test_image_that_went_is_waited_for(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    disk, image = rig.driver._disks[51712], OddImage()
    disk.image, image.gone = image, True
    ids = [front.request(FLUSH, 0) for _ in range(3)]
    rig.loop.run()
    assert disk.image is None and not front.answers() and rig.reports[-1][1] == "warning"
    disk.image = OddImage()
    rig.driver.update(51712, rig.device)
    assert [ident for ident, _, _ in front.answers()] == ids


# -- restarts


def test_unanswered_requests_are_done_by_the_next_driver(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    refs = [rig.guest.grant(rig.guest.new_frame(pattern(n))) for n in range(6)]
    first = front.request(WRITE, 0, [(refs[0], 0, 7)])
    rig.loop.run()
    rest = [front.request(WRITE, 8 * n, [(refs[n], 0, 7)]) for n in range(1, 6)]
    rig.kill()
    rig.connect(front)
    rig.loop.run()
    assert [ident for ident, _, _ in front.answers()] == [first, *rest]
    assert rig.data()[: 6 * PAGE] == b"".join(pattern(n) for n in range(6))


def test_a_response_whose_event_was_not_sent(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    front.set_index(3, 1)
    front.request(FLUSH, 0)
    rig.loop.run()
    rig.guest.notifications(front.ports[0])  # the driver died before it
    rig.kill()
    rig.connect(front)
    rig.loop.run()
    assert rig.guest.notifications(front.ports[0]) == 1


class Killed(BaseException):
    """SIGKILL: nobody catches it."""


def to_another_host(journal: Path) -> None:
    """The journal there is a new one, with what this one tells."""
    with journal.open("rb") as file:
        text = ring_text(file.fileno())
    with journal.open("wb") as file:
        for nonsense in ("", "{", text[:40]):
            load_ring(file.fileno(), nonsense)
        load_ring(file.fileno(), text)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("abi", ["x86_64-abi", "x86_32-abi"])
def test_death_between_response_and_index(tmp_path: Path, abi: str, order: int) -> None:
    """Responses lie in the slots of their requests: a driver that dies after each byte of them must lose nothing."""
    for after in range(8):
        folder = tmp_path / str(after)
        folder.mkdir()
        rig = Rig(folder)
        front = Front(rig.guest, abi=abi, order=order)
        rig.connect(front)
        refs = [rig.guest.grant(rig.guest.new_frame(pattern(n))) for n in range(6)]
        for _ in range(front.size - 3):  # the batch to come goes over the ring's end
            front.request(FLUSH, 0)
            rig.loop.run()
        front.answers()
        ids = [front.request(WRITE, 8 * n, [(refs[n], 0, 7)]) for n in range(6)]
        ring = rig.driver._disks[51712].queues[0].ring
        pages, written = ring._pages, 0

        class Page:
            """A page whose writer dies after so many writes."""

            def __init__(self, view: memoryview) -> None:
                self.view = view

            def __getitem__(self, at: slice) -> memoryview:
                return self.view[at]

            def __setitem__(self, at: slice, data: bytes) -> None:
                nonlocal written
                if written == after:  # noqa: B023
                    raise Killed
                written += 1
                self.view[at] = data

        ring._pages = [Page(view) for view in pages]  # type: ignore[misc]
        done = ring.done
        try:
            rig.loop.run()
        except Killed:
            front.set_index(2, done)
        assert after >= 6 or front.index(2) == done
        rig.kill()
        if after % 2:
            to_another_host(rig.journal.with_name("ring-51712"))
        rig.connect(front)
        rig.loop.run()
        assert front.answers() == [(ident, WRITE, OKAY) for ident in ids]
        assert rig.data()[: 6 * PAGE] == b"".join(pattern(n) for n in range(6))


def test_old_journal_is_not_believed(rig: Rig) -> None:
    """A front end that connects anew, after a driver that left responses in its journal."""
    front = Front(rig.guest)
    rig.connect(front)
    front.request(FLUSH, 0)
    rig.loop.run()
    rig.kill()
    front.set_index(0, 0)
    front.set_index(2, 0)
    front.produced, front.consumed = [0], [0]
    front.connection = {**front.connection, "connection": "another"}
    ref = rig.guest.grant(rig.guest.new_frame(b"n" * PAGE))
    ident = front.request(WRITE, 0, [(ref, 0, 7)])
    rig.connect(front)
    rig.loop.run()
    assert front.answers() == [(ident, WRITE, OKAY)]
    assert rig.data()[:PAGE] == b"n" * PAGE


# -- limits


def test_iops_limit_with_burst(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front(rig.guest)
    monkeypatch.setattr(
        "hypervisor.devices.block.driver.Throttle", lambda limits: queues.Throttle(limits, lambda: rig.loop.now)
    )
    rig.connect(front, limits={"iops": 10, "burst_seconds": 1.0})
    done = []
    for _ in range(30):
        front.request(FLUSH, 0)
    for _ in range(41):
        rig.loop.run()
        done.append(len(front.answers()))
        rig.loop.now += 0.1
    # The burst at once and one into debt, then ten a second.
    assert done[0] == 11 and sum(done) == 30
    assert all(sum(done[: tenth + 1]) <= 11 + tenth for tenth in range(41))
    assert sum(done[:11]) >= 20


def test_bytes_limit_takes_large_requests_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hypervisor.devices.block.driver.Throttle", lambda limits: queues.Throttle(limits, lambda: rig.loop.now)
    )
    front = Front(rig.guest)
    rig.connect(front, limits={"bytes_per_second": PAGE, "burst_seconds": 0})
    refs = [rig.guest.grant() for _ in range(8)]
    for _ in range(2):
        front.request(READ, 0, [(ref, 0, 7) for ref in refs])
    rig.loop.run()
    assert len(front.answers()) == 1
    due = rig.loop.next_timer()
    assert due is not None and 7.9 < due < 8.1
    rig.loop.now = due
    rig.loop.run()
    assert len(front.answers()) == 1
    rig.driver.update(51712, {**rig.device, "limits": {}})
    front.request(READ, 0, [(ref, 0, 7) for ref in refs])
    rig.loop.run()
    assert len(front.answers()) == 1


def test_growth(rig: Rig) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    ref = rig.guest.grant(rig.guest.new_frame(b"g" * PAGE))
    refused = front.request(WRITE, 2048, [(ref, 0, 7)])
    rig.loop.run()
    os.truncate(rig.path, 4096 * SECTOR)
    rig.driver.update(51712, {**rig.device, "sectors": 4096})
    taken = front.request(WRITE, 2048, [(ref, 0, 7)])
    rig.loop.run()
    assert front.answers() == [(refused, WRITE, ERROR), (taken, WRITE, OKAY)]
    assert rig.data()[2048 * SECTOR :][:PAGE] == b"g" * PAGE
