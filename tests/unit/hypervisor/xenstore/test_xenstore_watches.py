"""Watches: who hears what, and in which words."""

from __future__ import annotations

from hypervisor.xenstore.wire import Op

OK = b"OK\0"


def test_a_watch_fires_once_at_first_and_after_its_reply(world) -> None:
    domain = world.domain(5)
    domain.reading = False
    domain.send(Op.WATCH, b"not/there\0tok\0")
    stream = domain.conn.peek_output(4096)
    assert stream.index(OK) < stream.index(b"not/there\0tok\0")


def test_events_name_the_changed_path_below_the_watch(world) -> None:
    tool = world.dom0
    tool.ask(Op.WATCH, b"/a\0t\0")
    assert tool.take_events() == [("/a", "t")]
    tool.ask(Op.WRITE, b"/a/b/c\0v")
    tool.ask(Op.WRITE, b"/a/b/c\0v")
    tool.ask(Op.MKDIR, b"/a/b\0")  # is there: nothing changes
    tool.ask(Op.SET_PERMS, b"/a/b\0n0\0r5\0")
    tool.ask(Op.WRITE, b"/ab\0v")
    assert tool.take_events() == [("/a/b/c", "t"), ("/a/b/c", "t"), ("/a/b", "t")]


def test_relative_watches_speak_relative_paths(world) -> None:
    domain = world.domain(5)
    domain.ask(Op.WATCH, b"dir\0t\0")
    domain.ask(Op.WRITE, b"/local/domain/5/dir/x\0v")
    domain.ask(Op.WATCH, b"/local/domain/5/dir\0u\0")
    assert domain.take_events() == [("dir", "t"), ("dir/x", "t"), ("/local/domain/5/dir", "u")]


def test_removal_tells_ancestors_of_the_root_and_each_watch_below_of_its_own_path(world) -> None:
    tool = world.dom0
    tool.ask(Op.WRITE, b"/a/b/c/d\0v")
    for path, token in ((b"/a", b"above"), (b"/a/b", b"root"), (b"/a/b/c/d", b"below"), (b"/a/b/x", b"absent")):
        tool.ask(Op.WATCH, path + b"\0" + token + b"\0")
    tool.take_events()
    tool.ask(Op.RM, b"/a/b\0")
    assert sorted(tool.take_events()) == [("/a/b", "above"), ("/a/b", "root"), ("/a/b/c/d", "below")]


def test_unwatched_and_reset_watches_are_silent(world) -> None:
    domain = world.domain(5)
    domain.ask(Op.WATCH, b"a\0t\0")
    domain.ask(Op.WATCH, b"a\0u\0")
    domain.ask(Op.UNWATCH, b"a\0t\0")
    domain.take_events()
    domain.ask(Op.WRITE, b"a\0v")
    assert domain.take_events() == [("a", "u")]
    domain.ask(Op.RESET_WATCHES)
    domain.ask(Op.WRITE, b"a\0v")
    assert domain.take_events() == []


def test_depth_limits_the_levels_below(world) -> None:
    tool = world.dom0
    for depth in (0, 1, 2):
        tool.ask(Op.WATCH, b"/a\0depth-%d\0%d\0" % (depth, depth))
    tool.take_events()
    for path in (b"/a", b"/a/b", b"/a/b/c", b"/a/b/c/d"):
        tool.ask(Op.WRITE, path + b"\0v")
    assert sorted(tool.take_events()) == [
        ("/a", "depth-0"),
        ("/a", "depth-1"),
        ("/a", "depth-2"),
        ("/a/b", "depth-1"),
        ("/a/b", "depth-2"),
        ("/a/b/c", "depth-2"),
    ]


def test_a_domain_hears_only_of_what_it_may_read(world) -> None:
    domain = world.domain(5)
    domain.ask(Op.WATCH, b"/\0t\0")
    domain.take_events()
    world.dom0.ask(Op.WRITE, b"/secret\0v")
    world.dom0.ask(Op.RM, b"/secret\0")
    assert domain.take_events() == []
    world.dom0.ask(Op.WRITE, b"/secret\0v")
    world.dom0.ask(Op.SET_PERMS, b"/secret\0n0\0r5\0")
    world.dom0.ask(Op.WRITE, b"/secret\0w")
    world.dom0.ask(Op.SET_PERMS, b"/secret\0n0\0")  # losing the right is told, too
    world.dom0.ask(Op.WRITE, b"/secret\0x")
    assert domain.take_events() == [("/secret", "t")] * 3


