"""What plugins may ask of the agent itself (`agent.api.Host.control`): its quarantine."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from agent.errors import InstructionError, MessageError

if TYPE_CHECKING:
    from agent.dispatcher import Dispatcher
    from agent.journal import Journal
    from agent.journal.quarantine import Kept


class Control:
    """One agent's. `dispatcher` is set before the first instruction runs."""

    dispatcher: Dispatcher

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def quarantined(self, seq: int | None) -> list[dict[str, Any]]:
        """Every refused message, oldest first; with `seq` that one, with its headers and its body.

        :raises InstructionError: ``quarantine.not_found``.
        """
        if seq is None:
            return [kept.to_json() for kept in self._journal.refused.all()]
        kept = self._kept(seq)
        raw = kept.raw
        try:
            body, encoding = raw.body.decode(), "utf-8"
        except UnicodeDecodeError:
            body, encoding = base64.b64encode(raw.body).decode(), "base64"
        envelope = {
            name: getattr(raw, name) for name in ("content_type", "content_encoding", "correlation_id", "expiration")
        }
        return [{**kept.to_json(), **envelope, "headers": dict(raw.headers), "body": body, "body_encoding": encoding}]

    def retry(self, seq: int) -> dict[str, Any]:
        """Take a refused message in as if it came now; one that is accepted leaves the quarantine with that.

        :returns: ``outcome`` (new, running, replayed, answered) and the ``id`` of the instruction.
        :raises InstructionError: ``quarantine.not_found``, ``quarantine.incomplete``, ``quarantine.refused_again``.
        """
        kept = self._kept(seq)
        if not kept.whole:
            raise InstructionError(
                "quarantine.incomplete",
                f"message {seq} has {kept.raw.size} bytes and was not kept as a whole: have its sender send it again",
            )
        try:
            outcome, ident = self.dispatcher.again(seq, kept.raw, kept.received)
        except MessageError as exc:
            raise InstructionError(
                "quarantine.refused_again", f"message {seq} is still refused ({exc.code}): {exc.message}"
            ) from exc
        except KeyError as exc:
            raise _gone(seq) from exc
        return {"seq": seq, "outcome": outcome, "id": ident}

    def drop(self, seq: int | None) -> int:
        """Forget a refused message, or all of them. :raises InstructionError: ``quarantine.not_found``."""
        count = self._journal.refused.drop(seq)
        if seq is not None and not count:
            raise _gone(seq)
        return count

    def _kept(self, seq: int) -> Kept:
        kept = self._journal.refused.get(seq)
        if kept is None:
            raise _gone(seq)
        return kept


def _gone(seq: int) -> InstructionError:
    return InstructionError(
        "quarantine.not_found",
        f"there is no message {seq} in the quarantine: it was retried or dropped, or was the oldest beyond a limit",
    )
