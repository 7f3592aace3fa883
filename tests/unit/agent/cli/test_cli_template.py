from __future__ import annotations

from pathlib import Path
from typing import Any


def test_templates_come_and_go(reeve: Any) -> None:
    reeve.domain("web")
    words = ("template", "create", "base", "--from-domain", "web", "-f", "json")
    made = reeve(*words, "--keep-running", "--wait", "5").json
    assert (made["name"], made["spec"]["name"], made["users"]) == ("base", "web", [])
    assert made["downtime_ms"] > 0 and made["created_at"] > 0
    assert reeve(*words).error["code"] == "template.exists"
    [row] = reeve("template", "list", "-f", "json").json
    assert (row["name"], row["memory_mib"], row["users"]) == ("base", made["spec"]["memory_mib"], 0)
    assert reeve("template", "show", "base", "-f", "json").json == made
    assert reeve("template", "remove", "base", "-f", "json").json == {"name": "base", "state": "gone"}
    for verb in ("show", "remove"):
        assert reeve("template", verb, "base", "-f", "json").error["code"] == "template.not_found"


def test_the_domain_goes_unless_it_is_kept(reeve: Any) -> None:
    reeve.domain("web")
    assert reeve("template", "create", "base", "--from-domain", "web", "-f", "json").json["downtime_ms"] == 0
    assert reeve.host.list_domains() == []


def test_what_cannot_be(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.shutdown=ignore")
    words = ("template", "create", "base", "-f", "json", "--from-domain")
    assert reeve(*words, "web", "--wait", "0").error["code"] == "domain.timeout"
    assert reeve(*words, "nothing").error["code"] == "domain.not_found"


def test_create_from_a_checkpoint(reeve: Any, tmp_path: Path) -> None:
    for name in ("data", "own"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    reeve.domain("web", "--nic", "", "--disk", f"xvda={tmp_path}/data")
    reeve("template", "create", "base", "--from-domain", "web", "-f", "json").json  # noqa: B018 its exit code
    words = ("domain", "create", "web2", "--from-checkpoint", "base", "-f", "json")
    said = reeve(*words)
    assert said.code == 2 and "qemu-img create -f qcow2 -F raw -b" in said.err
    made = reeve(*words, "--disk", f"xvda={tmp_path}/own", "--metadata", "a=b").json
    assert (made["name"], made["state"], made["owner"]) == ("web2", "running", "operator")
    spec, known = reeve.host.get_spec(made["uuid"]), reeve.host.template_get("base").spec
    assert spec.boot == known.boot and spec.nics[0].mac != known.nics[0].mac and dict(spec.metadata) == {"a": "b"}
    assert reeve("template", "remove", "base", "-f", "json").error["code"] == "template.in_use"
    assert reeve("template", "remove", "base", "--force").code == 0
    assert reeve(*words, "--memory", "64").error["code"] == "template.not_found"
    reeve("template", "create", "base", "--from-domain", "web2", "-f", "json")
    assert reeve(*words, "--memory", "64").code == 2
