from __future__ import annotations

import uuid
from typing import Any


def test_save_and_restore(reeve: Any) -> None:
    info = reeve.domain("web")
    path = reeve.folder / "web.save"
    saved = reeve("domain", "save", "web", str(path), "-f", "json").json
    assert (saved["uuid"], saved["path"], saved["bytes"]) == (info.uuid, str(path), path.stat().st_size)
    assert reeve.host.list_domains() == []
    back = reeve("domain", "restore", str(path), "-f", "json").json
    assert (back["uuid"], back["state"], back["owner"]) == (info.uuid, "running", info.owner)
    assert reeve("domain", "restore", str(path), "-f", "json").error["code"] == "domain.uuid_in_use"


def test_a_checkpoint(reeve: Any) -> None:
    reeve.domain("web")
    path = str(reeve.folder / "web.save")
    assert reeve("domain", "save", "web", path, "--keep-running", "--wait", "5", "-f", "json").json["downtime_ms"] > 0
    words = ("--name", "web2", "--uuid", str(uuid.uuid4()), "--paused", "-f", "json")
    assert reeve("domain", "restore", path, *words).json["state"] == "paused"
    assert sorted(info.name for info in reeve.host.list_domains()) == ["web", "web2"]


def test_what_cannot_be(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.shutdown=ignore")
    path = reeve.folder / "web.save"
    assert reeve("domain", "save", "web", str(path), "--wait", "0", "-f", "json").error["code"] == "domain.timeout"
    path.write_text("mine")
    assert reeve("domain", "save", "web", str(path), "-f", "json").error["code"] == "domain.spec_invalid"
    assert reeve("domain", "restore", str(path), "-f", "json").error["code"] == "stream.invalid"
    assert reeve("domain", "restore", str(path) + ".gone", "-f", "json").error["code"] == "domain.spec_invalid"
