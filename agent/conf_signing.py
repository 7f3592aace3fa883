"""The options of the group ``[signing]``: instructions and replies that are signed with a shared key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from agent.errors import ConfigError
from agent.signing import Signer

OPTIONS = (
    cfg.StrOpt(
        "key-file",
        sample_default="/etc/reeve/signing.key",
        help="File, mode 0600, with keys in hex, one a line: openssl rand -hex 32. The first signs, any is accepted. "
        "When it is given, only instructions that are signed are taken; clients of oslo.messaging cannot sign. "
        "Default: instructions are not signed.",
    ),
    cfg.IntOpt(
        "window-seconds",
        default=300,
        min=1,
        help="How long a signature is good, before and after now: also how long an instruction may wait for an agent "
        "that is away. At most half of [journal] keep_seconds.",
    ),
    cfg.BoolOpt(
        "replies",
        default=True,
        help="When key_file is given, take only replies that are signed with one of its keys: of agents and commands "
        "with this configuration. Set it to false while there are agents of a version that does not sign them.",
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class SigningSettings:
    key_file: str
    window_seconds: int
    replies: bool = True

    def signer(self) -> Signer | None:
        """None: nothing is signed. :raises ConfigError: the key file cannot be used."""
        return Signer.load(self.key_file, float(self.window_seconds), self.replies) if self.key_file else None


def settings(values: Mapping[str, Any], keep_seconds: int) -> SigningSettings:
    """:raises ConfigError: an instruction would be forgotten while a copy of it is still good."""
    found = SigningSettings(values["key_file"] or "", values["window_seconds"], values["replies"])
    if found.key_file and 2 * found.window_seconds > keep_seconds:
        raise ConfigError("[signing] window_seconds is more than half of [journal] keep_seconds: make it smaller")
    return found
