"""Images of Glance, with tokens of Keystone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch_rig import DATA, fetch, fetcher
from image_servers import Cloud, Server, cut_at, redirect, serving

from agent.errors import InstructionError
from agent.images.remote.fetcher import Fetcher
from agent.images.remote.source import Source

ID = "11111111-2222-3333-4444-555555555555"
FILE = f"/image/v2/images/{ID}/file"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture
def cloud(server: Server) -> Cloud:
    made = Cloud(server)
    made.add(ID, DATA)
    return made


def node(tmp_path: Path, cloud: Cloud, **changes: Any) -> Fetcher:
    """The services' own addresses need not be allowed."""
    given: dict[str, Any] = {"auth_url": cloud.auth_url, "username": "reeve", "password": "s3cret", "project_name": "p"}
    return fetcher(tmp_path, allowed_networks=(), allowed_hosts=(), allowed_schemes=("https",), **(given | changes))


def image(**fields: Any) -> Source:
    return Source.from_json({"glance": ID, **fields}, fields.pop("format", "raw"))


def test_with_a_password(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    made = node(tmp_path, cloud)
    entry = fetch(made, image())
    assert made.cache.path(entry.key).read_bytes() == DATA and set(entry.hashes) == {"sha256", "sha512"}
    user = server.posts[0]["auth"]["identity"]["password"]["user"]
    assert user == {"name": "reeve", "password": "s3cret", "domain": {"name": "Default"}}
    assert server.posts[0]["auth"]["scope"]["project"]["name"] == "p"
    assert fetch(made, image()).key == entry.key
    assert (len(server.posts), len(server.asked(FILE))) == (1, 1), "one token, one download"


def test_with_an_application_credential(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    given = {"application_credential_id": "app", "application_credential_secret": "s3cret"}
    assert fetch(node(tmp_path, cloud, **given), image()).size == len(DATA)
    assert server.posts[0]["auth"]["identity"]["application_credential"] == {"id": "app", "secret": "s3cret"}
    assert "scope" not in server.posts[0]["auth"]


def test_without_a_token(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    cloud.tokens.append(None)  # type: ignore[arg-type]
    made = node(tmp_path, cloud, auth_url="", glance_url=server.url("/image"))
    assert fetch(made, image()).size == len(DATA) and server.posts == []


def test_a_token_that_was_revoked_is_replaced(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    made = node(tmp_path, cloud)
    entry = fetch(made, image())
    made.cache.evict(entry.key)
    cloud.tokens[:] = ["another"]
    assert fetch(made, image()).size == len(DATA) and len(server.posts) == 2


def test_a_download_that_is_cut_is_resumed_without_a_validator(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    server.files[FILE].misdeed = cut_at(100_000)
    assert fetch(node(tmp_path, cloud), image()).size == len(DATA)
    first, second = server.asked(FILE)
    assert "Range" not in first and "Range" in second and "If-Range" not in second
    assert second["X-Auth-Token"] == "token-0"


def test_a_token_goes_nowhere_else(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    with serving() as other:
        other.files["/data"] = server.files[FILE].__class__(DATA)
        server.files[FILE].misdeed = redirect(other.url("/data"))
        with pytest.raises(InstructionError, match="not allowed"):
            fetch(node(tmp_path, cloud), image())
        import ipaddress

        loopback = (ipaddress.ip_network("127.0.0.1/32"),)
        made = fetcher(tmp_path, auth_url=cloud.auth_url, username="u", password="s3cret", allowed_networks=loopback)
        assert fetch(made, image()).size == len(DATA)
        assert "X-Auth-Token" not in other.requests[0][1]


def test_an_instruction_s_url_is_not_trusted_for_it(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    made = node(tmp_path, cloud, glance_url=server.url("/image"), require_hash=False)
    with pytest.raises(InstructionError, match="not allowed"):
        fetch(made, Source("raw", url=server.url("/image/v2/images")))
    assert server.requests == []


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "queued": ({"status": "queued"}, {}, "image.invalid", "not active"),
    "format": ({"disk_format": "qcow2"}, {}, "image.invalid", "not raw"),
    "container": ({"container_format": "ova"}, {}, "image.invalid", "ova"),
    "hash": ({"os_hash_value": "0" * 128}, {}, "image.invalid", "has sha512"),
    "said hash": ({}, {"hash": {"algorithm": "sha512", "value": "0" * 128}}, "image.invalid", "another sha512"),
    "other hash": ({}, {"hash": {"algorithm": "sha256", "value": "0" * 64}}, "image.invalid", "has sha256"),
    "size": ({"size": 5}, {}, "image.invalid", "not 5"),
    "said size": ({}, {"size": 5}, "image.invalid", "not 5"),
    "no hash": ({"os_hash_algo": None}, {}, "image.source_refused", "no strong hash"),
    "weak hash": ({"os_hash_algo": "md5"}, {}, "image.source_refused", "no strong hash"),
    "another": ({"id": "x"}, {}, "image.fetch_failed", "no sense"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images(server: Server, cloud: Cloud, tmp_path: Path, case: str) -> None:
    changes, fields, code, says = BAD[case]
    cloud.images[ID] |= changes
    made = node(tmp_path, cloud)
    with pytest.raises(InstructionError) as caught:
        fetch(made, image(**fields))
    assert caught.value.code == code and says in caught.value.message, caught.value.message
    assert made.cache.list() == []


def test_a_weak_hash_is_compared_all_the_same(cloud: Cloud, tmp_path: Path) -> None:
    cloud.images[ID] |= {"os_hash_algo": None, "checksum": "0" * 32}
    with pytest.raises(InstructionError, match="has md5"):
        fetch(node(tmp_path, cloud, require_hash=False), image())


def test_who_may_not(server: Server, cloud: Cloud, tmp_path: Path) -> None:
    for wanted, changes, code in (
        (image(), {"password": "wrong"}, "image.auth_failed"),
        (Source("raw", glance=ID.replace("1", "9")), {}, "image.not_found"),
        (image(), {"auth_url": "", "username": ""}, "image.source_refused"),
        (image(), {"region": "two"}, "image.source_refused"),
        (image(), {"auth_url": server.url("/nothing")}, "image.auth_failed"),
    ):
        with pytest.raises(InstructionError) as caught:
            fetch(node(tmp_path, cloud, **changes), wanted)
        assert caught.value.code == code and "s3cret" not in caught.value.message
