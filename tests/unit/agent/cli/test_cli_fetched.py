"""`reeve image fetch`, `pin`, `unpin`, `evict`, and the cache in `list` and `show`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))
from image_servers import File, Server, serving

DATA = b"x" * 4096
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(reeve: Any) -> Iterator[Server]:
    config = Path(reeve.options[1])
    allowed = "[images]\nallowed_schemes = http\nallowed_networks = 127.0.0.1/32\n"
    config.write_text(config.read_text() + allowed)
    with serving() as made:
        made.files["/disk"] = File(DATA)
        yield made


def fetch(reeve: Any, server: Server, *more: str) -> Any:
    url = server.url("/disk?signature=hidden")
    return reeve("image", "fetch", url, "--image-format", "raw", "--hash", f"sha256:{SHA}", "--json", *more)


def test_fetch_list_show(reeve: Any, server: Server) -> None:
    got = fetch(reeve, server).json
    assert got["id"] == f"{SHA}.raw" and Path(got["path"]).read_bytes() == DATA and got["state"] == "idle"
    assert got["sources"] == [server.url("/disk")], "a URL's query may be a secret"
    fetch(reeve, server)
    assert len(server.requests) == 1
    (row,) = reeve("image", "list", "--fetched", "--json").json
    assert set(row) == {"id", "format", "size", "disk_size", "used", "state"} and row["size"] == 4096
    assert reeve("image", "show", SHA[:8], "--json").json["id"] == got["id"]
    assert reeve("image", "show", SHA[:8]).code == 0


def test_pin_unpin_evict(reeve: Any, server: Server) -> None:
    assert fetch(reeve, server, "--pin").json["pinned"] is True
    assert reeve("image", "evict", SHA[:12], "--json").error["code"] == "image.in_use"
    assert reeve("image", "unpin", SHA, "--json").json["state"] == "idle"
    assert reeve("image", "pin", SHA, "--json").json["state"] == "pinned"
    reeve("image", "unpin", f"{SHA}.raw")
    assert reeve("image", "evict", SHA[:12], "--json").json == {"evicted": f"{SHA}.raw", "size": 4096}
    assert reeve("image", "list", "--fetched", "--json").json == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("image fetch file:///etc/passwd --image-format raw", "image.source_refused"),
        ("image fetch http://127.0.0.1:1/x --image-format raw", "image.source_refused"),
        ("image fetch http://127.0.0.1:1/x --image-format raw --hash md5:00", "cli.usage"),
        ("image fetch http://127.0.0.1:1/x --image-format raw --hash sha256:00", "instruction.bad_args"),
        ("image fetch http://127.0.0.1:1/x --image-format vmdk", "cli.usage"),
        ("image show 12345678", "image.not_found"),
        ("image pin ../x", "image.not_found"),
        ("image evict 1", "image.not_found"),
    ],
)
def test_what_is_refused(reeve: Any, server: Server, line: str, code: str) -> None:
    assert reeve(*line.split(), "--json").error["code"] == code
