"""The group ``[placement]``: what it needs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import conf, reload
from agent.errors import ConfigError

UUID = "11111111-1111-4111-8111-111111111111"
KEYSTONE = "enabled = true\nauth_url = https://id:5000\nusername = reeve\n"


def load(tmp_path: Path, text: str) -> conf.Settings:
    path = tmp_path / "agent.conf"
    path.write_text(f"[agent]\nhost = node1\nstate_dir = {tmp_path}\n[placement]\n{text}\n")
    return conf.load([str(path)])


def test_it_is_off_and_the_name_is_the_hosts(tmp_path: Path) -> None:
    found = load(tmp_path, "").placement
    assert not found.enabled and found.provider_name == "node1" and found.provider_uuid == ""


def test_what_is_given(tmp_path: Path) -> None:
    found = load(tmp_path, f"{KEYSTONE}password = s3cret\nprovider_uuid = {UUID.upper()}\naggregates = {UUID},{UUID}")
    assert found.placement.provider_uuid == UUID and found.placement.aggregates == (UUID,)
    assert found.placement.password == "s3cret" and "s3cret" not in repr(found)


@pytest.mark.parametrize(
    "text, cure",
    [
        ("enabled = true", "auth_url"),
        ("enabled = true\nauth_url = https://id", "username"),
        ("enabled = true\nauth = token\nendpoint = http://p", "token"),
        ("enabled = true\nauth = none", "endpoint"),
        (f"{KEYSTONE}ca_file = /nowhere.pem", "ca_file"),
        ("endpoint = placement", "endpoint"),
        ("auth_url = ftp://x", "auth_url"),
        ("provider_uuid = node1", "provider_uuid"),
        (f"aggregates = {UUID},rack1", "aggregates"),
        ("project_id = " + "x" * 300, "project_id"),
        ("allocations = maybe", "allocations"),
    ],
)
def test_what_cannot_be(tmp_path: Path, text: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert cure in caught.value.message and "\n" not in caught.value.message


def test_what_may_change_while_the_agent_runs(tmp_path: Path) -> None:
    old = load(tmp_path, KEYSTONE)
    new = load(tmp_path, f"{KEYSTONE}interval = 5\nallocations = audit\nendpoint = http://p")
    settings, changed, kept = reload.merge(old, new)
    assert (settings.placement.interval, settings.placement.allocations, settings.placement.endpoint) == (
        5,
        "audit",
        "",
    )
    assert changed == ["placement.allocations", "placement.interval"] and kept == ["placement.endpoint"]
