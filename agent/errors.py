"""The exceptions of the agent.

::

    AgentError                         has `code` (stable), `retryable` and `message` (one line: cause and cure)
     ├─ MessageError                   a message that is no usable instruction; quarantined, answered where possible
     │    message.too_large, message.too_deep, message.not_json, message.duplicate_key, message.bad_number,
     │    message.missing_field, message.unknown_field, message.bad_field, message.unsupported_version,
     │    message.unsupported_encoding, message.wrong_host, message.unsigned, message.bad_signature, message.stale
     ├─ InstructionError               the instruction was understood and cannot be carried out
     │    instruction.unknown_verb, instruction.bad_args, instruction.expired, instruction.deadline_exceeded,
     │    instruction.id_reused, instruction.outcome_unknown, plugin.failed, plugin.no_agent,
     │    instruction.not_found, instruction.cancelled, lock.not_held, lock.busy,
     │    quarantine.not_found, quarantine.incomplete, quarantine.refused_again, image.not_found, image.invalid,
     │    image.source_refused, image.auth_failed, image.too_large, image.fetch_failed and image.no_room (retryable),
     │    and every code of hypervisor.errors
     ├─ JournalError                   journal.unavailable (retryable), journal.corrupt, journal.newer
     ├─ ConfigError                    agent.config
     ├─ AlreadyRunning                 agent.already_running
     ├─ BrokerError                    broker.unreachable (retryable)
     └─ ReplyTimeout                   reply.timeout (retryable); raised by the client, never sent
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of what the agent raises.

    :ivar code: stable machine-readable name, ``area.reason``.
    :ivar retryable: the same request may succeed later without a change.
    """

    code = "agent.failure"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


class MessageError(AgentError):
    code = "message.bad_field"


class InstructionError(AgentError):
    """What a plugin or step raises to refuse or fail an instruction: ``InstructionError(code, message, retryable)``."""

    code = "instruction.failed"

    def __init__(self, code: str, message: str, retryable: bool = False) -> None:
        super().__init__(message, code=code, retryable=retryable)


class JournalError(AgentError):
    code = "journal.unavailable"
    retryable = True


class JournalCorrupt(JournalError):
    code = "journal.corrupt"
    retryable = False


class JournalNewer(JournalError):
    code = "journal.newer"
    retryable = False


class ConfigError(AgentError):
    code = "agent.config"


class AlreadyRunning(AgentError):
    code = "agent.already_running"


class BrokerError(AgentError):
    code = "broker.unreachable"
    retryable = True


class ReplyTimeout(AgentError):
    code = "reply.timeout"
    retryable = True
