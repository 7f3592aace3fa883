"""Who asks Placement, and where it is: nobody, a token of the configuration, or a user of Keystone."""

from __future__ import annotations

from typing import Protocol

from agent.conf_keystone import KeystoneSettings
from agent.errors import InstructionError
from agent.keystone import Asks, Keystone, Token
from agent.placement.errors import PlacementError

SERVICE = "placement"


class Auth(Protocol):
    def headers(self, http: Asks) -> dict[str, str]:
        """What proves who we are. :raises PlacementError: ``placement.auth_failed``, ``placement.unreachable``."""

    def endpoint(self, http: Asks) -> str:
        """Placement's URL, "" when this does not know it. :raises PlacementError: as above."""

    def refused(self) -> bool:
        """What was given last is not taken any more; whether it is worth another attempt."""


class FixedAuth:
    """:param token: "" for none; with Placement's ``auth_strategy = noauth2`` it is ``admin``."""

    def __init__(self, token: str = "") -> None:
        self._token = token

    def headers(self, http: Asks) -> dict[str, str]:
        return {"X-Auth-Token": self._token} if self._token else {}

    def endpoint(self, http: Asks) -> str:
        return ""

    def refused(self) -> bool:
        return False


class KeystoneAuth:
    def __init__(self, credentials: KeystoneSettings) -> None:
        self._keystone = Keystone(credentials, service=SERVICE, area="placement", group="placement")
        self._last: Token | None = None

    def headers(self, http: Asks) -> dict[str, str]:
        return {"X-Auth-Token": self._token(http).text}

    def endpoint(self, http: Asks) -> str:
        return self._token(http).endpoint

    def refused(self) -> bool:
        if self._last is None:
            return False
        self._keystone.forget(self._last)
        return True

    def _token(self, http: Asks) -> Token:
        try:
            self._last = self._keystone.token(http)
        except InstructionError as exc:
            denied = exc.code == "placement.auth_failed"
            code = "placement.auth_failed" if denied else "placement.unreachable"
            raise PlacementError(code, exc.message, retryable=not denied) from exc
        return self._last
