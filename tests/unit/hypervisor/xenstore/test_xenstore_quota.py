"""What one guest may use, and that others do not feel it."""

from __future__ import annotations

import pytest

from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.wire import Op

OK = b"OK\0"

SMALL = Limits(
    nodes=10,
    node_size=200,
    memory=1500,
    permissions=2,
    watches=3,
    watch_size=100,
    transactions=2,
    transaction_nodes=12,
    transaction_bytes=1000,
    outstanding=3,
    event_bytes=400,
    tool_output_bytes=2000,
    write_rate=10.0,
    write_burst=5.0,
)


@pytest.fixture
def small(make_world):
    return make_world(SMALL)


def test_levels_of_a_path(make_world) -> None:
    world = make_world(Limits(levels=6))
    domain = world.domain(5)
    assert domain.ask(Op.WRITE, b"a/b/c/d\0") == b"ENOSPC"
    assert domain.ask(Op.READ, b"a\0") == b"ENOENT"
    assert domain.ask(Op.WRITE, b"a/b/c\0") == OK
    assert world.dom0.ask(Op.WRITE, b"/a" * 1000 + b"\0") == OK


def test_nodes(small) -> None:
    domain = small.domain(5)
    answers = [domain.ask(Op.WRITE, b"n%d\0" % i) for i in range(10)]
    assert answers == [OK] * 9 + [b"ENOSPC"]  # its home is its own, too
    assert domain.ask(Op.RM, b"n0\0") == OK
    assert domain.ask(Op.MKDIR, b"a/b\0") == b"ENOSPC"
    assert domain.ask(Op.READ, b"a\0") == b"ENOENT"
    assert domain.ask(Op.MKDIR, b"a\0") == OK
    assert small.domain(6).ask(Op.WRITE, b"n\0") == OK


def test_nodes_of_a_transaction_count_at_once_and_at_commit(small) -> None:
    domain = small.domain(5)
    tx = domain.start()
    answers = [domain.ask(Op.WRITE, b"n%d\0" % i, tx) for i in range(10)]
    assert answers == [OK] * 9 + [b"ENOSPC"]
    assert domain.ask(Op.TRANSACTION_END, b"T\0", tx) == OK
    assert small.server.store.nodes_of(5) == 10
    tx = domain.start()
    assert domain.ask(Op.RM, b"n1\0", tx) == OK
    assert domain.ask(Op.WRITE, b"n2/x\0", tx) == OK
    assert domain.ask(Op.TRANSACTION_END, b"T\0", tx) == OK
    assert small.server.store.nodes_of(5) == 10


def test_a_quota_used_up_meanwhile_fails_the_commit(small) -> None:
    domain = small.domain(5)
    small.dom0.ask(Op.MKDIR, b"/local/domain/5/sub\0")
    small.dom0.ask(Op.SET_PERMS, b"/local/domain/5/sub\0n5\0")
    tx = domain.start()
    for i in range(6):
        assert domain.ask(Op.WRITE, b"sub/n%d\0" % i, tx) == OK
    for i in range(4):
        assert domain.ask(Op.WRITE, b"m%d\0" % i) == OK
    assert domain.ask(Op.TRANSACTION_END, b"T\0", tx) == b"ENOSPC"
    assert domain.ask(Op.DIRECTORY, b"sub\0") == b""


def test_size_of_a_node(small) -> None:
    domain = small.domain(5)
    assert domain.ask(Op.WRITE, b"a\0" + b"x" * 177) == b"ENOSPC"
    assert domain.ask(Op.WRITE, b"a\0" + b"x" * 176) == OK
    assert domain.ask(Op.WRITE, b"a\0" + b"x" * 177) == b"ENOSPC"
    assert domain.ask(Op.MKDIR, b"a/b\0") == b"ENOSPC"  # the list of children counts
    assert small.dom0.ask(Op.WRITE, b"/big\0" + b"x" * 4000) == OK


def test_bytes_of_all_nodes(small) -> None:
    domain = small.domain(5)
    answers = [domain.ask(Op.WRITE, b"n%d\0" % i + b"x" * 170) for i in range(9)]
    assert answers.count(OK) == 6
    assert answers[-1] == b"ENOSPC"
    assert small.server.store.bytes_of(5) <= SMALL.memory
    assert domain.ask(Op.WRITE, b"n0\0") == OK
    assert domain.ask(Op.WRITE, b"n8\0" + b"x" * 100) == OK


def test_permissions_of_a_node(small) -> None:
    domain = small.domain(5)
    domain.ask(Op.WRITE, b"a\0")
    assert domain.ask(Op.SET_PERMS, b"a\0n5\0r1\0") == OK
    assert domain.ask(Op.SET_PERMS, b"a\0n5\0r1\0r2\0") == b"ENOSPC"


def test_watches(small) -> None:
    domain = small.domain(5)
    answers = [domain.ask(Op.WATCH, b"a\0%d\0" % i) for i in range(4)]
    assert answers == [OK] * 3 + [b"E2BIG"]
    domain.ask(Op.UNWATCH, b"a\0" + b"0\0")
    assert domain.ask(Op.WATCH, b"a\0" + b"t" * 100 + b"\0") == b"ENOSPC"
    assert domain.ask(Op.WATCH, b"a\0" + b"t" * 50 + b"\0") == OK


