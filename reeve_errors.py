"""The failures of Reeve's verbs as exceptions, for clients of oslo.messaging: this one file, nothing else, is needed.

Put it where the client can import it and allow it, then a failed call raises the class of its error code::

    transport = oslo_messaging.get_rpc_transport(conf, allowed_remote_exmods=["reeve_errors"])
    try:
        client.call(context, "show", uuid=uuid)
    except reeve_errors.DomainNotFound as exc:      # code "domain.not_found"
        ...
    except reeve_errors.ReeveError as exc:
        if exc.retryable: ...

A class is named after its code, and its base after the code's first word (``DomainError``). What a newer agent
raises and this file does not know is a `ReeveError`. Without this file the client raises ``RemoteError``, whose
``exc_type`` is the class's name.
"""

from __future__ import annotations

import re
from typing import Any

CODES = (
    "message.not_json", "message.too_large", "message.too_deep", "message.duplicate_key", "message.bad_number",
    "message.unsupported_encoding", "message.missing_field", "message.unknown_field", "message.bad_field",
    "message.unsupported_version", "message.wrong_host",
    "instruction.unknown_verb", "instruction.bad_args", "instruction.id_reused", "instruction.expired",
    "instruction.deadline_exceeded", "instruction.outcome_unknown",
    "plugin.failed",
    "image.not_found", "image.invalid", "image.in_use", "image.source_refused", "image.auth_failed",
    "image.fetch_failed", "image.too_large", "image.no_room",
    "device.not_found", "device.exists",
    "resize.pending", "resize.none_pending",
    "network.unknown",
    "domain.spec_invalid", "domain.uuid_in_use", "domain.name_in_use", "domain.not_found", "domain.not_ours",
    "domain.wrong_state", "domain.memory_too_small", "domain.timeout",
    "kernel.invalid", "kernel.no_xen_notes", "kernel.pvh_only",
    "ramdisk.invalid",
    "host.insufficient_memory", "host.insufficient_vcpus", "host.unavailable", "host.failure",
    "driver.unsupported",
    "stream.invalid", "stream.unsupported", "cpu.incompatible",
    "template.not_found", "template.exists", "template.in_use",
    "migration.not_found", "migration.refused", "migration.not_transparent", "migration.failed",
    "migration.cancelled", "migration.unresolved",
    "protocol.invalid",
)  # fmt: skip


class ReeveError(Exception):
    """An instruction was not carried out.

    :ivar code: stable, for programs.
    :ivar retryable: the same call may succeed later without a change.
    :ivar undone: nothing of the instruction is left in the world.
    :ivar host: the agent that answered, `instruction` the id it knows the call by.
    """

    code = "agent.failure"

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        retryable: bool = False,
        undone: bool = False,
        host: str = "",
        instruction: str = "",
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.retryable = retryable
        self.undone = undone
        self.host = host
        self.instruction = instruction
        # oslo.messaging sends an exception on with these.
        self.kwargs = {"code": self.code, "retryable": retryable, "undone": undone, "host": host}
        self.kwargs |= {"instruction": instruction, **more}


def class_name(code: str) -> str:
    return "".join(word.capitalize() for word in code.replace(".", "_").split("_"))


def _make(name: str, base: type[ReeveError], text: str, **values: Any) -> type[ReeveError]:
    made = type(name, (base,), {"__doc__": text, "__module__": __name__, **values})
    globals()[name] = made
    return made


for _area in dict.fromkeys(code.partition(".")[0] for code in CODES):
    _base = _make(f"{_area.capitalize()}Error", ReeveError, f"Codes ``{_area}.…``.")
    for _code in CODES:
        if _code.partition(".")[0] == _area:
            _make(class_name(_code), _base, f"Code ``{_code}``.", code=_code)


def __getattr__(name: str) -> type[ReeveError]:
    """The class of a code that came after this file."""
    if re.fullmatch(r"(?:[A-Z][a-z0-9]*){2,}", name):
        return ReeveError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
