"""JSON Schema (2020-12) of the native messages: one per verb, one for replies, one for reports. Pure.

A message that fits its schema is taken (`agent.wire` and the verb's own checks refuse the rest); the few rules that a
schema cannot say are in the descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import wire
from agent.api import UUID_SCHEMA, Plugin

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_VERSION = "{}.{}".format(*wire.VERSION)
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$"}
_TIME = {"type": "number", "minimum": 0, "description": "Seconds since the epoch."}
_ERROR: Mapping[str, Any] = {
    "type": "object",
    "required": ["code", "message", "retryable", "undone"],
    "properties": {
        "code": {"type": "string", "pattern": "^[a-z_]+\\.[a-z0-9_]+$", "description": "Stable; match on it."},
        "message": {"type": "string", "description": "One line: cause and cure."},
        "retryable": {"type": "boolean", "description": "The same request may succeed later."},
        "undone": {"type": "boolean", "description": "Nothing of the instruction is left in the world."},
    },
}


def instruction(plugin: Plugin) -> dict[str, Any]:
    """The whole message of one verb."""
    args = dict(plugin.args_schema)
    required = ["reeve", "id", "verb", "host"] + (["args"] if args.get("required") else [])
    return {
        "$schema": DRAFT,
        "$id": _id(f"instruction:{plugin.verb}"),
        "title": plugin.verb,
        "description": plugin.summary,
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {
            "reeve": {"const": _VERSION, "description": "Version of this form."},
            "id": {**UUID_SCHEMA, "description": "A new UUID. The same again is the same instruction."},
            "verb": {"const": plugin.verb},
            "host": {**_NAME, "description": "The host it is for; the queue is reeve.<host>."},
            "args": args,
            "reply_to": {"type": ["string", "null"], "pattern": "^$|" + _NAME["pattern"], "description": "A queue."},
            "deadline": {
                "type": ["number", "null"],
                "exclusiveMinimum": 0,
                "maximum": wire.MAX_DEADLINE,
                "description": "Seconds since the epoch; nothing is begun after it, and what was begun is undone.",
            },
            "traceparent": {
                "type": ["string", "null"],
                "description": "W3C trace context; a malformed one is ignored.",
            },
            "tracestate": {"type": ["string", "null"], "description": "W3C trace context, as above."},
        },
    }


def reply() -> dict[str, Any]:
    step = {
        "type": "object",
        "required": ["name", "title", "state", "seconds"],
        "properties": {
            "name": {"type": "string"},
            "title": {"type": "string"},
            "state": {"enum": ["begun", "done", "failed", "undone"]},
            "seconds": {"type": "number", "minimum": 0},
        },
    }
    return {
        "$schema": DRAFT,
        "$id": _id("reply"),
        "title": "reply",
        "type": "object",
        "required": ["reeve", "kind", "ok", "id", "host", "verb", "result", "error", "steps", "accepted", "finished"],
        "properties": {
            "reeve": {"const": _VERSION},
            "kind": {"const": "reply"},
            "ok": {"type": "boolean"},
            "id": {"type": "string", "description": 'The instruction\'s id; "" when it could not be read.'},
            "host": _NAME,
            "verb": {"type": "string"},
            "result": {"type": ["object", "null"], "description": "As the verb says; null when it failed."},
            "error": {"oneOf": [{"type": "null"}, dict(_ERROR)]},
            "steps": {"type": "array", "items": step},
            "accepted": _TIME,
            "finished": _TIME,
            "traceparent": {"type": "string", "description": "As the instruction had it; left out if it had none."},
        },
        "if": {"properties": {"ok": {"const": True}}},
        "then": {"properties": {"error": {"type": "null"}}},
        "else": {"properties": {"error": {"type": "object"}}},
    }


def report() -> dict[str, Any]:
    return {
        "$schema": DRAFT,
        "$id": _id("report"),
        "title": "report",
        "type": "object",
        "required": ["reeve", "kind", "type", "host", "time", "seq", "data"],
        "properties": {
            "reeve": {"const": _VERSION},
            "kind": {"const": "report"},
            "type": {"enum": ["capacity", "lifecycle", "instruction", "progress", "agent"]},
            "host": _NAME,
            "time": _TIME,
            "seq": {"type": "integer", "minimum": 1, "description": "Counts since the agent's start."},
            "data": {"type": "object"},
        },
    }


def everything(plugins: Mapping[str, Plugin]) -> dict[str, Any]:
    """``{"reeve", "instructions": {verb: schema}, "reply", "report"}``."""
    return {
        "reeve": _VERSION,
        "instructions": {name: instruction(plugin) for name, plugin in sorted(plugins.items())},
        "reply": reply(),
        "report": report(),
    }


def _id(what: str) -> str:
    return f"urn:reeve:{_VERSION}:{what}"
