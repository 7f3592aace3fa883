"""The options of the group ``[quarantine]``: how much is kept of messages that were refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from agent.journal.quarantine import Limits

OPTIONS = (
    cfg.IntOpt(
        "max-messages", default=1000, min=1, max=100000, help="Refused messages kept; beyond it the oldest is dropped."
    ),
    cfg.IntOpt(
        "max-mib", default=64, min=1, max=65536, help="MiB of them kept in all; beyond it the oldest are dropped."
    ),
    cfg.IntOpt("keep-seconds", default=30 * 86400, min=0, help="How long one is kept; 0: until there are too many."),
)


def settings(values: Mapping[str, Any], max_message_bytes: int) -> Limits:
    return Limits(values["max_messages"], values["max_mib"] << 20, float(values["keep_seconds"]), max_message_bytes)
