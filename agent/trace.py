"""W3C trace context (``traceparent``, ``tracestate``) of the instruction under way. Pure but for one context variable.

The agent records no spans of its own, so what it was given goes on as it is: into log lines, the reply,
notifications, and the instructions that it sends to other agents. What is malformed counts as absent, as
https://www.w3.org/TR/trace-context/ asks for; it never makes an instruction fail.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Mapping
from typing import Any

PARENT, STATE = "traceparent", "tracestate"
NAMES = (PARENT, STATE)
MAX_STATE = 512

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]{0,200})?")
_STATE = re.compile(r"[ -~]{1,512}")

_current: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("trace")
_NONE: Mapping[str, str] = {}


def parent(value: Any) -> str:
    """A ``traceparent`` in the form of version 00, "" for one that is not usable."""
    match = _PARENT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return ""
    version, trace, span, flags, more = match.groups()
    if version == "ff" or not trace.strip("0") or not span.strip("0") or (version == "00" and more is not None):
        return ""
    if version == "00":
        return str(match[0])
    # A later version: what this one knows of it, which is the sampled flag.
    return f"00-{trace}-{span}-0{int(flags, 16) & 1}"


def adopt(*sources: Mapping[str, Any]) -> dict[str, str]:
    """The trace of a message, from the first of its parts that has one; empty when none has."""
    for source in sources:
        found = parent(source.get(PARENT))
        if not found:
            continue
        state = source.get(STATE)
        kept = isinstance(state, str) and _STATE.fullmatch(state) is not None and state.count(",") < 32
        return {PARENT: found, STATE: str(state)} if kept else {PARENT: found}
    return {}


def merged(context: Mapping[str, Any], *sources: Mapping[str, Any]) -> dict[str, Any]:
    """`context` with the trace that it has or else the first of `sources`."""
    rest = {name: value for name, value in context.items() if name not in NAMES}
    return rest | adopt(context, *sources)


def of(context: Mapping[str, Any]) -> dict[str, str]:
    """What of an instruction's context is its trace."""
    return {name: context[name] for name in NAMES if name in context}


def current() -> Mapping[str, str]:
    """The trace of the instruction that this thread works for; empty for none."""
    return _current.get(_NONE)


def enter(trace: Mapping[str, str]) -> contextvars.Token[Mapping[str, str]]:
    return _current.set(trace)


def leave(token: contextvars.Token[Mapping[str, str]]) -> None:
    _current.reset(token)
