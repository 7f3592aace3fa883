"""A fetcher with short times, in a folder of its own, that may ask servers of this machine."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))

from agent.conf_images import ImageSettings
from agent.images.remote.cache import Entry
from agent.images.remote.fetcher import Fetcher, simple_wait
from agent.images.remote.source import Source

DATA = random.Random(1).randbytes(200 * 1024)


def fetcher(folder: Path, **changes: Any) -> Fetcher:
    given: dict[str, Any] = {
        "allowed_schemes": ("http",),
        "allowed_networks": (ipaddress.ip_network("127.0.0.1/32"),),
        "connect_seconds": 5.0,
        "answer_seconds": 0.4,
        "stall_seconds": 0.3,
        "min_bytes_per_second": 65536,
        "fetch_seconds": 20.0,
        "retries": 1,
    }
    settings = ImageSettings(cache_dir=folder / "cache", disk_dir=folder / "guests", **(given | changes))
    made = Fetcher(settings)
    made.prepare()
    return made


def source(url: str, data: bytes = DATA, image_format: str = "raw", **fields: Any) -> Source:
    """With the hash of `data`; `hash` None leaves it out."""
    given: dict[str, Any] = {"url": url, "hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}}
    given |= fields
    return Source.from_json({key: value for key, value in given.items() if value is not None}, image_format)


def fetch(made: Fetcher, wanted: Source, holder: str = "") -> Entry:
    entry: Entry = made.fetch(wanted, holder, simple_wait)
    return entry


def leftovers(made: Fetcher) -> list[str]:
    return sorted(path.name for path in made.cache.partial.iterdir() if not path.name.startswith("lock"))


def qcow2(
    size: int = 1 << 20,
    *,
    version: int = 3,
    incompatible: int = 0,
    backing: bytes = b"",
    crypt: int = 0,
    extensions: bytes = bytes(8),
    bits: int = 16,
    l1_entries: int = 0,
) -> bytes:
    """An empty disk's image, as QEMU would take it if nothing were changed."""
    cluster = 1 << bits
    entries = l1_entries or max(1, -(-size // (cluster * (cluster // 8))))
    at = 400 if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        at,
        len(backing),
        bits,
        size,
        crypt,
        entries,
        3 * cluster,
        cluster,
        1,
        0,
        0,
    )
    head += struct.pack(">QQQII", incompatible, 0, 0, 4, 104) + extensions
    if backing:
        head = head.ljust(400, b"\0") + backing
    table = struct.pack(">Q", 2 * cluster).ljust(cluster, b"\0")
    counts = struct.pack(">4H", 1, 1, 1, 1).ljust(cluster, b"\0")
    return head.ljust(cluster, b"\0") + table + counts + bytes(-(-entries * 8 // cluster) * cluster)
