"""sysrq and dump_core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig

from agent.journal import StepState
from hypervisor.errors import HostFailure


@pytest.mark.parametrize(("verb", "args"), [("sysrq", {"key": "h"}), ("dump_core", {"name": "core"})])
def test_foreign_domains(rig: Rig, verb: str, args: dict[str, Any]) -> None:
    rig.refused("domain.not_ours", verb, {"uuid": rig.foreign(), **args})


def test_a_key_reaches_the_guest(rig: Rig) -> None:
    uuid = rig.create()
    assert rig.ok("sysrq", {"uuid": uuid, "key": "t"}) == {"uuid": uuid, "key": "t"}
    assert rig.toolstack.console_log(uuid).endswith(b"sysrq: t\r\n")
    for key in ("", "tt", "\n", "/", "é"):
        rig.refused("instruction.bad_args", "sysrq", {"uuid": uuid, "key": key})
    rig.toolstack.crash(uuid)
    rig.refused("domain.wrong_state", "sysrq", {"uuid": uuid, "key": "t"})


def test_an_interrupted_key_is_not_sent_again(rig: Rig) -> None:
    uuid = rig.create()
    args = {"uuid": uuid, "key": "c"}
    ident = rig.accept("sysrq", args)
    rig.journal.planned(ident, rig.verbs["sysrq"].plugin.plan(args, rig.host).to_json(), uuid)
    rig.journal.step(ident, 0, "sysrq", StepState.BEGUN)
    rig.executor.run(ident)
    error = rig.reply(ident).error
    assert error is not None and (error["code"], error["undone"]) == ("instruction.outcome_unknown", False)
    assert b"sysrq" not in rig.toolstack.console_log(uuid)


def test_a_core_is_a_new_file_in_its_folder(rig: Rig) -> None:
    uuid = rig.create()
    made = rig.ok("dump_core", {"uuid": uuid, "name": "web.core"})
    path = Path(rig.host.settings["core_dir"]) / "web.core"
    assert made == {"uuid": uuid, "path": str(path), "bytes": path.stat().st_size}
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "exists" in rig.refused("instruction.bad_args", "dump_core", {"uuid": uuid, "name": "web.core"})["message"]
    for name in ("../x", "/etc/passwd", "", ".hidden", "a\n"):
        rig.refused("instruction.bad_args", "dump_core", {"uuid": uuid, "name": name})


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_dump_leaves_no_file(rig: Rig, when: str) -> None:
    uuid = rig.create()
    rig.toolstack.inject_error("dump_core", HostFailure("disk full"), when=when)
    assert rig.refused("host.failure", "dump_core", {"uuid": uuid, "name": "core"})["undone"] is True
    assert list(Path(rig.host.settings["core_dir"]).iterdir()) == []


def test_an_interrupted_dump_that_was_whole_is_done(rig: Rig) -> None:
    uuid = rig.create()
    args = {"uuid": uuid, "name": "core"}
    ident = rig.accept("dump_core", args)
    plan = rig.verbs["dump_core"].plugin.plan(args, rig.host)
    rig.journal.planned(ident, plan.to_json(), uuid)
    rig.journal.step(ident, 0, "dump", StepState.BEGUN)
    path = Path(rig.host.settings["core_dir"]) / "core"
    path.parent.mkdir()
    path.write_text("whole")
    rig.executor.run(ident)
    assert rig.reply(ident).ok and path.read_text() == "whole"
