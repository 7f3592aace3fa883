"""TLS to the broker: who is refused, before a password is sent, and in which words."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))

from authority import Authority
from tls_broker import TlsBroker

from agent import conf
from agent.cli.main import main
from agent.errors import BrokerError, ConfigError
from agent.journal import Journal
from agent.rpc import connection as broker
from agent.rpc.client import Client
from agent.rpc.consumer import Consumer
from agent.rpc.publisher import Publisher
from agent.rpc.tls import BrokerTls
from agent.service import Service
from hypervisor.toolstack.drivers.fake import FakeToolstack

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed: it makes certificates"
)
HEADER = b"AMQP\x00\x00\x09\x01"


class Place:
    """An authority that is trusted and one that is not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours, self.other = Authority(folder), Authority(folder, "other")
        self.right = self.ours.host("right")

    def broker(self, files: Any = None, **more: Any) -> TlsBroker:
        files = files or self.right
        return TlsBroker(files.certificate, files.key, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("tls"))


def refusal(url: str, tls: BrokerTls) -> str:
    with pytest.raises(BrokerError) as caught:
        Client(url, "node1", tls=tls)
    assert "\n" not in caught.value.message and "secret" not in caught.value.message
    return caught.value.message


def speak(url: str, tls: BrokerTls) -> None:
    """Once, to something that ends the connection when it has heard AMQP's header: a password follows only later."""
    with pytest.raises(OSError):
        broker.connect(url, tls=tls).transport.establish_connection()


def test_the_right_broker_is_spoken_to(place: Place) -> None:
    with place.broker() as there:
        speak(there.url, BrokerTls(ca_file=str(place.ours.ca)))
    assert there.received == [HEADER]


def test_by_a_name_that_is_given_or_in_the_url(place: Place) -> None:
    files = place.ours.host("named", san="DNS:localhost,DNS:broker.example")
    trusted = BrokerTls(ca_file=str(place.ours.ca))
    with place.broker(files) as there:
        speak(there.url.replace("127.0.0.1", "localhost"), trusted)
        speak(there.url, BrokerTls(ca_file=str(place.ours.ca), server_name="broker.example"))
        refusal(there.url, trusted)
    assert there.received == [HEADER, HEADER, b""]


@pytest.mark.parametrize(
    ("shown", "trusted", "name", "said"),
    [
        ("right", "other", "", ("unable to get local issuer|self-signed", "set [broker] tls_ca_file")),
        ("right", "", "", ("unable to get local issuer|self-signed", "set [broker] tls_ca_file")),
        ("right", "ours", "broker.example", ("not valid for 'broker.example'", "tls_server_name")),
        ("elsewhere", "ours", "", ("not valid for '127.0.0.1'", "tls_server_name")),
        ("expired", "ours", "", ("certificate has expired", "a new one")),
    ],
)
def test_a_wrong_one_is_refused(place: Place, shown: str, trusted: str, name: str, said: tuple[str, str]) -> None:
    files = {
        "right": place.right,
        "elsewhere": place.ours.host("elsewhere", san="DNS:elsewhere"),
        "expired": place.ours.host("expired", days=-1),
    }[shown]
    ca = {"ours": str(place.ours.ca), "other": str(place.other.ca), "": ""}[trusted]
    with place.broker(files) as there:
        message = refusal(there.url, BrokerTls(ca_file=ca, server_name=name))
    assert "the broker's certificate is refused: " in message
    assert any(word in message for word in said[0].split("|")) and said[1] in message, message
    assert there.received == [b""]


def test_only_an_option_of_its_own_turns_it_off(place: Place) -> None:
    with place.broker(place.other.host("nobody", san="DNS:nobody")) as there:
        speak(there.url, BrokerTls(insecure=True))
        with pytest.raises(ConfigError, match="belong into the options tls_"):
            broker.connect(there.url + "?ssl_cert_reqs=none")
    assert there.received == [HEADER]


