from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hypervisor.host import channel as channels
from hypervisor.host.channel import BadMessage, ChannelClosed
from hypervisor.host.handles import Handles, answer, ring


def raw_pair() -> tuple[channels.Channel, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return channels.Channel(ours), theirs


def test_messages_and_descriptors_cross() -> None:
    one, two = channels.pair()
    reader, writer = os.pipe()
    one.send({"a": 1}, [writer])
    one.send({"b": 2})
    message, fds = two.receive()
    assert message == {"a": 1}
    os.write(fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    assert not os.get_inheritable(fds[0])
    assert two.receive() == ({"b": 2}, [])
    channels.close_all([reader, writer, *fds])


def test_the_end_is_seen() -> None:
    one, two = channels.pair()
    assert not one.is_closed()
    two.close()
    assert one.is_closed()
    with pytest.raises(ChannelClosed):
        one.receive()
    with pytest.raises(ChannelClosed):
        one.send({})


@pytest.mark.parametrize("data", [b"{", b"[]", b"1", b"\xff", b"[" * 50_000])
def test_nonsense_is_refused_and_its_descriptors_closed(data: bytes) -> None:
    one, theirs = raw_pair()
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        socket.send_fds(theirs, [data], [file.fileno()] * 3)
    with pytest.raises(BadMessage):
        one.receive()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_too_long_is_refused_on_both_sides() -> None:
    one, theirs = raw_pair()
    with pytest.raises(BadMessage, match="at most"):
        one.send({"x": "y" * channels.MAX_MESSAGE})
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.send(b"x" * (channels.MAX_MESSAGE + 1))
    with pytest.raises(BadMessage, match="longer than"):
        one.receive()


def test_paths_longer_than_sun_path(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "sock"
    path.parent.mkdir()
    with channels.listen(path, socket.SOCK_SEQPACKET) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        with channels.connect(path, socket.SOCK_SEQPACKET) as client:
            assert channels.peer(client)[0] == os.getpid()
        listener.accept()[0].close()
    with pytest.raises(OSError):
        channels.connect(path, socket.SOCK_SEQPACKET)
    channels.listen(path, socket.SOCK_SEQPACKET).close()  # a stale one is no obstacle


def test_only_the_same_user_and_root() -> None:
    assert channels.allowed(0, lambda: 1000)
    assert channels.allowed(1000, lambda: 1000)
    assert not channels.allowed(1001, lambda: 1000)
    assert not channels.allowed(1000, lambda: 0)


def test_handles_are_sealed_and_packed() -> None:
    handles = Handles.create("t", 4)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(handles.memory, 4096)
        page = handles.map_page(3)
        page[0] = 7
        page.close()
        assert os.pread(handles.memory, 1, 3 * 4096) == b"\x07"
        assert handles.resident_bytes() == 4096
        for frame in (-1, 4, 1 << 60):
            with pytest.raises(ValueError):
                handles.map_page(frame)
        assert Handles.unpack(handles.pack()) == handles
        with pytest.raises(ValueError):
            Handles.unpack(handles.pack()[1:])
    finally:
        handles.close()


def test_an_unsealed_memory_is_not_mapped() -> None:
    handles = Handles.create("t", 1)
    plain = os.memfd_create("plain")
    os.ftruncate(plain, 4096)
    try:
        with pytest.raises(ValueError):
            Handles(plain, handles.to_host, handles.to_guest).map_page(0)
    finally:
        os.close(plain)
        handles.close()


def test_a_doorbell_keeps_ringing_until_answered() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    assert not answer(bell)
    ring(bell)
    ring(bell)
    assert answer(bell)
    assert not answer(bell)
    os.eventfd_write(bell, (1 << 64) - 2)
    ring(bell)  # full: it rings already
    assert answer(bell)
    os.close(bell)
