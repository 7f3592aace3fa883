"""The guest that driver tests play against keeps the rules of a `GuestLink`."""

from __future__ import annotations

import select

import pytest
from fake_link import FakeGuest

from hypervisor import abi
from hypervisor.devices.driver import Copy, LinkClosed, LinkError


def test_maps_share_memory_and_pin_the_grant():
    guest = FakeGuest()
    ref = guest.grant(guest.new_frame(b"ring"))
    link = guest.link()
    (page,) = link.map([ref])
    assert bytes(page.view[:4]) == b"ring"
    page.view[:2] = b"RI"
    assert bytes(guest.granted(ref)[:4]) == b"RIng"
    assert guest.revoke(ref) is False
    link.unmap([page])
    with pytest.raises(ValueError, match="released"):
        page.view[0]
    assert guest.revoke(ref) is True


def test_refused_maps_map_nothing():
    guest = FakeGuest()
    link = guest.link()
    good, readonly = guest.grant(), guest.grant(readonly=True)
    with pytest.raises(LinkError) as failure:
        link.map([good, readonly])
    assert failure.value.status == abi.GNTST_general_error
    with pytest.raises(LinkError) as failure:
        link.map([good, 9999])
    assert failure.value.status == abi.GNTST_bad_gntref
    assert guest.mapped == 0
    (page,) = link.map([readonly], readonly=True)
    assert page.view.readonly


def test_copies_go_both_ways_and_fail_one_by_one():
    guest = FakeGuest()
    link = guest.link()
    source, target, readonly = guest.grant(guest.new_frame(b"abcdef")), guest.grant(), guest.grant(readonly=True)
    statuses = link.copy(
        [
            Copy(source, 1, 3, 100, to_guest=False),
            Copy(target, 4000, 3, 100, to_guest=True),
            Copy(readonly, 0, 3, 100, to_guest=True),
            Copy(target, 4094, 3, 100, to_guest=True),
            Copy(77777, 0, 1, 0, to_guest=False),
        ]
    )
    assert statuses == [0, 0, abi.GNTST_general_error, abi.GNTST_bad_copy_arg, abi.GNTST_bad_gntref]
    assert bytes(guest.granted(target)[4000:4003]) == b"bcd"


def test_events_and_the_next_driver():
    guest = FakeGuest()
    port = guest.open_port()
    link = guest.link()
    event = link.bind(port)
    assert event.answer() and not event.answer()
    guest.notify(port)
    assert select.select([event], [], [], 0)[0] and event.answer()
    event.notify()
    event.notify()
    assert guest.notifications(port) == 2 and guest.notifications(port) == 0
    with pytest.raises(LinkError):
        guest.link().bind(port)
    link.close()  # the driver is killed
    assert not link.alive()
    again = guest.link().bind(port)
    guest.notify(port)
    assert again.answer()


def test_the_end_of_the_domain_closes_the_link():
    guest = FakeGuest()
    link = guest.link()
    guest.die()
    assert select.select([link], [], [], 0)[0] and not link.alive()
    with pytest.raises(LinkClosed):
        link.map([guest.grant()])
