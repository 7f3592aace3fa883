"""The options by which the agent gets a token of Keystone, in each group whose service asks for one."""

from __future__ import annotations

import dataclasses
from urllib.parse import urlsplit

from oslo_config import cfg

from agent.errors import ConfigError


def options(service: str, *, project_name: str, without: str = "") -> tuple[cfg.Opt, ...]:
    """:param service: its name, for the help. :param without: what an empty auth_url means, for the help."""
    return (
        cfg.StrOpt("auth-url", default="", help=f"Keystone, with or without /v3{without and f'; empty: {without}'}."),
        cfg.StrOpt("username", default="", help="For a token by password."),
        cfg.StrOpt("password", default="", secret=True, help="The same."),
        cfg.StrOpt("user-domain-name", default="Default", help="The same."),
        cfg.StrOpt("project-name", default=project_name, help="The same: what the token is for."),
        cfg.StrOpt("project-domain-name", default="Default", help="The same."),
        cfg.StrOpt("application-credential-id", default="", help="For a token by an application credential, instead."),
        cfg.StrOpt("application-credential-secret", default="", secret=True, help="The same."),
        cfg.StrOpt("region", default="", help=f"Region of {service} in the catalogue; empty: the first."),
        cfg.StrOpt(
            "interface",
            default="internal",
            choices=("public", "internal", "admin"),
            help=f"{service}'s interface there.",
        ),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeystoneSettings:
    """Who we are, and which endpoint of the catalogue is wanted."""

    auth_url: str = ""
    username: str = ""
    password: str = dataclasses.field(default="", repr=False)
    user_domain_name: str = "Default"
    project_name: str = ""
    project_domain_name: str = "Default"
    application_credential_id: str = ""
    application_credential_secret: str = dataclasses.field(default="", repr=False)
    region: str = ""
    interface: str = "internal"

    @property
    def credential(self) -> bool:
        """Whether there is one."""
        return bool(self.application_credential_id or self.username)


def check_url(group: str, name: str, url: str) -> None:
    """:raises ConfigError: it is none; empty is none that is asked for."""
    try:
        parts = urlsplit(url)
        fits = not url or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"[{group}] {name} is no URL: give https://HOST[:PORT]")
