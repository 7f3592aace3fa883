"""The folder broker: nothing is lost by a kill, nothing half-written is read, no name leaves the folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from kombu.exceptions import ChannelError

from agent import wire
from agent.errors import ConfigError
from agent.rpc import connection as broker
from agent.rpc import filesystem


class Taker:
    def __init__(self, url: str, queue: str = "reeve.node1", prefetch: int = 10) -> None:
        self.connection = broker.connect(url, poll_seconds=0.005)
        channel = self.connection.channel()
        self.messages: list[Any] = []
        bound = kombu.Queue(queue, exchange=kombu.Exchange(""), routing_key=queue)(channel)
        bound.declare()
        kombu.Consumer(channel, [bound], on_message=self.messages.append, prefetch_count=prefetch).consume()

    def take(self, count: int) -> list[Any]:
        while len(self.messages) < count:
            self.connection.drain_events(timeout=5)
        return self.messages

    def nothing(self) -> bool:
        try:
            self.connection.drain_events(timeout=0.02)
        except TimeoutError:
            return True
        return False


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"filesystem://{tmp_path}/broker"


@pytest.fixture
def root(url: str) -> Path:
    return broker.folder(url)


@pytest.fixture
def taker(url: str) -> Iterator[Taker]:
    made = Taker(url)
    yield made
    made.connection.release()


def send(url: str, body: bytes, queue: str = "reeve.node1", exchange: Any = "", **properties: Any) -> None:
    with broker.connect(url) as connection:
        declare = [exchange] if exchange else []
        kombu.Producer(connection.channel()).publish(
            body,
            exchange=exchange,
            routing_key=queue,
            content_type="application/json",
            content_encoding="utf-8",
            declare=declare,
            **properties,
        )


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def queues(root: Path) -> list[str]:
    return sorted(name.partition(".")[2].removesuffix(".msg") for name in files(root / "data"))


def test_a_message_is_kept_until_it_is_acknowledged(url: str, root: Path, taker: Taker) -> None:
    send(url, b"one", reply_to="r", correlation_id="c")
    (message,) = taker.take(1)
    assert message.body == b"one" and message.properties["reply_to"] == "r"
    assert files(root / "data") == [] and len(files(root / "unacked")) == 1
    message.ack()
    assert files(root / "unacked") == []


def test_what_a_killed_consumer_had_taken_is_put_back_in_order(url: str, root: Path) -> None:
    for number in range(5):
        send(url, b"%d" % number)
    send(url, b"x", "reeve.node2")
    killed = Taker(url)
    killed.take(3)
    Taker(url, "reeve.node2").take(1)
    # The process is gone without closing anything; its successor starts.
    assert filesystem.recover(root, "reeve.node1") == 3
    assert len(files(root / "unacked")) == 1, "the other queue is not ours"
    successor = Taker(url)
    assert [message.body for message in successor.take(5)] == [b"0", b"1", b"2", b"3", b"4"]


def test_closing_puts_back_what_was_not_acknowledged(url: str, root: Path) -> None:
    send(url, b"one")
    taker = Taker(url)
    taker.take(1)
    taker.connection.release()
    assert len(files(root / "data")) == 1 and files(root / "unacked") == []


def test_reject_drops_or_requeues(url: str, root: Path, taker: Taker) -> None:
    send(url, b"one")
    taker.take(1)[0].reject(requeue=True)
    assert len(files(root / "data")) == 1
    taker.take(2)[1].reject()
    assert files(root / "data") == files(root / "unacked") == []


def test_prefetch_bounds_what_is_taken(url: str, root: Path) -> None:
    for _ in range(5):
        send(url, b"x")
    taker = Taker(url, prefetch=2)
    taker.take(2)
    assert taker.nothing() and len(files(root / "unacked")) == 2
    taker.messages[0].ack()
    taker.take(3)
    assert len(files(root / "data")) == 2


def test_order_is_that_of_sending(url: str, taker: Taker) -> None:
    bodies = [b"%d" % number for number in range(20)]
    for body in bodies:
        send(url, body)
    taker_bodies = [message.body for message in taker.take(10)]
    for message in taker.messages:
        message.ack()
    assert taker_bodies + [message.body for message in taker.take(20)[10:]] == bodies


def test_messages_are_private_and_whole(url: str, root: Path) -> None:
    send(url, b"secret")
    (name,) = files(root / "data")
    assert (root / "data" / name).stat().st_mode & 0o777 == 0o600
    assert root.joinpath("data").stat().st_mode & 0o777 == 0o700
    # A half-written file has a name no reader looks for.
    (root / "data" / ".5_x.reeve.node1.msg.new").write_bytes(b"{")
    taker = Taker(url)
    assert taker.take(1)[0].body == b"secret" and taker.nothing()


@pytest.mark.parametrize("queue", ["../escape", "a/b", ".hidden", "", "x" * 300, "a\nb"])
def test_names_that_are_no_file_names_are_refused(url: str, root: Path, queue: str) -> None:
    with pytest.raises((ChannelError, ValueError)):
        send(url, b"x", queue)
    assert files(root / "data") == [] and files(root.parent) == ["broker"]


def test_a_stock_client_can_send_and_receive(url: str, root: Path, taker: Taker) -> None:
    options = {
        "data_folder_in": str(root / "data"),
        "data_folder_out": str(root / "data"),
        "control_folder": str(root / "control"),
    }
    with kombu.Connection("filesystem://", transport_options=options) as stock:
        kombu.Producer(stock.channel()).publish({"hello": 1}, exchange="", routing_key="reeve.node1")
        assert json.loads(taker.take(1)[0].body) == {"hello": 1}
        send(url, b'{"answer": 2}', "stock.queue")
        queue = stock.SimpleQueue(kombu.Queue("stock.queue", exchange=kombu.Exchange(""), routing_key="stock.queue"))
        message = queue.get(timeout=5)
        assert message.payload == {"answer": 2}
        message.ack()


def test_a_file_still_being_written_is_left_alone(
    url: str, root: Path, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "data" / "5_x.reeve.node1.msg"
    path.write_bytes(b'{"body": "aGVs')
    assert taker.nothing() and path.exists()
    monkeypatch.setattr(filesystem, "SETTLE_SECONDS", 0.0)
    (message,) = taker.take(1)
    assert message.body == b'{"body": "aGVs' and message.headers == {"x-reeve-size": 14}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"[]",
        b"{}",
        b'{"body": 5, "properties": {"delivery_info": {}}}',
        b'{"body": "!!", "properties": {"delivery_info": {}, "body_encoding": "base64"}}',
        b'{"body": "", "properties": {}}',
        b'{"body": "", "properties": {"delivery_info": []}}',
        b"[" * 50000,
        b"\xff\xff",
    ],
)
def test_a_damaged_file_is_delivered_for_quarantine(
    url: str, root: Path, taker: Taker, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "SETTLE_SECONDS", 0.0)
    (root / "data" / "5_x.reeve.node1.msg").write_bytes(data)
    send(url, b"next")
    first, second = taker.take(2)
    assert (first.body or b"") == data and second.body == b"next"
    first.ack()
    second.ack()
    assert files(root / "data") == files(root / "unacked") == []


def test_a_file_that_cannot_be_read_does_not_stop_the_queue(url: str, root: Path, taker: Taker) -> None:
    name = f"1_x.{wire.queue_name('node1')}.msg"
    (root / "data" / name).symlink_to(name)  # a loop: not even root can read it
    send(url, b"{}")
    unreadable, good = taker.take(2)
    assert (unreadable.body, good.body) == (b"", b"{}")
    unreadable.ack()
    good.ack()
    assert files(root / "data") == files(root / "unacked") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can send as somebody else")
def test_what_root_sends_belongs_to_the_folder_s_owner(url: str, root: Path) -> None:
    for folder in (root / "data", root / "control"):
        os.chown(folder, 65534, 65534)
    listener = Taker(url, "reeve.reply.x")
    send(url, b"{}")
    for folder in (root / "data", root / "control"):
        assert {path.stat().st_uid for path in folder.iterdir()} <= {65534}, folder
    assert len(files(root / "data")) == 1
    listener.connection.release()


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    (tmp_path / "x.lock").symlink_to(precious)
    with pytest.raises(OSError):
        filesystem._edit_table(tmp_path / "x.exchange", lambda table: [*table, "row"])
    (tmp_path / "y.new").symlink_to(precious)
    filesystem._edit_table(tmp_path / "y.exchange", lambda table: [*table, "row"])
    assert precious.read_text() == "data" and json.loads((tmp_path / "y.exchange").read_text()) == ["row"]


def test_a_huge_file_is_not_read(url: str, root: Path, taker: Taker) -> None:
    send(url, b"x" * (3 << 20), reply_to="r", correlation_id="c")
    (message,) = taker.take(1)
    assert len(message.body) == 4096 and message.headers["x-reeve-size"] > 3 << 20
    assert (message.properties["reply_to"], message.properties["correlation_id"]) == ("r", "c")
    sparse = root / "data" / "6_x.reeve.node1.msg"
    with open(sparse, "wb") as file:
        file.truncate(100 << 20)
    started = time.monotonic()
    assert taker.take(2)[1].headers["x-reeve-size"] == 100 << 20
    assert time.monotonic() - started < 2


def test_compression_is_not_undone_for_a_stranger(url: str, taker: Taker) -> None:
    with broker.connect(url) as connection:
        kombu.Producer(connection.channel()).publish(
            b"\0" * (1 << 20), exchange="", routing_key="reeve.node1", compression="zlib"
        )
    (message,) = taker.take(1)
    assert len(message.body) < 10000 and message.headers["compression"]


def test_two_files_with_one_delivery_tag_are_two_messages(url: str, root: Path, taker: Taker) -> None:
    send(url, b"twin")
    (name,) = files(root / "data")
    (root / "data" / f"9{name}").write_bytes((root / "data" / name).read_bytes())
    first, second = taker.take(2)
    first.ack()
    assert len(files(root / "unacked")) == 1
    second.ack()
    assert files(root / "unacked") == []


def test_topics_reach_every_bound_queue_and_no_other(url: str, root: Path) -> None:
    with broker.connect(url) as connection:
        channel = connection.channel()
        for name, pattern in (("l.all", "#"), ("l.capacity", "capacity.*"), ("l.other", "other.#")):
            broker.report_queue(name, pattern)(channel).declare()
        send(url, b"c", "capacity.node1", broker.REPORTS)
        assert queues(root) == ["l.all", "l.capacity"]
        broker.report_queue("l.all", "#")(channel).delete()
        send(url, b"c", "capacity.node1", broker.REPORTS)
    assert queues(root) == ["l.capacity", "l.capacity"]
    assert json.loads((root / "control" / "reeve.reports.exchange").read_text())


def test_reports_nobody_fetches_are_bounded(url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MAX_TOPIC_BACKLOG", 3)
    with broker.connect(url) as connection:
        broker.report_queue("l.all", "#")(connection.channel()).declare()
        for _ in range(6):
            send(url, b"c", "capacity.node1", broker.REPORTS)
    assert len(files(root / "data")) == 3


def test_sweep_removes_only_what_was_seen_for_long_and_is_nobody_s(url: str, root: Path) -> None:
    seen: dict[str, float] = {}
    for queue in (f"{broker.REPLY_PREFIX}a", "reeve.node1"):
        send(url, b"x", queue)
    for name in files(root / "data"):
        os.utime(root / "data" / name, (0, 0))  # the clock was set: nothing can be told from that
    assert filesystem.sweep(root, broker.REPLY_PREFIX, 3600, 0.0, seen) == 0
    send(url, b"x", f"{broker.REPLY_PREFIX}b")
    assert filesystem.sweep(root, broker.REPLY_PREFIX, 3600, 2000.0, seen) == 0
    assert filesystem.sweep(root, broker.REPLY_PREFIX, 3600, 3601.0, seen) == 1
    assert queues(root) == ["reeve.node1", f"{broker.REPLY_PREFIX}b"]
    assert len(seen) == 1, "what is gone is forgotten"


def test_a_listener_that_is_gone_is_unbound(url: str, root: Path) -> None:
    with broker.connect(url) as connection:
        for name in ("gone", "here"):
            broker.report_queue(f"{broker.REPORT_PREFIX}{name}", "#")(connection.channel()).declare()
    send(url, b"c", "capacity.node1", broker.REPORTS)
    seen = dict.fromkeys((name for name in files(root / "data") if "gone" in name), 0.0)
    assert filesystem.sweep(root, broker.REPORT_PREFIX, 3600, 3601.0, seen) == 1
    send(url, b"c", "capacity.node1", broker.REPORTS)
    assert queues(root) == [f"{broker.REPORT_PREFIX}here"] * 2


@pytest.mark.parametrize("bad", ["http://x/", "amq:", "", "filesystem://host/x", "filesystem://", "filesystem:///"])
def test_bad_urls_are_said(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        broker.connect(bad)
    assert "\n" not in caught.value.message


def test_passwords_are_not_shown() -> None:
    assert broker.redact("amqp://me:secret@host:5/v") == "amqp://me:***@host:5/v"
    assert broker.redact("amqp://host/") == "amqp://host/"


def test_queue_names_of_wire_and_broker_agree() -> None:
    for name in ("a", "reeve.node1", "x" * 200, "-", "_a.b"):
        assert filesystem.QUEUE_RE.fullmatch(name) and wire.reply_address(name) == name
