from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig

from agent.api import InstructionError, Plan, own_domain
from agent.control import Control
from hypervisor.errors import NotOurs
from hypervisor.toolstack.api import MigrationMode, MigrationPhase, MigrationRole, MigrationStatus


class Agent(Control):
    """With a message in its quarantine."""

    def quarantined(self, seq: int | None) -> list[dict[str, Any]]:
        return [{"seq": seq}]


def test_plans_of_every_verb_survive_json(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    disk, nic = {"id": "xvda", "path": str(tmp_path / "disk")}, {"id": 0}
    uuid = rig.create(disks=[disk], nics=[nic])
    resized = rig.create("resized")
    kept = rig.create("kept")
    rig.toolstack.template_create(kept, "kept", ident="0")
    rig.ok("resize", {"uuid": resized, "mode": "cold", "memory_mib": 128})
    args: dict[str, Any] = {
        "create": {"name": "other", "memory_mib": 8, "kernel": str(rig.kernel), "metadata": {"k": "v"}},
        "shutdown": {"uuid": uuid, "force": True},
        "list": {},
        "attach_disk": {"uuid": uuid, "disk": {"id": "xvdb", "path": disk["path"], "limits": {"iops": 5}}},
        "attach_nic": {"uuid": uuid, "nic": {"addresses": ["192.0.2.1"]}},
        "detach_disk": {"uuid": uuid, "id": "xvda"},
        "detach_nic": {"uuid": uuid, "id": 0},
        "resize": {"uuid": uuid, "memory_mib": 128, "disks": {"xvda": 8192}, "mode": "auto"},
        "confirm_resize": {"uuid": resized},
        "revert_resize": {"uuid": resized},
        "sysrq": {"uuid": uuid, "key": "h"},
        "dump_core": {"uuid": uuid, "name": "core"},
        "save": {"uuid": uuid, "name": "saved", "keep_running": True},
        "restore": {"uuid": "00000000-0000-4000-8000-000000000000", "name": "saved"},
        "migrations": {},
        "template_create": {"uuid": uuid, "name": "base"},
        "template_list": {},
        "snapshot": {"uuid": rig.create("plain"), "name": "snap"},
        "clone": {"uuid": resized, "names": ["another"]},
        "revert": {"uuid": kept, "name": "kept"},
        "template_remove": {"name": "kept"},
        "cancel_migration": {"ident": uuid},
        "resolve_migration": {"ident": uuid, "keep": True},
        "migrate_finish": {"ident": uuid},
        "migrate_settle": {"ident": uuid, "uuid": uuid, "keep": True},
        "migrate_in": {"ident": uuid, "token": "0" * 32, "source": "node2", "mode": "live",
                       "offer": rig.toolstack.migration_offer(uuid).to_json()},
    }  # fmt: skip
    # These two need a host that can be reached.
    args |= {"standby": {"uuid": uuid, "target": "node2"}, "standby_stop": {"uuid": uuid}}
    args |= {"standby_takeover": {"uuid": uuid, "force": True}}
    args |= {"migrate": {"uuid": uuid, "target": "node2"}, "evacuate": {"target": "node2"}}
    rig.toolstack.state_dir = str(tmp_path)
    halves = [
        MigrationStatus(uuid, uuid, role, MigrationPhase.STANDBY, MigrationMode.STANDBY) for role in MigrationRole
    ]
    monkeypatch.setattr(rig.toolstack, "migration_list", lambda: halves)
    args |= {"cancel": {"id": uuid}, "locks": {}, "break_lock": {"domain": uuid}}
    args |= {"quarantine_drop": {"seq": 1}, "quarantine_list": {}, "quarantine_retry": {"seq": 1}}
    host = dataclasses.replace(rig.host, control=Agent(rig.journal))
    for name, verb in rig.verbs.items():
        plan = verb.plugin.plan(args.get(name, {"uuid": uuid}), host)
        assert plan.steps
        text = json.dumps(plan.to_json())
        assert Plan.from_json(json.loads(text), verb.plugin.step_kinds) == plan
        assert {type(step) for step in plan.steps} <= set(verb.plugin.step_kinds)


def test_every_step_and_argument_is_described(rig: Rig) -> None:
    for verb in rig.verbs.values():
        assert verb.plugin.summary and verb.plugin.args_schema["additionalProperties"] is False
        assert all(kind.title for kind in verb.plugin.step_kinds)
        assert all(prop.get("description") for prop in verb.plugin.args_schema.get("properties", {}).values())


def test_an_unknown_step_is_refused(rig: Rig) -> None:
    with pytest.raises(InstructionError, match="step 'x' this plugin lacks"):
        Plan.from_json({"steps": [{"step": "x"}]}, ())


def test_own_domain_wants_the_marker(rig: Rig) -> None:
    assert own_domain(rig.host, rig.create()).name == "web"
    with pytest.raises(NotOurs, match="was not made by this agent"):
        own_domain(rig.host, rig.foreign())
