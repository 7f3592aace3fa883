"""Guest links: a driver's requests against a domain's real grants and event channels, over a real socket."""

from __future__ import annotations

import gc
import os
import select
import struct
import time

import pytest
from link_rig import PERMIT, READING, READONLY, WRITING, Served
from pv_rig import PAGE

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.devices import link_wire as wire
from hypervisor.devices.driver import Copy, LinkClosed, LinkError
from hypervisor.errors import HostFailure, WrongState
from hypervisor.evtchn.core import ChannelState
from hypervisor.evtchn.hostside import without_drivers
from hypervisor.grants.peer import HOST_READ
from hypervisor.host.guest_link import MAX_LINKS
from hypervisor.host.guest_link_ends import LinkEnds


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind():
    """A mapping has a descriptor of its own, and the rigs are cyclic garbage: the tests after this one count."""
    yield
    gc.collect()


@pytest.fixture
def rig():
    served = Served()
    yield served
    served.stop()


def readable(thing, seconds: float = 10) -> bool:
    return bool(select.select([thing], [], [], seconds)[0])


def test_a_mapped_grant_is_the_guests_memory(rig):
    _, link = rig.link()
    assert link.domid == 7
    rig.grant(9, 20, domid=0)
    (page,) = link.map([9])
    rig.put(20 * PAGE, b"from the guest")
    assert bytes(page.view[:14]) == b"from the guest"
    page.view[:4] = b"FROM"
    assert rig.get(20 * PAGE, 8) == b"FROM the"
    assert rig.flags(9) == READING | WRITING and rig.frames.refs[20] > 1
    link.unmap([page])
    assert rig.flags(9) == 0 and not len(rig.domain.grants.own)
    (again,) = link.map([9], readonly=True)
    assert again.view.readonly and rig.flags(9) == READING
    link.close()
    rig.until_free()
    assert rig.flags(9) == 0


def test_all_or_none_is_mapped(rig):
    _, link = rig.link()
    rig.grant(9, 20, domid=0)
    rig.grant(10, 21, PERMIT | READONLY, domid=0)
    rig.grant(11, 22, domid=5)
    for bad, status in ((10, abi.GNTST_general_error), (11, abi.GNTST_general_error), (9999, abi.GNTST_bad_gntref)):
        with pytest.raises(LinkError) as failure:
            link.map([9, bad])
        assert failure.value.status == status
        assert not rig.in_run_loop(lambda: len(rig.domain.grants.own)) and rig.flags(9) == 0
    link.unmap(link.map([9, 10, 9], readonly=True))
    link.close()


def test_a_page_table_is_not_mapped_writable(rig):
    _, link = rig.link()
    rig.grant(9, 4, domid=0)  # ROOT_L1
    with pytest.raises(LinkError) as failure:
        link.map([9])
    assert failure.value.status == abi.GNTST_general_error
    link.unmap(link.map([9], readonly=True))
    assert link.copy([Copy(9, 0, 8, 0, to_guest=True)]) == [abi.GNTST_general_error]
    link.close()


def test_more_pages_than_one_message_takes(rig):
    _, link = rig.link()
    refs = [rig.grant(ref, 20 + ref % 8, domid=0) for ref in range(8, 408)]
    pages = link.map(refs * 3)  # no more than 127 uses of each
    assert len(pages) == 1200 and len({page.slot for page in pages}) == 1200
    link.unmap(pages)
    assert not rig.in_run_loop(lambda: len(rig.domain.grants.own))
    link.close()


def test_copies(rig):
    _, link = rig.link()
    rig.grant(9, 20, domid=0)
    rig.grant(10, 21, PERMIT | READONLY, domid=0)
    rig.put(21 * PAGE + 100, b"0123456789")
    statuses = link.copy(
        [
            Copy(10, 100, 10, 0, to_guest=False),
            Copy(9, 4090, 6, 2, to_guest=True),
            Copy(10, 0, 4, 0, to_guest=True),
            Copy(9, 4090, 7, 0, to_guest=False),
            Copy(4444, 0, 1, 0, to_guest=False),
        ]
    )
    okay, general = abi.GNTST_okay, abi.GNTST_general_error
    assert statuses == [okay, okay, general, abi.GNTST_bad_copy_arg, abi.GNTST_bad_gntref]
    assert bytes(link.buffer[:10]) == b"0123456789" and rig.get(21 * PAGE - 6, 6) == b"234567"
    assert rig.flags(9) == 0 and not rig.in_run_loop(lambda: len(rig.domain.grants.own))
    with pytest.raises(ValueError, match="does not fit"):
        link.copy([Copy(9, 0, 8, len(link.buffer) - 4, to_guest=False)])
    link.close()


