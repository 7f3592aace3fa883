"""list, show, console_log: they look and change nothing."""

from __future__ import annotations

import base64

from agent_rig import Rig


def test_list_tells_whose(rig: Rig) -> None:
    assert rig.ok("list") == {"domains": []}
    ours, theirs = rig.create(), rig.foreign()
    domains = rig.ok("list")["domains"]
    assert {domain["uuid"]: domain["own"] for domain in domains} == {ours: True, theirs: False}
    assert [domain["uuid"] for domain in rig.ok("list", {"own": True})["domains"]] == [ours]
    rig.refused("instruction.bad_args", "list", {"uuid": ours})


def test_show(rig: Rig) -> None:
    ours, theirs = rig.create(vcpus=3), rig.foreign()
    shown = rig.ok("show", {"uuid": ours})
    assert shown["domain"]["own"] is True and shown["spec"]["vcpus"] == 3
    shown = rig.ok("show", {"uuid": theirs})
    assert shown["domain"]["own"] is False and shown["spec"] is None


def test_show_of_an_unreadable_domain_says_unknown(rig: Rig) -> None:
    uuid = rig.foreign()
    rig.toolstack.set_readable(uuid, False)
    assert rig.ok("show", {"uuid": uuid})["domain"]["state"] == "unknown"


def test_console_log(rig: Rig) -> None:
    uuid = rig.create()
    rig.toolstack.guest_print(uuid, b"caf\xc3\xa9 \xff end")
    log = rig.ok("console_log", {"uuid": uuid, "max_bytes": 11})
    assert log == {"uuid": uuid, "bytes": 11, "text": "caf\u00e9 \ufffd end"}
    raw = rig.ok("console_log", {"uuid": uuid, "max_bytes": 5, "raw": True})
    assert base64.b64decode(raw["base64"]) == b"\xff end"
    assert rig.ok("console_log", {"uuid": uuid})["text"].startswith("fake guest web")
    rig.refused("instruction.bad_args", "console_log", {"uuid": uuid, "max_bytes": 0})
    rig.refused("instruction.bad_args", "console_log", {"uuid": uuid, "max_bytes": 1 << 30})
