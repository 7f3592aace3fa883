"""The options of the group ``[placement]``: what OpenStack's Placement is told of this host, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oslo_config import cfg

from agent import conf_keystone
from agent.errors import ConfigError

OPTIONS = (
    cfg.BoolOpt("enabled", default=False, help="Tell OpenStack's Placement what this host has and who takes it."),
    cfg.StrOpt(
        "endpoint",
        default="",
        help="Placement's URL: https://placement:8778. Default: what Keystone's catalogue says.",
    ),
    cfg.StrOpt(
        "auth",
        default="keystone",
        choices=[
            ("none", "no proof at all"),
            ("token", "the fixed token of the option token"),
            ("keystone", "a token of Keystone, by the options from auth_url on"),
        ],
        help="How the agent proves who it is. Placement's own rules ask for the role admin or service.",
    ),
    cfg.StrOpt("token", default="", secret=True, help="For auth = token; admin where Placement's strategy is noauth2."),
    cfg.StrOpt(
        "provider-name",
        sample_default="<[agent] host>",
        help="Name of this host's resource provider. Another one renames the provider. Default: [agent] host.",
    ),
    cfg.StrOpt(
        "provider-uuid",
        default="",
        help="UUID of this host's resource provider. Default: the node's identity in the journal, which stays when "
        "the host's name changes. Give it to go on with a provider that is there after the journal was lost.",
    ),
    cfg.StrOpt(
        "allocations",
        default="write",
        choices=[
            ("write", "the agent keeps them as the domains are, but for those that are not its own"),
            ("audit", "it compares and tells; `reeve placement repair` mends"),
        ],
        mutable=True,
        help="What is done about the allocations of this host's domains.",
    ),
    cfg.StrOpt(
        "project-id",
        default="reeve",
        help="Project of the allocations that the agents write. With user_id and the consumer type REEVE_DOMAIN it "
        "marks them as theirs: give all hosts the same.",
    ),
    cfg.StrOpt("user-id", default="reeve", help="User of the allocations that the agents write."),
    cfg.ListOpt(
        "aggregates",
        default=[],
        help="UUIDs of aggregates the provider is to be in; those that others put it in stay.",
    ),
    cfg.IntOpt(
        "interval",
        default=60,
        min=1,
        mutable=True,
        help="Seconds between full comparisons; changes are told at once.",
    ),
    cfg.FloatOpt(
        "timeout", default=10.0, min=0.1, max=600, help="How long Placement may take to be connected, and per read."
    ),
    cfg.StrOpt(
        "ca-file", default="", help="Certificates of authorities to trust instead of the usual ones, a PEM file."
    ),
    *conf_keystone.options("Placement", project_name="service"),
)
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class PlacementSettings(conf_keystone.KeystoneSettings):
    """The group ``[placement]``. Times in seconds."""

    enabled: bool = False
    endpoint: str = ""
    auth: str = "keystone"
    token: str = dataclasses.field(default="", repr=False)
    provider_name: str = ""
    provider_uuid: str = ""
    allocations: str = "write"
    project_id: str = "reeve"
    user_id: str = "reeve"
    aggregates: tuple[str, ...] = ()
    interval: int = 60
    timeout: float = 10.0
    ca_file: str = ""
    project_name: str = dataclasses.field(default="service", kw_only=True)


def settings(values: Mapping[str, Any], host: str) -> PlacementSettings:
    """:param host: the provider's name if none is given. :raises ConfigError: a value that cannot be one."""
    made = {field.name: values[field.name] for field in dataclasses.fields(PlacementSettings)}
    made["provider_name"] = made["provider_name"] or host
    made["provider_uuid"] = made["provider_uuid"].lower()
    made["aggregates"] = tuple(sorted({item.lower() for item in made["aggregates"]}))
    found = PlacementSettings(**made)
    for name, uuid in (("provider_uuid", found.provider_uuid), *(("aggregates", uuid) for uuid in found.aggregates)):
        if uuid and not _UUID.fullmatch(uuid):
            raise ConfigError(f"[placement] {name}: {uuid[:60]!r} is no UUID: give 8-4-4-4-12 hexadecimal digits")
    for name in ("provider_name", "project_id", "user_id"):
        text = getattr(found, name)
        if not 1 <= len(text) <= 200 or not text.isprintable():
            raise ConfigError(f"[placement] {name} is not usable: give 1 to 200 printable characters")
    for name in ("endpoint", "auth_url"):
        conf_keystone.check_url("placement", name, getattr(found, name))
    if found.enabled:
        _check_complete(found)
    return found


def _check_complete(found: PlacementSettings) -> None:
    """What is only asked of a group that is in use."""
    if found.ca_file and not Path(found.ca_file).is_file():
        raise ConfigError(f"[placement] ca_file {found.ca_file} is not there: give a PEM file")
    if found.auth == "token" and not found.token:
        raise ConfigError("[placement] auth is token and there is none: give token")
    if found.auth == "keystone":
        if not found.auth_url:
            raise ConfigError("[placement] auth is keystone and auth_url is not given: give Keystone's URL")
        if not found.credential:
            raise ConfigError("[placement] there is no credential: give username or application_credential_id")
    elif not found.endpoint:
        raise ConfigError("[placement] endpoint is not given: give Placement's URL, or auth = keystone")
