"""A token and a catalogue from Keystone v3, by password or by application credential.

Source: Keystone's API reference, "Authentication and token management".
"""

from __future__ import annotations

import calendar
import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from agent.conf_keystone import KeystoneSettings
from agent.errors import InstructionError
from agent.images.remote.source import public_url

EARLY_SECONDS = 60.0
"""A token that ends so soon is not used any more."""
_MAX_TOKEN = 16384


class Asks(Protocol):
    """What speaks HTTP."""

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: object = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and the JSON of an answer; None if it is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """:ivar text: of the header X-Auth-Token. :ivar expires: seconds since the epoch.

    :ivar endpoint: the service's URL by the catalogue, "" when it has none.
    """

    text: str = dataclasses.field(repr=False)
    expires: float
    endpoint: str


class Keystone:
    """Gets a token when one is needed and keeps it until it ends; for any thread.

    :param service: its type in the catalogue. :param area: of the codes of errors.
    :param group: of the configuration, for messages.
    """

    def __init__(
        self, settings: KeystoneSettings, *, service: str = "image", area: str = "image", group: str = "images"
    ) -> None:
        self._settings = settings
        self._service = service
        self._area = area
        self._group = group
        self._lock = threading.Lock()
        self._token: Token | None = None

    def token(self, transport: Asks) -> Token:
        """:raises InstructionError: ``<area>.auth_failed``; ``<area>.fetch_failed`` when Keystone does not answer."""
        with self._lock:
            if self._token is None or self._token.expires - EARLY_SECONDS < time.time():
                self._token = self._ask(transport)
            return self._token

    def forget(self, token: Token) -> None:
        """It was refused: the next one who asks gets a new one."""
        with self._lock:
            if self._token is token:
                self._token = None

    def _ask(self, transport: Asks) -> Token:
        base = self._settings.auth_url.rstrip("/").removesuffix("/v3")
        status, headers, found = transport.ask("POST", f"{base}/v3/auth/tokens", body={"auth": self._auth()})
        if status in (401, 403, 404):
            raise InstructionError(
                f"{self._area}.auth_failed",
                f"Keystone at {public_url(base)} gives no token (status {status}): see [{self._group}] username and "
                "the rest",
            )
        text = headers.get("X-Subject-Token", "")
        body = found.get("token") if isinstance(found, dict) else None
        if status not in (200, 201) or not 0 < len(text) <= _MAX_TOKEN or not isinstance(body, dict):
            raise InstructionError(
                f"{self._area}.fetch_failed",
                f"Keystone at {public_url(base)} gives no token (status {status}): see its log",
                retryable=True,
            )
        return Token(text, _expires(body.get("expires_at")), self._endpoint(body.get("catalog")))

    def _auth(self) -> dict[str, Any]:
        given = self._settings
        if given.application_credential_id:
            credential = {"id": given.application_credential_id, "secret": given.application_credential_secret}
            return {"identity": {"methods": ["application_credential"], "application_credential": credential}}
        user = {
            "name": given.username,
            "domain": {"name": given.user_domain_name},
            "password": given.password,
        }
        auth: dict[str, Any] = {"identity": {"methods": ["password"], "password": {"user": user}}}
        if given.project_name:
            auth["scope"] = {"project": {"name": given.project_name, "domain": {"name": given.project_domain_name}}}
        return auth

    def _endpoint(self, catalog: object) -> str:
        """The service's URL: the first of the wanted interface and region."""
        for service in catalog if isinstance(catalog, list) else ():
            if not isinstance(service, dict) or service.get("type") != self._service:
                continue
            endpoints = service.get("endpoints")
            for endpoint in endpoints if isinstance(endpoints, list) else ():
                if not isinstance(endpoint, dict) or endpoint.get("interface") != self._settings.interface:
                    continue
                region = endpoint.get("region_id") or endpoint.get("region")
                if self._settings.region in ("", region) and isinstance(endpoint.get("url"), str):
                    return str(endpoint["url"])
        return ""


def _expires(text: object) -> float:
    """Seconds since the epoch; a time that cannot be read is five minutes ahead."""
    try:
        return float(calendar.timegm(time.strptime(str(text)[:19], "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return time.time() + 300