def test_copies_keep_to_the_granted_part_of_a_page(rig):
    rig.in_run_loop(lambda: rig.domain.grants.set_version(2))
    _, link = rig.link()
    rig.grant(9, 20, PERMIT | abi.GTF_sub_page, domid=0, start=100, length=50)
    inside, before, behind = (Copy(9, at, 20, 0, to_guest=False) for at in (130, 90, 131))
    assert link.copy([inside, before, behind]) == [0, abi.GNTST_general_error, abi.GNTST_general_error]
    with pytest.raises(LinkError):
        link.map([9])
    link.close()


def test_a_state_is_taken_as_if_there_were_no_driver(rig):
    """Of a guest that is kept on a second host too, and served on by the drivers here."""
    _, link = rig.link()
    rig.grant(9, 20, domid=0)
    rig.grant(10, 21, PERMIT | READONLY, domid=0)
    rig.grant(11, 22, domid=7)
    port, other = rig.unbound(), rig.unbound()
    domain = rig.domain
    rig.in_run_loop(lambda: (domain.events.accept(other, 0, 5), domain.grants.own.pin(11, 7, HOST_READ, readonly=True)))

    def state():
        return domain.frames.raw(), domain.grants.own.save(), domain.events.save()["channels"]

    def aside():
        with domain.grants.own.set_aside(0), without_drivers(domain.events):
            return state()

    before = rig.in_run_loop(state)
    pages = [*link.map([9, 9]), *link.map([9, 10], readonly=True)]
    event = link.bind(port)
    during = rig.in_run_loop(state)
    assert all(one != two for one, two in zip(before, during, strict=True))
    assert rig.in_run_loop(aside) == before, "a neighbour's use and the host process's end stay"
    assert rig.in_run_loop(state) == during
    assert rig.flags(9) == READING | WRITING
    event.answer()
    rig.in_run_loop(lambda: domain.events.send(port))
    assert readable(event), "its channel leads to the driver still"
    link.unmap(pages)
    assert rig.in_run_loop(state)[:2] == before[:2] and rig.flags(9) == 0
    rig.in_run_loop(lambda: domain.grants.own.unpin(11, HOST_READ, readonly=True))
    link.close()


def test_events_both_ways(rig):
    _, link = rig.link()
    port = rig.unbound()
    event = link.bind(port)
    assert readable(event) and event.answer(), "a driver looks at the ring as soon as it is bound"
    assert not event.answer()
    rig.in_run_loop(lambda: rig.domain.events.send(port))
    assert readable(event) and event.answer()
    event.notify()
    deadline = time.monotonic() + 10
    while not rig.in_run_loop(lambda: rig.domain.events.is_pending(port)):
        assert time.monotonic() < deadline
    with pytest.raises(LinkError, match="EINVAL"):
        link.bind(port)
    link.unbind(event)
    assert rig.in_run_loop(lambda: rig.domain.events.status(port)).state is ChannelState.UNBOUND
    assert link.bind(port).answer()
    link.close()
    rig.until_free()


def test_only_ports_that_wait_for_domain_0(rig):
    _, link = rig.link()
    other = rig.in_run_loop(lambda: rig.domain.events.alloc_unbound(0x7FF0, 9))
    for port in (0, other, 60, 1 << 20):
        with pytest.raises(LinkError, match="EINVAL"):
            link.bind(port)
    link.close()


def test_a_port_that_the_guest_closes_is_gone(rig):
    _, link = rig.link()
    port = rig.unbound()
    event = link.bind(port)
    rig.in_run_loop(lambda: rig.domain.events.close(port))
    again = rig.unbound()
    assert again == port
    event.notify()  # must not reach the new channel
    rig.in_poller(lambda: None)
    assert not rig.in_run_loop(lambda: rig.domain.events.is_pending(port))
    link.unbind(event)
    assert rig.in_run_loop(lambda: rig.domain.events.status(port)).state is ChannelState.UNBOUND
    assert link.bind(port).answer()
    link.close()


