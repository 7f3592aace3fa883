"""What can go wrong with Placement."""

from __future__ import annotations

from agent.errors import AgentError


class PlacementError(AgentError):
    """Placement cannot be told, or says no: ``PlacementError(code, message, retryable)``.

    Codes: ``placement.unreachable``, ``placement.conflict`` (both retryable), ``placement.auth_failed``,
    ``placement.bad_answer``, ``placement.refused``, ``placement.over_capacity``, ``placement.name_taken``,
    ``placement.no_provider``.
    """

    code = "placement.refused"
    _FATAL = frozenset(("placement.unreachable", "placement.auth_failed", "placement.no_provider"))

    @property
    def fatal(self) -> bool:
        """Whether the next question would fare no better."""
        return self.code in self._FATAL

    def __init__(self, code: str, message: str, retryable: bool = False) -> None:
        super().__init__(message, code=code, retryable=retryable)


class Conflict(PlacementError):
    """Somebody else changed the thing meanwhile: read it again and decide again."""

    def __init__(self, message: str) -> None:
        super().__init__("placement.conflict", message, retryable=True)
