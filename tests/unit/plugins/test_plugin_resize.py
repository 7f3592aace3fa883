"""resize while the domain runs: what follows, what is refused, and that a failure takes everything back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent.resizing import least_memory_mib
from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.api import DomainSpec
from hypervisor.toolstack.drivers.fake import FakeToolstack

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = make_rig(tmp_path, FakeToolstack(None, cpus=8, memory_mib=2048))
    yield made
    made.journal.close()


def domain(rig: Rig, words: str = "", **args: Any) -> str:
    fields = {"vcpus": 2, "max_vcpus": 4, "memory_mib": 256, "max_memory_mib": 768, "cmdline": words, **args}
    return rig.create(disks=[{"id": "xvda", "path": rig.image()}, {"id": "xvdb", "path": rig.image("b.img")}], **fields)


def state(rig: Rig, uuid: str) -> tuple[DomainSpec, int, int, int, list[int]]:
    info = rig.toolstack.get_domain(uuid)
    disks = [device.size_bytes for device in rig.toolstack.list_devices(uuid)]
    return rig.toolstack.get_spec(uuid), info.vcpus, info.memory_mib, info.memory_target_mib, disks


def test_up_and_back(rig: Rig) -> None:
    uuid = domain(rig)
    before = rig.toolstack.get_domain(uuid)
    reply = rig.run("resize", {"uuid": uuid, "vcpus": 4, "memory_mib": 768, "weight": 512, "cap": 150,
                               "disks": {"xvda": 2 * MIB, "xvdb": MIB}})  # fmt: skip
    assert reply.ok and reply.result is not None, reply.error
    assert [step["name"] for step in reply.steps] == ["claim", "schedule", "vcpus", "memory", "disks"]
    assert (reply.result["mode"], reply.result["pending"]) == ("live", None)
    assert reply.result["disks"] == {"xvda": 2 * MIB, "xvdb": MIB}
    info = rig.toolstack.get_domain(uuid)
    assert (info.vcpus, info.memory_mib, info.domid) == (4, 768, before.domid)
    spec = rig.toolstack.get_spec(uuid)
    assert (spec.vcpus, spec.memory_mib, spec.weight, spec.cap) == (4, 768, 512, 150)
    reply = rig.run("resize", {"uuid": uuid, "vcpus": 1, "memory_mib": 256})
    assert reply.ok and [step["name"] for step in reply.steps] == ["claim", "vcpus", "memory"]
    assert state(rig, uuid)[1:] == (1, 256, 256, [2 * MIB, MIB])
    rig.clean()


def test_nothing_to_do_is_done(rig: Rig) -> None:
    uuid = domain(rig)
    for mode in ("live", "cold", "auto"):
        reply = rig.run("resize", {"uuid": uuid, "vcpus": 2, "disks": {"xvda": MIB}, "mode": mode})
        assert reply.ok and reply.steps == ()


BAD = [
    ("instruction.bad_args", {"vcpus": 0}),
    ("instruction.bad_args", {"vcpus": 33}),
    ("instruction.bad_args", {"memory_mib": 0}),
    ("instruction.bad_args", {"memory_mib": -1}),
    ("instruction.bad_args", {"memory_mib": 2.5}),
    ("instruction.bad_args", {"weight": 0}),
    ("instruction.bad_args", {"cap": 3300}),
    ("instruction.bad_args", {"disks": {"sda": 2 * MIB}}),
    ("instruction.bad_args", {"disks": {"xvda": 0}}),
    ("instruction.bad_args", {"disks": {"xvda": 1 << 60}}),
    ("instruction.bad_args", {"mode": "warm"}),
    ("instruction.bad_args", {"name": "other"}),
    ("domain.spec_invalid", {"vcpus": 5}),
    ("domain.spec_invalid", {"memory_mib": 769}),
    ("domain.spec_invalid", {"max_memory_mib": 512}),
    ("domain.spec_invalid", {"vcpus": 3, "max_vcpus": 2}),
    ("domain.spec_invalid", {"memory_mib": 200, "max_memory_mib": 100, "mode": "cold"}),
    ("domain.memory_too_small", {"memory_mib": 199}),
    ("domain.memory_too_small", {"memory_mib": 1}),
    ("domain.spec_invalid", {"disks": {"xvda": MIB - 512}}),
    ("domain.spec_invalid", {"disks": {"xvda": MIB + 1}}),
    ("device.not_found", {"disks": {"xvdc": 2 * MIB}}),
    # Beyond the host.
    ("host.insufficient_memory", {"memory_mib": 4096, "mode": "cold"}),
    ("host.insufficient_vcpus", {"vcpus": 2, "max_vcpus": 16, "mode": "cold"}),
]


@pytest.mark.parametrize(("code", "change"), BAD)
def test_bad_input_changes_nothing(rig: Rig, code: str, change: dict[str, Any]) -> None:
    uuid = domain(rig)
    before = state(rig, uuid)
    assert rig.refused(code, "resize", {"uuid": uuid, **change})["undone"] is True
    assert state(rig, uuid) == before


def test_the_host_s_memory_is_taken_before(rig: Rig) -> None:
    uuid = domain(rig, max_memory_mib=2048)
    rig.create("other", memory_mib=1500)
    error = rig.refused("host.insufficient_memory", "resize", {"uuid": uuid, "memory_mib": 600})
    assert "needs 344 MiB more, the host has 292 MiB left" in error["message"]
    rig.ok("resize", {"uuid": uuid, "memory_mib": 540})


def test_foreign_ended_and_paused_domains(rig: Rig) -> None:
    rig.refused("domain.not_ours", "resize", {"uuid": rig.foreign(), "vcpus": 1})
    uuid = domain(rig)
    rig.toolstack.pause(uuid)
    rig.refused("domain.wrong_state", "resize", {"uuid": uuid, "vcpus": 1})
    rig.refused("domain.wrong_state", "resize", {"uuid": uuid, "vcpus": 8, "mode": "cold"})
    rig.ok("resize", {"uuid": uuid, "weight": 1})
    rig.toolstack.unpause(uuid)
    rig.toolstack.crash(uuid)
    rig.refused("domain.wrong_state", "resize", {"uuid": uuid, "vcpus": 1})


@pytest.mark.parametrize(
    ("words", "change"),
    [("fake.memory=keep", {"memory_mib": 200}), ("fake.vcpus=ignore", {"vcpus": 4})],
)
def test_a_guest_that_does_not_follow_is_put_back(rig: Rig, words: str, change: dict[str, Any]) -> None:
    uuid = domain(rig, words)
    before = state(rig, uuid)
    args = {"uuid": uuid, "weight": 999, "disks": {"xvda": 2 * MIB}, "wait_seconds": 0.05, **change}
    error = rig.refused("domain.timeout", "resize", args)
    assert (error["retryable"], error["undone"]) == (True, True)
    after = state(rig, uuid)
    assert after[1:] == before[1:]
    assert after[0] == dataclasses.replace(before[0])


def test_what_the_guest_says_it_needs_counts(rig: Rig) -> None:
    uuid = domain(rig, "fake.min=240")
    assert "240 MiB" in rig.refused("domain.memory_too_small", "resize", {"uuid": uuid, "memory_mib": 220})["message"]


def test_a_slow_guest_is_waited_for_and_its_progress_told(rig: Rig) -> None:
    told: list[dict[str, Any]] = []
    rig.executor._progress = told.append
    uuid = domain(rig, "fake.memory=slow")
    rig.ok("resize", {"uuid": uuid, "memory_mib": 320})
    assert rig.toolstack.get_domain(uuid).memory_mib == 320
    assert told[0] | {"done": 0} == told[0] | {"done": 0, "total": 64, "unit": "MiB", "uuid": uuid, "verb": "resize"}
    assert told[-1]["done"] >= 63


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["set_scheduling", "set_vcpus", "set_memory", "resize_disk"])
@pytest.mark.parametrize("error", [HostUnavailable("away"), HostFailure("broken")])
def test_a_driver_that_fails_takes_everything_back(rig: Rig, call: str, when: str, error: Any) -> None:
    uuid = domain(rig)
    before = state(rig, uuid)
    rig.toolstack.inject_error(call, error, when=when)
    args = {"uuid": uuid, "vcpus": 4, "memory_mib": 512, "weight": 9, "disks": {"xvda": 2 * MIB}}
    failed = rig.refused(error.code, "resize", args)
    grown = (call, when) == ("resize_disk", "after")
    assert failed["undone"] is not grown
    after = state(rig, uuid)
    assert after[:4] == before[:4]
    assert after[4][0] == (2 * MIB if grown else MIB)
    assert ("xvda have grown and stay so" in failed["message"]) is grown


def test_a_domain_that_ends_meanwhile(rig: Rig) -> None:
    uuid = domain(rig, "fake.memory=keep")
    looks = iter(range(100))
    real = rig.toolstack.get_domain

    def get_domain(ident: str) -> Any:
        if next(looks) == 3:
            rig.toolstack.crash(ident)
        return real(ident)

    rig.toolstack.get_domain = get_domain  # type: ignore[method-assign]
    failed = rig.refused("domain.wrong_state", "resize", {"uuid": uuid, "memory_mib": 200, "wait_seconds": 5})
    assert "ended meanwhile" in failed["message"] and failed["undone"] is True


def test_the_least_memory_of_a_linux_guest() -> None:
    assert [least_memory_mib(most) for most in (4, 64, 128, 256, 768, 4096)] == [4, 40, 72, 104, 200, 424]
    assert all(least_memory_mib(most) <= most for most in range(1, 3000))
