"""JSON Schemas of arguments that several verbs take. Part of `agent.api`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.images.remote.source import BOOT_SOURCE_SCHEMA, DISK_SOURCE_SCHEMA
from hypervisor.toolstack.devices import MAX_NICS, DiskFormat

UUID_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "description": "The domain's UUID, in canonical lower-case form.",
}
ONE_DOMAIN_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["uuid"],
    "properties": {"uuid": UUID_SCHEMA},
}
"""Arguments of a verb that takes a domain and nothing else."""
NAME_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
    "description": "1 to 63 letters, digits, '.', '_' or '-', a letter or digit first.",
}
PATH_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^/[^\\u0000-\\u001f]{0,4094}$",
    "description": "Full path of a file on the host.",
}
FILE_SCHEMA: Mapping[str, Any] = {
    "if": {"type": "string"},
    "then": PATH_SCHEMA,
    "else": BOOT_SOURCE_SCHEMA,
    "description": "Full path of a file on the host, or an object that says where it is fetched from.",
}
METADATA_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "maxProperties": 64,
    "propertyNames": {"pattern": "^(?!reeve\\.)[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
    "additionalProperties": {"type": "string", "maxLength": 1024},
    "description": "Kept with the domain. Names that begin with 'reeve.' are the agent's own.",
}
WAIT_SCHEMA: Mapping[str, Any] = {
    "type": "number",
    "minimum": 0,
    "maximum": 3600,
    "default": 60,
    "description": "Seconds to wait until it has happened; 0 returns once the guest is asked.",
}

DEVICE_WAIT_SCHEMA: Mapping[str, Any] = {
    **WAIT_SCHEMA,
    "default": 10,
    "description": "Seconds to wait until the guest has taken it up; one that has not by then is no failure.",
}
MAX_MEMORY_MIB = 1 << 24
_LIMITS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "bytes_per_second": {"type": "integer", "minimum": 0, "maximum": (1 << 48) - 1},
        "iops": {"type": "integer", "minimum": 0, "maximum": (1 << 48) - 1},
        "burst_seconds": {"type": "number", "minimum": 0, "maximum": 3600},
    },
}
DISK_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id"],
    "properties": {
        "id": {"type": "string", "pattern": "^xvd[a-p]$"},
        "path": PATH_SCHEMA,
        "source": DISK_SOURCE_SCHEMA,
        "format": {"type": "string", "enum": [item.value for item in DiskFormat], "default": "raw"},
        "readonly": {"type": "boolean", "default": False},
        "direct": {"type": "boolean", "default": False},
        "discard": {"type": "boolean", "default": True},
        "shared": {"type": "boolean", "default": False},
        "limits": _LIMITS_SCHEMA,
    },
    "oneOf": [{"required": ["path"]}, {"required": ["source"], "not": {"required": ["format"]}}],
    "description": "A disk: id, path or source, and perhaps format, readonly, direct, discard, shared, limits.",
}
"""JSON form of a `hypervisor.toolstack.devices.DiskSpec`, where `source` may stand for `path` and `format`."""
NIC_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": MAX_NICS - 1},
        "mac": {"type": "string", "pattern": "^[0-9a-f]{2}(:[0-9a-f]{2}){5}$"},
        "network": NAME_SCHEMA,
        "addresses": {"type": "array", "maxItems": 64, "items": {"type": "string", "maxLength": 45}},
        "queues": {"type": "integer", "minimum": 1, "maximum": 8},
        "limits": _LIMITS_SCHEMA,
    },
    "description": "A nic: id, mac (one is made when it is left out), network, addresses, queues, limits.",
}
"""JSON form of a `hypervisor.toolstack.devices.NicSpec`, where `id` and `mac` may be left out."""