def test_the_next_driver_takes_over(rig):
    """Also when the death of the one before was not noticed yet."""
    _, link = rig.link()
    port = rig.unbound()
    rig.grant(9, 20, domid=0)
    link.map([9])
    link.bind(port)
    _, following = rig.link()
    link.close()
    event = following.bind(port)
    assert event.answer()
    rig.in_run_loop(lambda: rig.domain.events.send(port))
    assert readable(event) and event.answer()
    following.unmap(following.map([9]))
    following.close()
    rig.until_free()


def test_unlink_and_the_end_of_the_guest(rig):
    first, one = rig.link()
    _, two = rig.link()
    rig.grant(9, 20, domid=0)
    one.map([9])
    two.map([9])
    rig.in_poller(lambda: rig.links.close(first))
    assert readable(one) and not one.alive() and two.alive()
    with pytest.raises(LinkClosed):
        one.map([9])
    rig.in_poller(rig.links.guest_ended)
    assert readable(two) and not two.alive()
    rig.until_free()
    with pytest.raises(WrongState, match="ended"):
        rig.link()
    one.close()
    two.close()


def test_the_number_of_links_is_bounded(rig):
    links = [rig.link()[1] for _ in range(MAX_LINKS)]
    with pytest.raises(WrongState, match="16 links"):
        rig.link()
    for link in links:
        link.close()
    rig.until_free()


def test_what_is_no_link_is_refused(rig):
    ends = LinkEnds.create(rig.memfd, 1 << 16)
    with pytest.raises(HostFailure, match="descriptors"):
        rig.in_poller(lambda: rig.links.open([os.dup(ends.for_domain[0])]))
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 4096)
    with pytest.raises(HostFailure, match="seals"):
        rig.in_poller(lambda: rig.links.open([os.dup(ends.for_domain[0]), loose]))
    ends.close()


HELLO = wire.request(wire.HELLO, 1, [(wire.VERSION, 5, 6, 16, 0)])


@pytest.mark.parametrize(
    "messages",
    [
        [b"x"],
        [b"\xff" * 40],
        [wire.request(wire.MAP, 1, [(9, 0)])],  # before HELLO
        [HELLO, HELLO],
        [wire.request(wire.HELLO, 1, [(99, 5, 6, 16, 0)])],
        [HELLO, wire.request(wire.MAP, 2, [(9, 0), (9, 0)])],  # one slot twice
        [HELLO, wire.request(wire.MAP, 2, [(9, 1 << 20)])],
        [HELLO, wire.request(wire.UNMAP, 2, [(3,)])],
        [HELLO, wire.REQUEST.pack(wire.MAP, 0, 65535, 2)],
        [HELLO, wire.REQUEST.pack(wire.BIND, 0, 2, 2) + struct.pack("<II", 1, 2)],
        [HELLO, wire.request(wire.COPY, 2, [], flags=1)],
        [HELLO, bytes(wire.MAX_MESSAGE + 1)],
    ],
)
def test_a_driver_that_talks_nonsense_ends_its_own_link_only(rig, messages):
    _, good = rig.link()
    rig.grant(9, 20, domid=0)
    sock = rig.raw()
    for message in messages:
        sock.send(message)
        answer = sock.recv(wire.MAX_MESSAGE)
    assert answer == b""
    sock.close()
    good.unmap(good.map([9]))
    good.close()
    rig.until_free()


def test_a_driver_that_does_not_wait_or_read(rig):
    """Each request gets its answer before the next is taken: a flood ends the link and costs nothing."""
    rig.grant(9, 20, domid=0)
    sock = rig.raw()
    sock.settimeout(None)
    sock.send(HELLO)
    with pytest.raises(OSError):
        for number in range(100000):
            sock.send(wire.request(wire.COPY, number, [(9, 0, 8, 0, 0)]))
    rig.until_free()
    sock.close()


def test_wire_errors():
    with pytest.raises(wire.BadForm):
        wire.parse_answer(b"", wire.MAP, 1, 1)
    good = wire.answer(wire.MAP, 5, 0, [(3,), (4,)])
    assert wire.parse_answer(good, wire.MAP, 5, 2) == (0, [(3,), (4,)])
    for op, number, count in ((wire.COPY, 5, 2), (wire.MAP, 6, 2), (wire.MAP, 5, 1)):
        with pytest.raises(wire.BadForm):
            wire.parse_answer(good, op, number, count)
    assert wire.parse_answer(wire.answer(wire.MAP, 5, -3), wire.MAP, 5, 2) == (-3, [])
    assert wire.parse_answer(wire.answer(wire.BIND, 5, errno.EINVAL), wire.BIND, 5, 1) == (errno.EINVAL, [])
