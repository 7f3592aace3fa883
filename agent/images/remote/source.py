"""What an instruction says of an image that is to be fetched. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from agent.errors import InstructionError

HASHES = {"sha256": 64, "sha384": 96, "sha512": 128, "sha3_256": 64, "sha3_384": 96, "sha3_512": 128, "blake2b": 128}
"""Algorithms that count as a proof, with the hexadecimal digits of each."""
DISK_FORMATS = ("raw", "qcow2")
MAX_BYTES = 1 << 50

_COMMON: Mapping[str, Any] = {
    "url": {
        "type": "string",
        "maxLength": 4096,
        "pattern": "^https?://[^\\s\\\\@/?#]+(/[^\\s\\\\#]*)?$",
        "description": "Where it is, without user and password; they would be kept with the instruction.",
    },
    "glance": {
        "type": "string",
        "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
        "description": "Id of an image of the configured Glance; instead of url.",
    },
    "size": {"type": "integer", "minimum": 1, "maximum": MAX_BYTES, "description": "Of the file, bytes."},
    "hash": {
        "type": "object",
        "additionalProperties": False,
        "required": ["algorithm", "value"],
        "properties": {
            "algorithm": {"enum": list(HASHES)},
            "value": {"type": "string", "pattern": "^([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$"},
        },
        "description": "Of the file. Glance's own is compared besides.",
    },
}
_ONE_OF: Mapping[str, Any] = {"oneOf": [{"required": ["url"]}, {"required": ["glance"]}]}
BOOT_SOURCE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": _COMMON,
    **_ONE_OF,
    "description": "A kernel or ramdisk that is fetched: url or glance, hash, size.",
}
DISK_SOURCE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["format"],
    "properties": {
        **_COMMON,
        "format": {"type": "string", "enum": list(DISK_FORMATS), "description": "Of the image; it is never guessed."},
        "mode": {
            "type": "string",
            "enum": ["overlay", "copy"],
            "description": "A qcow2 overlay on the cached image, or a copy; the default is the option disk_mode.",
        },
        "disk_mib": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_BYTES >> 20,
            "description": "Size of the disk, MiB, when it is to be larger than the image's.",
        },
        "delete_on_destroy": {
            "type": "boolean",
            "default": False,
            "description": "Remove the disk when the domain is destroyed by an instruction.",
        },
    },
    **_ONE_OF,
    "description": "An image that is fetched and becomes the disk: url or glance, format, hash, size, mode, disk_mib, "
    "delete_on_destroy.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """:ivar url: of the file, "" when `glance` (an image's id) is given.

    :ivar format: ``raw``, ``qcow2``, ``kernel`` or ``ramdisk``.
    :ivar size: bytes, 0 for any. :ivar algorithm: one of `HASHES`, "" for none; `digest` in hexadecimal.
    """

    format: str
    url: str = ""
    glance: str = ""
    size: int = 0
    algorithm: str = ""
    digest: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any], image_format: str = "") -> Source:
        """:param image_format: what it is for; by default what `data` says.

        :raises InstructionError: it makes no sense.
        """
        if ("url" in data) == ("glance" in data):
            raise InstructionError("instruction.bad_args", "args: a source has exactly one of url and glance")
        given = data.get("hash", {})
        algorithm, digest = given.get("algorithm", ""), given.get("value", "")
        if given and HASHES.get(algorithm) != len(digest):
            raise InstructionError(
                "instruction.bad_args",
                f"args: a hash by {algorithm} has {HASHES.get(algorithm)} hexadecimal digits, this one {len(digest)}",
            )
        url, glance = data.get("url", ""), data.get("glance", "")
        return cls(image_format or data["format"], url, glance, data.get("size", 0), algorithm, digest)

    @property
    def name(self) -> str:
        """For messages: a URL without its query, which may hold a secret."""
        return f"Glance image {self.glance}" if self.glance else public_url(self.url)

    @property
    def key(self) -> str:
        """The same for sources that ask for the same: what concurrent requests are joined by."""
        text = json.dumps(dataclasses.astuple(self))
        return hashlib.sha256(text.encode()).hexdigest()


def public_url(url: str) -> str:
    """A URL that may be logged."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "a URL that cannot be read"
    return f"{parts.scheme}://{host}{parts.path}"[:300]
