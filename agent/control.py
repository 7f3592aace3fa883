"""What plugins may ask of the agent itself (`agent.api.Host.control`): locks, ends of instructions, its quarantine."""

from __future__ import annotations

import base64
import logging
from typing import TYPE_CHECKING, Any

from agent.errors import InstructionError, MessageError
from agent.journal import StepState

if TYPE_CHECKING:
    from agent.dispatcher import Dispatcher
    from agent.journal import Journal
    from agent.journal.quarantine import Kept

LOG = logging.getLogger(__name__)


class Control:
    """One agent's. `dispatcher` is set before the first instruction runs."""

    dispatcher: Dispatcher

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def cancel(self, ident: str) -> None:
        """Have an instruction end. One that is queued ends now, as ``instruction.cancelled``.

        One that runs gives way at its next step, or where it waits, and is undone; past its point of no return it
        goes on. That it was cancelled survives the agent. No effect on one that has ended.

        :raises InstructionError: ``instruction.not_found``.
        """
        if self._journal.entry(ident) is None:
            raise InstructionError(
                "instruction.not_found",
                f"no instruction {ident} is known here: it was never accepted, or it ended too long ago",
            )
        self._journal.cancel(ident)
        if not self.dispatcher.cancel_queued(ident):
            self.dispatcher.cancel_running(ident)

    def progress(self, ident: str) -> dict[str, Any]:
        """How far an instruction is: ``state`` (one of `agent.journal.Phase`), ``ended``, ``error``, and its ``steps``.

        ``step`` is the one that is under way, "" for none.
        """
        reply = self._journal.outcome(ident)
        entry = self._journal.entry(ident)
        if entry is None:
            return {"id": ident, "ended": True, "state": "", "verb": "", "error": None, "steps": [], "step": ""}
        under_way = [step.name for step in entry.steps if step.state is StepState.BEGUN and reply is None]
        return {
            "id": ident,
            "verb": entry.instruction.verb,
            "state": entry.phase.value,
            "ended": reply is not None,
            "error": None if reply is None else reply.error,
            "step": under_way[-1] if under_way else "",
            "steps": [{"name": step.name, "state": step.state.value} for step in entry.steps],
        }

    def locks(self) -> list[dict[str, Any]]:
        """Every domain's lock that is held, the oldest first, with the verb of its holder and the step under way."""
        found = self.dispatcher.queues.locks()
        for lock in found:
            about = self.progress(lock["instruction"])
            lock |= {"verb": about["verb"], "step": about["step"]}
        return found

    def break_lock(self, domain: str, *, force: bool) -> dict[str, Any]:
        """Take a domain's lock from its holder; see `agent.locks.Queues.break_lock`.

        :raises InstructionError: ``lock.not_held``; ``lock.busy``: its holder works, and `force` was not given or
            would be of no use.
        """
        lock = self.dispatcher.queues.break_lock(domain, force=force)
        if lock is None:
            raise InstructionError("lock.not_held", f"domain {domain} has no lock: nothing waits for it")
        owner = lock["instruction"]
        if not lock["broken"]:
            cure = f"`reeve cancel {owner}` ends it in order"
            if lock["state"] == "running":
                cure += ", force lets the next one begin beside it"
            raise InstructionError(
                "lock.busy", f"instruction {owner} ({lock['state']} for {lock['seconds']:.0f} s) has the lock: {cure}"
            )
        if lock["state"] == "running":
            happens = f"{owner} goes on, and does not hold up others of this domain any more"
        else:
            happens = f"whoever carried {owner} out is gone: it resumes at the agent's next start"
        LOG.warning("the lock of domain %s was broken: %s; next: %s", domain, happens, lock["next"] or "nobody")
        return lock | {"happens": happens}

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
