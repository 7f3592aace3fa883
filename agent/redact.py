"""Takes secrets out of what is logged or kept. Pure."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(
    r"token|passw(or)?d|passphrase|secret|credential|private|signature|cookie|(^|[_-])(auth|key|pw)([_-]|$)",
    re.IGNORECASE,
)
_WORDS = ("token", "passw", "passphrase", "secret", "credential", "signature", "cookie", "key", "authorization")
_PAIR = re.compile(
    r"""(?P<name>(?:token|passw(?:or)?d|passphrase|secret|credentials?|signature|cookie|(?:api|private|access)[_-]?key
    |authorization)[\w.-]{0,20}+)
    (?P<is>["']\s{0,9}:\s{0,9}|=|(?<=[Tt]oken):\s{0,9}|(?<=[Aa]uthorization):\s{0,9}|(?<=[Cc]ookie):\s{0,9})
    (?P<value>"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|'(?:[^'\\]|\\.)*+(?:'|\\?\Z)|(?:(?:bearer|basic)\s+)?[^\s,;&"'})\]]+)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""``name=value``, ``"name": "value"``, and the headers that carry secrets. Linear in the text."""
_LOGIN = re.compile(r"(://[^\s/:@]{0,100}):[^\s/@]{1,200}@")


def redact(value: Any) -> Any:
    """A copy of JSON data in which every value whose name suggests a secret is `HIDDEN`."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if _SECRET.search(name) and item not in (None, "") else redact(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [redact(item) for item in value]
    return value


def redact_text(text: str) -> str:
    """Free text, as a log line, without the passwords of URLs and the values of what is called like a secret."""
    if "://" in text and "@" in text:
        text = _LOGIN.sub(rf"\1:{HIDDEN}@", text)
    lowered = text.lower()
    if any(word in lowered for word in _WORDS):  # most lines have none: cheaper than the search
        text = _PAIR.sub(_hidden, text)
    return text


def _hidden(match: re.Match[str]) -> str:
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    return f"{match['name']}{match['is']}{quote}{HIDDEN}{quote}"