def test_transactions(small) -> None:
    domain = small.domain(5)
    first = domain.start()
    domain.start()
    assert domain.ask(Op.TRANSACTION_START) == b"ENOSPC"
    domain.ask(Op.TRANSACTION_END, b"F\0", first)
    assert domain.start() not in (0, first)


def test_nodes_touched_by_a_transaction(small) -> None:
    domain = small.domain(5)
    tx = domain.start()
    answers = [domain.ask(Op.READ, b"n%d\0" % i, tx) for i in range(13)]
    assert answers[0] == b"ENOENT" and answers[-1] == b"ENOSPC"
    assert domain.ask(Op.TRANSACTION_END, b"T\0", tx) == OK


def test_bytes_held_by_a_transaction(small) -> None:
    domain = small.domain(5)
    tx = domain.start()
    answers = [domain.ask(Op.READ, (b"%d" % i) + b"n" * 300 + b"\0", tx) for i in range(4)]
    assert answers == [b"ENOENT"] * 3 + [b"ENOSPC"]


def test_a_guest_that_does_not_read_replies_is_not_served(small) -> None:
    domain = small.domain(5)
    domain.reading = False
    for _ in range(SMALL.outstanding):
        assert domain.conn.accepts
        domain.send(Op.READ, b"a\0")
    assert not domain.conn.accepts
    domain.reading = True
    domain.output_ready()
    assert domain.conn.accepts
    assert domain.resumed == 1


def test_a_guest_that_does_not_read_events_loses_them(small) -> None:
    domain = small.domain(5)
    domain.ask(Op.WATCH, b"d\0t\0")
    domain.reading = False
    for i in range(50):
        small.dom0.ask(Op.WRITE, b"/local/domain/5/d/%d\0" % i)
    assert domain.conn.pending <= SMALL.event_bytes
    assert domain.conn.dropped_events > 0
    domain.reading = True
    domain.output_ready()
    assert domain.take_events()[1] == ("d/0", "t")


def test_equal_events_wait_only_once(small) -> None:
    domain = small.domain(5)
    domain.ask(Op.WATCH, b"d\0t\0")
    domain.take_events()
    domain.reading = False
    for _ in range(50):
        small.dom0.ask(Op.WRITE, b"/local/domain/5/d\0v")
    assert domain.conn.dropped_events == 0
    domain.reading = True
    domain.output_ready()
    assert domain.take_events() == [("d", "t")]


def flood(domain) -> None:
    """Change things until it is stopped."""
    for number in range(100):
        if not domain.conn.accepts:
            return
        domain.ask(Op.WRITE, b"n/%d\0" % number)
        domain.ask(Op.RM, b"n\0")
    pytest.fail("it is never stopped")


def test_a_guest_that_floods_a_tool_waits_until_the_tool_has_read(small, make_client) -> None:
    domain, tool = small.domain(5), make_client(small.server, 0)
    tool.ask(Op.WATCH, b"/local/domain/5\0t\0")
    tool.reading = False
    flood(domain)
    assert small.domain(6).conn.accepts
    assert tool.conn.pending < SMALL.tool_output_bytes
    tool.reading = True
    tool.output_ready()
    assert domain.conn.accepts
    assert domain.resumed == 1


def test_a_flooded_tool_that_leaves_frees_the_guest(small, make_client) -> None:
    domain, tool = small.domain(5), make_client(small.server, 0)
    tool.ask(Op.WATCH, b"/local/domain/5\0t\0")
    tool.reading = False
    flood(domain)
    small.server.disconnect(tool.conn)
    assert domain.conn.accepts


def test_a_tool_that_never_reads_is_found_stuck(small, make_client) -> None:
    tool = make_client(small.server, 0)
    tool.ask(Op.WATCH, b"/\0t\0")
    tool.reading = False
    assert not tool.conn.stuck
    for i in range(1500):
        small.dom0.ask(Op.WRITE, b"/n%d\0" % i)
    assert tool.conn.stuck
    assert not tool.conn.accepts


def test_writes_are_slowed_only_while_another_has_a_transaction(small) -> None:
    domain = small.domain(5)
    for _ in range(50):
        domain.ask(Op.WRITE, b"a\0v")
    assert small.server.throttle(domain.conn) == 0.0
    small.dom0.start()
    for _ in range(10):
        domain.ask(Op.WRITE, b"a\0v")
        domain.ask(Op.READ, b"a\0")
    assert small.server.throttle(domain.conn) == pytest.approx(0.5)
    assert small.server.throttle(small.dom0.conn) == 0.0
    small.clock.now += 0.5
    assert small.server.throttle(domain.conn) == 0.0


def test_its_own_transaction_slows_nobody(small) -> None:
    domain = small.domain(5)
    domain.start()
    for _ in range(50):
        domain.ask(Op.WRITE, b"a\0v")
    assert small.server.throttle(domain.conn) == 0.0
