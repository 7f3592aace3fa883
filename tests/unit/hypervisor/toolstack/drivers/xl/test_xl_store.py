"""The xenstore client against the project's own xenstored."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypervisor import errors
from hypervisor.toolstack.drivers.xl import store
from hypervisor.toolstack.drivers.xl.store import XenstoreClient

sys.path.insert(0, str(Path(__file__).parents[5] / "support"))
from xenstored_thread import Xenstored


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    made = Xenstored(tmp_path / "xs")
    yield made
    made.end()


@pytest.fixture
def client(xenstored: Xenstored) -> Iterator[XenstoreClient]:
    made = XenstoreClient(xenstored.path)
    yield made
    made.close()


class Heard:
    def __init__(self) -> None:
        self.paths: list[str] = []
        self.changed = threading.Condition()

    def __call__(self, path: str) -> None:
        with self.changed:
            self.paths.append(path)
            self.changed.notify_all()

    def wait(self, path: str, times: int = 1) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.paths.count(path) >= times, 10), self.paths


def test_nodes(client: XenstoreClient) -> None:
    assert client.read("/reeve/a") is None and client.names("/reeve") == []
    client.write("/reeve/a", "wörd")
    client.write("/reeve/b", "")
    client.set_perms("/reeve/a", ("n0",))
    assert client.read("/reeve/a") == "wörd" and client.read("/reeve/b") == ""
    assert client.names("/reeve") == ["a", "b"]
    client.remove("/reeve")
    client.remove("/reeve")
    assert client.read("/reeve/a") is None


def test_more_names_than_a_packet_holds(client: XenstoreClient) -> None:
    names = [f"a-rather-long-name-of-a-node-{number:04}" for number in range(200)]
    for name in names:
        client.write(f"/many/{name}", "")
    assert client.names("/many") == names


def test_what_is_refused(client: XenstoreClient) -> None:
    with pytest.raises(errors.HostFailure, match="refuses /a//b: EINVAL"):
        client.write("/a//b", "")
    with pytest.raises(errors.HostFailure, match="EINVAL"):
        client.claim("/a//b", "")
    with pytest.raises(errors.HostFailure):
        client.read("/a\0b")


def test_of_many_who_claim_a_node_one_wins(client: XenstoreClient, xenstored: Xenstored) -> None:
    clients = [XenstoreClient(xenstored.path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: pair[1].claim("/tool/it", str(pair[0])), enumerate(clients)))
    for other in clients:
        other.close()
    assert set(found) == {client.read("/tool/it")} == {client.claim("/tool/it", "late")}


def test_watches(client: XenstoreClient, xenstored: Xenstored) -> None:
    heard = Heard()
    stop = client.watch("@releaseDomain", heard)
    heard.wait("@releaseDomain")  # once when it is set
    xenstored.special("@releaseDomain", 5)
    heard.wait("@releaseDomain", 2)
    nodes = Heard()
    client.watch("/x", nodes)
    client.write("/x/y", "1")
    nodes.wait("/x/y")
    stop()
    xenstored.special("@releaseDomain", 5)
    client.write("/x/z", "1")
    nodes.wait("/x/z")
    assert heard.paths == ["@releaseDomain"] * 2


def test_a_listener_may_look_and_may_fail(client: XenstoreClient) -> None:
    heard = Heard()

    def fails(path: str) -> None:
        heard(str(client.read("/x")))
        raise RuntimeError("a listener's own mistake")

    client.watch("/x", fails)
    client.write("/x", "first")
    heard.wait("first")
    client.write("/x", "second")
    heard.wait("second")


def test_watches_survive_xenstored(
    client: XenstoreClient, xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "AGAIN", 0.02)
    heard = Heard()
    client.watch("/x", heard)
    heard.wait("/x")
    xenstored.stop()
    with pytest.raises(errors.HostUnavailable):
        client.read("/x")
    xenstored.start()
    heard.wait("/x", 2)
    client.write("/x", "again")
    heard.wait("/x", 3)


def test_no_xenstored_is_not_an_empty_one(tmp_path: Path) -> None:
    client = XenstoreClient(tmp_path / "nothing")
    for look in (client.read, client.names):
        with pytest.raises(errors.HostUnavailable, match="dom0"):
            look("/x")
    client.close()


def test_one_that_answers_garbage_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "xs"))
        listener.listen(8)

        def serve() -> None:
            for answer in (b"\xff" * 64, b"\xff" * 64, b""):
                conn, _ = listener.accept()
                kept.append(conn)
                conn.recv(100)
                conn.sendall(answer)

        kept: list[socket.socket] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = XenstoreClient(tmp_path / "xs")
        with pytest.raises(errors.HostUnavailable):
            client.read("/x")
        with pytest.raises(errors.OperationTimeout):
            client.read("/x")
        thread.join(10)
        client.close()
        for conn in kept:
            conn.close()