def test_deletion_is_told_to_who_could_read_it(world) -> None:
    domain = world.domain(5)
    world.dom0.ask(Op.WRITE, b"/a/b\0v")
    world.dom0.ask(Op.SET_PERMS, b"/a/b\0n0\0r5\0")
    domain.ask(Op.WATCH, b"/a/b\0t\0")
    domain.take_events()
    world.dom0.ask(Op.RM, b"/a\0")
    assert domain.take_events() == [("/a/b", "t")]


def test_transactions_tell_at_commit_and_once_per_path(world) -> None:
    domain, tool = world.domain(5), world.dom0
    tool.ask(Op.WATCH, b"/local/domain/5\0t\0")
    tool.take_events()
    for word, expected in ((b"F\0", []), (b"T\0", [("/local/domain/5/a/b", "t"), ("/local/domain/5/a", "t")])):
        tx = domain.start()
        domain.ask(Op.WRITE, b"a\0" + b"v", tx)
        domain.ask(Op.WRITE, b"a/b\0" + b"v", tx)
        domain.ask(Op.WRITE, b"a\0" + b"w", tx)
        assert tool.take_events() == []
        domain.ask(Op.TRANSACTION_END, word, tx)
        assert tool.take_events() == expected


def test_special_watches_go_to_the_privileged_and_the_permitted(world, make_client) -> None:
    tool = world.dom0
    five, six = world.domain(5), world.domain(6)
    tool.ask(Op.SET_PERMS, b"@releaseDomain\0n0\0r5\0")
    for client in (tool, five, six):
        client.ask(Op.WATCH, b"@introduceDomain\0in\0")
        client.ask(Op.WATCH, b"@releaseDomain\0out\0")
        client.take_events()
    tool.ask(Op.WATCH, b"@releaseDomain\0depth\0001\0")
    tool.ask(Op.WATCH, b"@releaseDomain/7\0seven\0")
    tool.ask(Op.WATCH, b"@releaseDomain/8\0eight\0")
    tool.take_events()

    make_client(world.server, 7)
    assert tool.take_events() == [("@introduceDomain", "in")]
    tool.ask(Op.RELEASE, b"7\0")
    assert sorted(tool.take_events()) == [
        ("@releaseDomain", "out"),
        ("@releaseDomain/7", "depth"),
        ("@releaseDomain/7", "seven"),
    ]
    assert five.take_events() == [("@releaseDomain", "out")]
    assert six.take_events() == []


def test_a_shutdown_is_told_once_until_resume(world) -> None:
    world.domain(5)
    world.dom0.ask(Op.WATCH, b"@releaseDomain\0out\0")
    world.dom0.take_events()
    world.server.domain_shutdown(5)
    world.server.domain_shutdown(5)
    assert world.dom0.take_events() == [("@releaseDomain", "out")]
    world.dom0.ask(Op.RESUME, b"5\0")
    world.server.domain_shutdown(5)
    assert world.dom0.take_events() == [("@releaseDomain", "out")]


def test_a_released_domain_leaves_nothing(world) -> None:
    five, six, tool = world.domain(5), world.domain(6), world.dom0
    tool.ask(Op.MKDIR, b"/shared\0")
    tool.ask(Op.SET_PERMS, b"/shared\0b0\0")
    five.ask(Op.WRITE, b"/shared/five/deep\0v")
    six.ask(Op.WRITE, b"/shared/six\0v")
    six.ask(Op.SET_PERMS, b"/shared/six\0n6\0r5\0")
    tool.ask(Op.SET_PERMS, b"@releaseDomain\0n0\0r5\0")
    five.ask(Op.WATCH, b"/shared\0t\0")
    five.start()
    tool.ask(Op.WATCH, b"/shared\0t\0")
    tool.take_events()

    world.server.release(5)
    assert tool.ask(Op.DIRECTORY, b"/shared\0") == b"six\0"
    assert tool.ask(Op.GET_PERMS, b"/shared/six\0") == b"n6\0"
    assert tool.ask(Op.GET_PERMS, b"@releaseDomain\0") == b"n0\0"
    assert ("/shared/five", "t") in tool.take_events()
    assert world.server.store.nodes_of(5) == 0
    assert world.server.save()["domains"].keys() == {"6"}


def test_a_tool_that_leaves_takes_its_watches_along(world, make_client) -> None:
    other = make_client(world.server, 0)
    other.ask(Op.WATCH, b"/a\0t\0")
    other.start()
    world.server.disconnect(other.conn)
    other.take_events()
    world.dom0.ask(Op.WRITE, b"/a\0v")
    assert other.take_events() == []
