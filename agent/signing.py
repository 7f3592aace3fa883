"""Instructions and replies signed with a shared key: who can write to a queue cannot make or change one without it.

The header ``x-reeve-signature`` of a message is ``v1 TIME MAC``: seconds since the epoch, and the HMAC-SHA256, in hex,
of ``reeve-v1``, a newline, TIME, a newline and the body as it is sent. The body has the instruction's id and host, so a
signature holds for one instruction of one host. Within the window that TIME allows a copy of the message is the
same id again and is not carried out twice; after it the copy is refused.

A reply has the same header, its HMAC over ``reeve-reply-v1``, TIME, the correlation id, each with a newline, and the
body: neither can stand for the other, nor for the reply to another instruction. There is no window: a copy says the
same of the same instruction. What an agent says of a message whose signature it refuses is not signed. Whoever can
write to the queue could otherwise have it said of any instruction's id that it was refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from agent.errors import ConfigError, MessageError
from agent.wire import Raw

HEADER = "x-reeve-signature"
REFUSED = frozenset({"message.unsigned", "message.bad_signature", "message.stale", "message.too_large"})
"""What is said of messages that may not be from who they say: the last one is cut before it could be checked."""
MAX_FILE_BYTES = 65536
_FORM = re.compile(r"v1 ([0-9]{1,12}) ([0-9a-f]{64})")


class Signer:
    """:param keys: the first one signs, any of them is accepted. :param window: seconds, before and after now.

    :param replies: whether replies must be signed.
    """

    def __init__(self, keys: Sequence[bytes], window: float, replies: bool = True) -> None:
        self._keys = tuple(keys)
        self.window = window
        self.replies = replies

    @classmethod
    def load(cls, path: str, window: float, replies: bool = True) -> Signer:
        """From a file with a key a line: 32 bytes or more, in hex. :raises ConfigError: what is wrong with it."""
        try:
            with Path(path).open("rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(MAX_FILE_BYTES)
        except OSError as exc:
            raise ConfigError(f"[signing] key_file: {path} cannot be read: {exc.strerror}") from exc
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"[signing] key_file: others can read or change {path}: chown it to this user, chmod 600")
        lines = text.decode("ascii", "replace").split()
        if not lines or not all(re.fullmatch(r"(?:[0-9a-fA-F]{2}){32,}", line) for line in lines):
            raise ConfigError(
                f"[signing] key_file: {path} has not a key of 32 bytes or more, in hex, on each line: make one with "
                "openssl rand -hex 32"
            )
        return cls([bytes.fromhex(line) for line in lines], window, replies)

    def headers(self, body: bytes) -> dict[str, str]:
        """What goes with a message that is sent now."""
        when = f"{time.time():.0f}"
        return {HEADER: f"v1 {when} {_mac(self._keys[0], _instruction(when, body))}"}

    def reply_headers(self, body: bytes, correlation: str) -> dict[str, str]:
        """What goes with a reply that is sent now; nothing with one that must not be believed."""
        try:
            error = json.loads(body).get("error") or {}
        except (ValueError, AttributeError):
            return {}
        if error.get("code") in REFUSED:
            return {}
        when = f"{time.time():.0f}"
        return {HEADER: f"v1 {when} {_mac(self._keys[0], _reply(when, correlation, body))}"}

    def check_reply(self, body: bytes, correlation: str, given: object) -> None:
        """:param given: the header's value, or None.

        :raises MessageError: ``message.unsigned``, ``message.bad_signature``.
        """
        if given is None:
            raise MessageError("it is not signed: set its host's [signing] key_file", code="message.unsigned")
        found = _FORM.fullmatch(given) if isinstance(given, str) else None
        if found is None or not self._fits(_reply(found[1], correlation, body), found[2]):
            raise MessageError(
                "its signature does not fit: give sender and host the same [signing] key", code="message.bad_signature"
            )

    def check(self, raw: Raw, now: float) -> None:
        """:param now: when the message came, seconds since the epoch.

        :raises MessageError: ``message.unsigned``, ``message.bad_signature``, ``message.stale``.
        """
        given = raw.headers.get(HEADER)
        if given is None:
            raise MessageError(
                "the message is not signed: this host takes only instructions signed with its key ([signing])",
                code="message.unsigned",
            )
        found = _FORM.fullmatch(given) if isinstance(given, str) else None
        if found is None or not self._fits(_instruction(found[1], raw.body), found[2]):
            raise MessageError(
                "the signature does not fit the message: sign the body as it is sent, with this host's key",
                code="message.bad_signature",
            )
        if abs(now - float(found[1])) > self.window:
            raise MessageError(
                f"the message was signed {now - float(found[1]):.0f} s before it came, {self.window:.0f} are allowed: "
                "sign it again, or set the clocks",
                code="message.stale",
            )

    def _fits(self, text: bytes, mac: str) -> bool:
        return any(hmac.compare_digest(_mac(key, text), mac) for key in self._keys)


def _instruction(when: str, body: bytes) -> bytes:
    return b"reeve-v1\n" + when.encode() + b"\n" + body


def _reply(when: str, correlation: str, body: bytes) -> bytes:
    # A body has no newline in it (JSON), so nothing of one can pass for the end of another correlation id.
    return b"reeve-reply-v1\n" + when.encode() + b"\n" + correlation.encode("utf-8", "surrogatepass") + b"\n" + body


def _mac(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()
