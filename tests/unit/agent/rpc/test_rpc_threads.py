"""Consumer, publisher and client over a folder broker, in one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import wire
from agent.errors import AlreadyRunning, BrokerError, JournalCorrupt, JournalError, MessageError, ReplyTimeout
from agent.journal import Journal
from agent.rpc import connection as broker
from agent.rpc import consumer as consumer_module
from agent.rpc.client import Client
from agent.rpc.consumer import Consumer
from agent.rpc.publisher import Publisher


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "did not happen within 10 s"
        threading.Event().wait(0.005)


class Inbox:
    def __init__(self) -> None:
        self.raws: list[wire.Raw] = []
        self.errors: list[Exception] = []
        self.fatal: list[Exception] = []
        self.room = True

    def receive(self, *raws: wire.Raw) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.raws.extend(raws)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"filesystem://{tmp_path}/broker"


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def consumer(url: str, inbox: Inbox) -> Iterator[Consumer]:
    made = make(url, inbox)
    made.start()
    yield made
    made.stop()


def make(url: str, inbox: Inbox) -> Consumer:
    return Consumer(url, "node1", inbox.receive, lambda: inbox.room, inbox.fatal.append, prefetch=4, poll_seconds=0.005)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, "node1", poll_seconds=0.005) as made:
        yield made


def left(url: str) -> int:
    root = broker.folder(url)
    return len(list((root / "data").glob("*.msg"))) + len(list((root / "unacked").glob("*.msg")))


def test_messages_arrive_with_their_properties_and_are_acknowledged(
    url: str, inbox: Inbox, consumer: Consumer, client: Client
) -> None:
    ident = client.send("list")
    until(lambda: inbox.raws)
    (raw,) = inbox.raws
    assert (raw.reply_to, raw.correlation_id) == (client.reply_to, ident)
    assert wire.decode(raw, "node1").id == ident
    until(lambda: left(url) == 0)


def test_without_room_messages_wait_unacknowledged(url: str, inbox: Inbox, consumer: Consumer, client: Client) -> None:
    inbox.room = False
    for _ in range(6):
        client.send("list")
    root = broker.folder(url)
    until(lambda: len(list((root / "unacked").iterdir())) == 4)
    assert inbox.raws == []
    inbox.room = True
    until(lambda: len(inbox.raws) == 6 and left(url) == 0)


def test_a_journal_that_fails_keeps_the_message(
    url: str, inbox: Inbox, consumer: Consumer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "JOURNAL_PAUSE", 0.01)
    inbox.errors = [JournalError("disk full")] * 3
    client.send("list")
    until(lambda: inbox.raws and left(url) == 0)
    assert not inbox.fatal


@pytest.mark.parametrize("error", [JournalCorrupt("damaged"), ZeroDivisionError()])
def test_what_cannot_go_on_ends_the_agent_and_keeps_the_message(
    url: str, inbox: Inbox, consumer: Consumer, client: Client, error: Exception
) -> None:
    inbox.errors = [error]
    client.send("list")
    until(lambda: inbox.fatal)
    assert inbox.fatal == [error]
    until(lambda: left(url) == 1)


def test_a_stopped_consumer_leaves_everything_for_the_next(url: str, inbox: Inbox, client: Client) -> None:
    inbox.room = False
    first = make(url, inbox)
    first.start()
    client.send("list")
    until(lambda: list((broker.folder(url) / "unacked").iterdir()))
    first.stop()
    inbox.room = True
    second = make(url, inbox)
    second.start()
    until(lambda: len(inbox.raws) == 1)
    second.stop()


def test_a_second_consumer_of_a_folder_queue_is_refused(url: str, inbox: Inbox, consumer: Consumer) -> None:
    with pytest.raises(AlreadyRunning, match="another agent takes instructions for host 'node1'"):
        make(url, inbox).start()


def test_old_replies_are_swept(url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "STALE_SECONDS", -1.0)
    (broker.folder(url) / "data" / f"5_x.{broker.REPLY_PREFIX}abc.msg").write_bytes(b"{}")
    consumer = make(url, inbox)
    consumer.start()
    until(lambda: left(url) == 0)
    consumer.stop()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.sqlite")


@pytest.fixture
def publisher(url: str, journal: Journal) -> Iterator[Publisher]:
    made = Publisher(url, journal)
    made.start()
    yield made
    made.stop()


def test_replies_leave_the_outbox_when_published(journal: Journal, publisher: Publisher, client: Client) -> None:
    for number in range(3):
        journal.enqueue(wire.encode_reply(wire.Reply(f"id-{number}", "node1", result={"n": number}), client.reply_to))
    publisher.wake()
    assert [client.wait(f"id-{number}", 10).result for number in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    until(lambda: journal.counts()["outbox"] == 0)
    assert publisher.flush(10)


def test_reports_reach_those_who_listen(publisher: Publisher, client: Client) -> None:
    seen: list[wire.Report] = []
    client.listen(seen.append, "capacity.*")
    publisher.report(wire.Report("lifecycle", "node1", 1.0, 1, {}))
    publisher.report(wire.Report("capacity", "node1", 1.0, 2, {"cpus": 4}))
    until(lambda: client.drain(0.05) or seen)
    assert [report.seq for report in seen] == [2] and seen[0].data == {"cpus": 4}


def test_a_failing_folder_is_tried_again(tmp_path: Path, journal: Journal, url: str) -> None:
    with Client(url, "node1", poll_seconds=0.005) as client:
        data = broker.folder(url) / "data"
        aside = data.rename(tmp_path / "aside")
        data.write_text("in the way")
        journal.enqueue(wire.encode_reply(wire.Reply("id-1", "node1"), client.reply_to))
        publisher = Publisher(url, journal, longest_pause=0.1)
        publisher.start()
        until(lambda: not publisher.connected.is_set())
        data.unlink()
        aside.rename(data)
        assert client.wait("id-1", 10).ok
        publisher.stop()


def test_client_errors_are_clear(url: str, client: Client) -> None:
    with pytest.raises(ReplyTimeout, match=r"no reply from host 'node1' within 0.05 s: is reeve-agent running"):
        client.call("list", timeout=0.05)
    with pytest.raises(MessageError) as caught:
        client.send("create", {"cmdline": "x" * (2 << 20)})
    assert caught.value.code == "message.too_large"
    with pytest.raises(MessageError):
        Client(url, "../node")
    with pytest.raises(BrokerError, match=r"amqp://u:\*\*\*@127.0.0.1:1/ cannot be used"):
        Client("amqp://u:secret@127.0.0.1:1/", "node1")


def test_client_removes_its_queues(url: str) -> None:
    client = Client(url, "node1")
    client.listen(lambda report: None)
    root = broker.folder(url)
    (root / "data" / f"5_x.{client.reply_to}.msg").write_bytes(b"{}")
    client.close()
    assert left(url) == 0
    assert json.loads((root / "control" / "reeve.reports.exchange").read_text()) == []


def test_a_reply_that_is_no_reply_is_dropped(client: Client, url: str, publisher: Publisher, journal: Journal) -> None:
    journal.enqueue(wire.Outgoing("", client.reply_to, b"nonsense"))
    journal.enqueue(wire.encode_reply(wire.Reply("id-1", "node1"), client.reply_to))
    publisher.wake()
    assert client.wait("id-1", 10).ok
