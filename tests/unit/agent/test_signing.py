"""Signed instructions: what is taken, what is refused and why, and copies that do nothing."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import conf, wire
from agent.cli.main import main
from agent.errors import ConfigError, MessageError
from agent.rpc.client import Client
from agent.service import Service
from agent.signing import HEADER, REFUSED, Signer
from agent.wire import Raw
from hypervisor.toolstack.drivers.fake import FakeToolstack

KEY, OTHER = b"k" * 32, b"o" * 32
BODY = b'{"reeve": "1.0"}'


def raw(body: bytes, header: Any) -> Raw:
    return Raw(body, len(body), headers={} if header is None else {HEADER: header})


def made(key: bytes = KEY, body: bytes = BODY, when: float | None = None, monkeypatch: Any = None) -> str:
    if when is not None:
        monkeypatch.setattr(time, "time", lambda: when)
    return Signer([key], 300).headers(body)[HEADER]


def test_what_is_signed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    header = made(when=1000, monkeypatch=monkeypatch)
    assert header.startswith("v1 1000 ") and len(header) == len("v1 1000 ") + 64
    for now in (700, 1000, 1300):
        Signer([KEY], 300).check(raw(BODY, header), now)
    Signer([OTHER, KEY], 300).check(raw(BODY, header), 1000)  # while keys are changed


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda header: (BODY, None), "message.unsigned"),
        (lambda header: (BODY + b" ", header), "message.bad_signature"),
        (lambda header: (BODY, header.replace("v1 1000", "v1 1001")), "message.bad_signature"),
        (lambda header: (BODY, header.replace("v1", "v2")), "message.bad_signature"),
        (lambda header: (BODY, header[:-1]), "message.bad_signature"),
        (lambda header: (BODY, header + "\n"), "message.bad_signature"),
        (lambda header: (BODY, header.upper()), "message.bad_signature"),
        (lambda header: (BODY, ["v1"]), "message.bad_signature"),
        (lambda header: (BODY, "v1 " + "9" * 100000), "message.bad_signature"),
    ],
)
def test_anything_else_is_refused(change: Any, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = made(when=1000, monkeypatch=monkeypatch)
    with pytest.raises(MessageError) as caught:
        Signer([KEY], 300).check(raw(*change(header)), 1000)
    assert caught.value.code == code


@pytest.mark.parametrize("now", [699.0, 1301.0])
def test_an_old_copy_or_a_wrong_clock_is_refused(now: float, monkeypatch: pytest.MonkeyPatch) -> None:
    header = made(when=1000, monkeypatch=monkeypatch)
    with pytest.raises(MessageError) as caught:
        Signer([KEY], 300).check(raw(BODY, header), now)
    assert caught.value.code == "message.stale"
    with pytest.raises(MessageError) as caught:
        Signer([OTHER], 300).check(raw(BODY, header), now)
    assert caught.value.code == "message.bad_signature"


REPLY = wire.encode_reply(wire.Reply("id-1", "node1", "list", result={}), "reeve.reply.x").body


def test_a_reply_is_signed_with_its_correlation_id() -> None:
    header = Signer([KEY, OTHER], 300).reply_headers(REPLY, "id-1")[HEADER]
    Signer([OTHER, KEY], 1).check_reply(REPLY, "id-1", header)  # while keys are changed, and after any window
    for signer, body, correlation, given in (
        (Signer([OTHER], 300), REPLY, "id-1", header),
        (Signer([KEY], 300), REPLY, "id-2", header),
        (Signer([KEY], 300), REPLY, "", header),
        (Signer([KEY], 300), REPLY + b" ", "id-1", header),
        (Signer([KEY], 300), REPLY, "id-1", header[:-1]),
        (Signer([KEY], 300), REPLY, "id-1", header.replace("v1 ", "v1 1")),
        (Signer([KEY], 300), REPLY, "id-1", [header]),
        (Signer([KEY], 300), REPLY, "id-1", Signer([KEY], 300).headers(REPLY)[HEADER]),  # an instruction's
    ):
        with pytest.raises(MessageError) as caught:
            signer.check_reply(body, correlation, given)
        assert caught.value.code == "message.bad_signature"
    with pytest.raises(MessageError) as caught:
        Signer([KEY], 300).check_reply(REPLY, "id-1", None)
    assert caught.value.code == "message.unsigned"
    with pytest.raises(MessageError) as caught:
        Signer([KEY], 300).check(raw(REPLY, header), time.time())  # a reply's is no instruction's
    assert caught.value.code == "message.bad_signature"


@pytest.mark.parametrize("code", sorted(REFUSED))
def test_what_anyone_can_have_said_is_not_signed(code: str) -> None:
    error = MessageError("no", code=code).to_json()
    body = wire.encode_reply(wire.Reply("id-1", "node1", error=error), "reeve.reply.x").body
    assert Signer([KEY], 300).reply_headers(body, "id-1") == {}


def key_file(folder: Path, text: str = KEY.hex(), mode: int = 0o600) -> Path:
    path = folder / "signing.key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_key_file(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o620):
        with pytest.raises(ConfigError, match="others can read or change"):
            Signer.load(str(key_file(tmp_path, mode=mode)), 300)
    for text in ("", "zz" * 32, "ab" * 31, "abc" * 33, f"{KEY.hex()}\nshort"):
        with pytest.raises(ConfigError, match="openssl rand -hex 32"):
            Signer.load(str(key_file(tmp_path, text)), 300)
    with pytest.raises(ConfigError, match="cannot be read"):
        Signer.load(str(tmp_path / "gone"), 300)
    two = Signer.load(str(key_file(tmp_path, f"{KEY.hex()}\n{OTHER.hex()}\n")), 300)
    two.check(raw(BODY, made(OTHER)), time.time())


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    file = tmp_path / "agent.conf"
    file.write_text(
        f"[agent]\nhost = node1\nstate_dir = {tmp_path}/state\n[driver]\nname = fake\n"
        f"[signing]\nkey_file = {key_file(tmp_path)}\n"
    )
    running = Service(conf.load([str(file)]), FakeToolstack(None))
    running.start()
    yield running
    running.close()


def test_an_agent_with_a_key(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Unsigned: refused. Signed, by the command or another agent: taken; a copy of it: answered, not done again."""
    url = service.settings.broker_url
    with Client(url, "node1") as unsigned:
        reply = unsigned.call("list", timeout=20)
        assert reply.error is not None and reply.error["code"] == "message.unsigned"
    assert main(["instruct", "list", "--config-file", service.settings.files[0], "-f", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    peers = service.executor._host.peers
    assert peers.call("node1", "list", {}, ident=str(uuid.uuid4()), timeout=20, expire=True) == {"domains": []}

    told = str(uuid.uuid4())
    peers.tell("node1", "list", {}, ident=told)
    service.publisher.wake()
    end = time.monotonic() + 20
    while service.journal.outcome(told) is None:  # it went by the outbox, which signs when it sends
        assert time.monotonic() < end
        threading.Event().wait(0.01)

    signer = service.signer
    assert signer is not None
    with Client(url, "node1") as copier:
        body = wire.encode_instruction(wire.Instruction(str(uuid.uuid4()), "list", "node1", {}, copier.reply_to))
        ident = json.loads(body)["id"]
        headers = signer.headers(body)
        for _ in range(2):
            copier.send_raw(body, correlation_id=ident, headers=headers)
            assert copier.wait(ident, 20).ok
        with service.journal._read() as db:
            rows = db.execute("SELECT count(*) FROM instructions WHERE id = ?", (ident,)).fetchone()
        assert rows == (1,)


def test_only_signed_replies_are_taken(service: Service) -> None:
    """Someone who can write to the reply queue, and to the agent's, but has no key."""
    url, signer = service.settings.broker_url, service.signer
    assert signer is not None
    with Client(url, "node1", signer=signer) as client, Client(url, "node1") as forger:
        ident = str(uuid.uuid4())
        forged = wire.encode_reply(wire.Reply(ident, "node1", "list", result={"domains": ["forged"]}), client.reply_to)
        for headers in ({}, signer.headers(forged.body), signer.reply_headers(forged.body, str(uuid.uuid4()))):
            forger._producer.publish(
                forged.body,
                exchange="",
                routing_key=client.reply_to,
                content_type=forged.content_type,
                content_encoding="utf-8",
                correlation_id=ident,
                headers=headers,
            )
        # An unsigned instruction with another's id and reply queue: its refusal must not pass for the answer.
        body = wire.encode_instruction(wire.Instruction(ident, "list", "node1", {}, client.reply_to))
        forger.send_raw(body, correlation_id=ident)
        client.send("list", instruction_id=ident)
        reply = client.wait(ident, 20)
        assert reply.ok and reply.result == {"domains": []}
    lenient = Signer([KEY], 300, replies=False)
    with Client(url, "node1", signer=lenient) as client:
        client._on_reply(Unsigned(forged.body, {"correlation_id": ident}))
        assert client.wait(ident, 20).result == {"domains": ["forged"]}


class Unsigned:
    """A reply of an agent of a version that does not sign them."""

    def __init__(self, body: bytes, properties: dict[str, str]) -> None:
        self.body, self.properties = body, properties
        self.headers: dict[str, str] = {}

    def ack(self) -> None:
        pass


def test_an_id_is_remembered_for_as_long_as_a_copy_is_good(tmp_path: Path) -> None:
    file = tmp_path / "agent.conf"
    file.write_text(
        f"[signing]\nkey_file = {key_file(tmp_path)}\nwindow_seconds = 100\n[journal]\nkeep_seconds = 199\n"
    )
    with pytest.raises(ConfigError, match="half of"):
        conf.load([str(file)])