def test_a_broker_that_asks_for_a_certificate(place: Place) -> None:
    ours, foreign = place.ours.host("client"), place.other.host("stranger")
    with place.broker(authority=str(place.ours.ca)) as there:
        given = {"ca_file": str(place.ours.ca)}
        speak(there.url, BrokerTls(**given, certificate_file=ours.certificate, key_file=ours.key))
        for tls in (
            BrokerTls(**given),
            BrokerTls(**given, certificate_file=foreign.certificate, key_file=foreign.key),
        ):
            assert "refuses the handshake" in refusal(there.url, tls)
    assert there.received == [HEADER, b"", b""]


def test_a_port_without_tls_is_named(place: Place) -> None:
    with place.broker(plain=True) as there:
        assert "no TLS is spoken at that port" in refusal(there.url, BrokerTls())


def test_consumer_and_publisher_say_it_too(place: Place, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.WARNING)
    journal = Journal(tmp_path / "journal.sqlite")
    tls = BrokerTls(ca_file=str(place.other.ca))
    with place.broker() as there:
        consumer = Consumer(there.url, "node1", print, lambda: 1, print, tls=tls)
        publisher = Publisher(there.url, journal, tls=tls)
        consumer.start()
        publisher.start()
        for _ in range(200):
            heard = [item for item in caplog.records if "certificate is refused" in item.getMessage()]
            if {item.name.rpartition(".")[2] for item in heard} == {"consumer", "publisher"}:
                break
            threading.Event().wait(0.05)
        consumer.stop()
        publisher.stop()
    journal.close()
    assert {item.name for item in heard} == {"agent.rpc.consumer", "agent.rpc.publisher"}, caplog.text
    assert not any("secret" in item.getMessage() for item in caplog.records)
    assert set(there.received) == {b""}


def test_files_that_are_of_no_use_are_named(place: Place, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", place.right.key, "-aes128", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    (tmp_path / "empty").touch()
    cases = {
        "tls_ca_file: .*gone cannot be read": BrokerTls(ca_file=str(tmp_path / "gone")),
        "tls_ca_file: .*empty cannot be used": BrokerTls(ca_file=str(tmp_path / "empty")),
        "tls_certificate_file: .*gone cannot be read": BrokerTls(certificate_file=str(tmp_path / "gone")),
        "belong together": BrokerTls(certificate_file=place.right.certificate, key_file=place.ours.host("another").key),
        "passphrase": BrokerTls(certificate_file=place.right.certificate, key_file=str(locked)),
        "tls_key_file is of no use alone": BrokerTls(key_file=place.right.key),
        "contradicts": BrokerTls(ca_file=str(place.ours.ca), insecure=True),
    }
    for said, tls in cases.items():
        with pytest.raises(ConfigError, match=said):
            broker.connect("amqps://h/", tls=tls)
    with pytest.raises(ConfigError, match="speaks no TLS"):
        broker.connect("amqp://u:secret@h/", tls=BrokerTls(ca_file=str(place.ours.ca)))


def test_what_is_not_checked_is_said_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the agent, by each command that asks the broker, and by those that look at the configuration."""
    file = tmp_path / "agent.conf"
    file.write_text(f"[agent]\nstate_dir = {tmp_path}\n[broker]\nurl = amqps://127.0.0.1:1/\ntls_insecure = true\n")
    assert main(["instruct", "list", "--config-file", str(file)]) == 1
    assert "WHOEVER ANSWERS" in capsys.readouterr().err
    main(["config", "check", "--config-file", str(file), "-f", "json"])
    assert any(row["where"] == "[broker] tls_insecure" for row in json.loads(capsys.readouterr().out))
    service = Service(conf.load([str(file)]), FakeToolstack(None))
    service.start()
    service.close()
    assert any(item.name == "agent.service" and "WHOEVER ANSWERS" in item.getMessage() for item in caplog.records)


def test_the_options(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "agent.conf"
    file.write_text(
        "[broker]\nurl = amqps://u:p@h/\ntls_ca_file = /a\ntls_certificate_file = /c\ntls_key_file = /k\n"
        "tls_server_name = n\n"
    )
    assert conf.load([str(file)]).broker_tls == BrokerTls("/a", "/c", "/k", "n", insecure=False)
    assert conf.load([]).broker_tls == BrokerTls() and not BrokerTls().insecure
