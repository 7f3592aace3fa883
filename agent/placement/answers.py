"""What Placement's answers must look like before anything in them is used. More fields than these may be there."""

from __future__ import annotations

from typing import Any

import jsonschema

from agent.placement.errors import PlacementError

MAX_INT = (1 << 31) - 1
"""Of an amount, by Placement's schema."""
UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
NAME = "^[A-Z0-9_]{1,255}$"
"""Of a resource class, a trait and a consumer type."""

_GENERATION = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string", "maxLength": 255}
_RESOURCES = {
    "type": "object",
    "propertyNames": {"pattern": NAME},
    "additionalProperties": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
}
_COUNT = {"type": "integer", "minimum": 0, "maximum": MAX_INT}


def _object(required: tuple[str, ...], **properties: Any) -> jsonschema.Draft202012Validator:
    schema = {"type": "object", "required": list(required), "properties": properties}
    return jsonschema.Draft202012Validator(schema)


def _map(names: str, values: Any) -> dict[str, Any]:
    return {"type": "object", "propertyNames": {"pattern": names}, "additionalProperties": values}


PROVIDER_ITEM = {
    "type": "object",
    "required": ["uuid", "name", "generation"],
    "properties": {"uuid": {"type": "string", "pattern": UUID}, "name": _TEXT, "generation": _GENERATION},
}
PROVIDER = jsonschema.Draft202012Validator(PROVIDER_ITEM)
PROVIDERS = _object(("resource_providers",), resource_providers={"type": "array", "items": PROVIDER_ITEM})
INVENTORIES = _object(
    ("resource_provider_generation", "inventories"),
    resource_provider_generation=_GENERATION,
    inventories=_map(
        NAME,
        {
            "type": "object",
            "required": ["total"],
            "properties": {
                **{name: _COUNT for name in ("total", "reserved", "min_unit", "max_unit", "step_size")},
                "allocation_ratio": {"type": "number", "minimum": 0},
            },
        },
    ),
)
TRAITS = _object(
    ("resource_provider_generation", "traits"),
    resource_provider_generation=_GENERATION,
    traits={"type": "array", "items": {"type": "string", "pattern": NAME}},
)
AGGREGATES = _object(
    ("resource_provider_generation", "aggregates"),
    resource_provider_generation=_GENERATION,
    aggregates={"type": "array", "items": {"type": "string", "pattern": UUID}},
)
PROVIDER_ALLOCATIONS = _object(
    ("resource_provider_generation", "allocations"),
    resource_provider_generation=_GENERATION,
    allocations=_map(
        UUID,
        {
            "type": "object",
            "required": ["resources", "consumer_generation"],
            "properties": {"resources": _RESOURCES, "consumer_generation": {"type": ["integer", "null"]}},
        },
    ),
)
CONSUMER = _object(
    ("allocations",),
    allocations=_map(UUID, {"type": "object", "required": ["resources"], "properties": {"resources": _RESOURCES}}),
    project_id=_TEXT,
    user_id=_TEXT,
    consumer_generation={"type": ["integer", "null"]},
    consumer_type=_TEXT,
)
# Without any allocation there is no consumer and nothing of it is told.
_WITH_MARKS = ("project_id", "user_id", "consumer_generation", "consumer_type")


def checked(validator: Any, found: object, what: str) -> dict[str, Any]:
    """`found`, if it is as it must be. :raises PlacementError: ``placement.bad_answer``."""
    error = next(validator.iter_errors(found), None)
    if error is not None or not isinstance(found, dict):
        where = "/".join(str(part)[:40] for part in error.absolute_path) if error is not None else ""
        raise PlacementError("placement.bad_answer", f"Placement's answer about {what} makes no sense at {where!r}")
    if validator is CONSUMER and found["allocations"] and any(name not in found for name in _WITH_MARKS):
        raise PlacementError("placement.bad_answer", f"Placement's answer about {what} does not say whose it is")
    return found
