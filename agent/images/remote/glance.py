"""What Glance v2 says of an image, and where its data are.

Source: Glance's API reference v2. The data of an image never change once it is active, so that its id and its hash
are as good as a validator of HTTP.
"""

from __future__ import annotations

import re
from typing import Any

from agent.conf_images import ImageSettings
from agent.errors import InstructionError
from agent.images.remote.download import Wanted
from agent.images.remote.policy import Policy
from agent.images.remote.source import HASHES, Source
from agent.images.remote.transport import Transport
from agent.keystone import Keystone, Token

# What Glance may call an image that is asked for as one of ours. It does not know ramdisks and kernels well.
_NAMES = {
    "raw": ("raw",),
    "qcow2": ("qcow2",),
    "kernel": ("aki", "raw", None),
    "ramdisk": ("ari", "raw", None),
}
_HEX = re.compile(r"[0-9a-f]{32,128}")


class Glance:
    """For any thread."""

    def __init__(self, settings: ImageSettings, policy: Policy) -> None:
        self._settings = settings
        self._policy = policy
        self._keystone = Keystone(settings) if settings.auth_url else None

    def locate(self, source: Source, transport: Transport) -> Wanted:
        """:raises InstructionError: ``image.not_found``, ``image.invalid`` (it is another than was said),
        ``image.auth_failed``, ``image.fetch_failed``.
        """
        for attempt in range(2):
            token = self._keystone.token(transport) if self._keystone else None
            base = self._base(token)
            headers = {"X-Auth-Token": token.text} if token else {}
            status, _, found = transport.ask("GET", f"{base}/v2/images/{source.glance}", headers)
            if status == 401 and token is not None and self._keystone is not None and attempt == 0:
                self._keystone.forget(token)  # revoked before its time
                continue
            break
        _check_status(source, status)
        if not isinstance(found, dict) or found.get("id") != source.glance:
            raise InstructionError("image.fetch_failed", f"{source.name}: Glance's answer makes no sense: see its log")
        return _wanted(source, found, f"{base}/v2/images/{source.glance}/file", headers)

    def _base(self, token: Token | None) -> str:
        url = self._settings.glance_url or (token.endpoint if token else "")
        if not url:
            raise InstructionError(
                "image.source_refused",
                "no Glance is known: set [images] glance_url, or auth_url of a Keystone whose catalogue has it",
            )
        self._policy.trust(url)
        return url.rstrip("/").removesuffix("/v2")


def _check_status(source: Source, status: int) -> None:
    if status == 200:
        return
    if status == 404:
        raise InstructionError("image.not_found", f"{source.name} is not there, or not for us: give another id")
    if status in (401, 403):
        raise InstructionError("image.auth_failed", f"{source.name}: refused (status {status}): see [images] auth_url")
    raise InstructionError("image.fetch_failed", f"{source.name}: Glance's status is {status}", retryable=status >= 500)


def _wanted(source: Source, found: dict[str, Any], url: str, headers: dict[str, str]) -> Wanted:
    if found.get("status") != "active":
        text = f"{source.name} is {str(found.get('status'))[:40]!r}, not active: wait, or give another"
        raise InstructionError(
            "image.invalid", text, retryable=found.get("status") in ("queued", "saving", "importing")
        )
    name = found.get("disk_format")
    if name not in _NAMES[source.format] or found.get("container_format") not in ("bare", "aki", "ari", None):
        what = f"{name} in {found.get('container_format')}"[:80]
        raise InstructionError("image.invalid", f"{source.name} is {what}, not {source.format}: give its own format")
    size = found.get("size")
    size = size if type(size) is int and size > 0 else 0
    if source.size and size and source.size != size:
        raise InstructionError("image.invalid", f"{source.name} has {size} bytes, not {source.size}: give another")
    hashes = {}
    algorithm, value = found.get("os_hash_algo"), found.get("os_hash_value")
    if algorithm in HASHES and isinstance(value, str) and _HEX.fullmatch(value):
        hashes[str(algorithm)] = value
    elif isinstance(found.get("checksum"), str) and _HEX.fullmatch(found["checksum"]):
        hashes["md5"] = found["checksum"]
    if source.algorithm:
        if hashes.get(source.algorithm, source.digest) != source.digest:
            raise InstructionError(
                "image.invalid", f"{source.name} has another {source.algorithm} than was said: give another"
            )
        hashes[source.algorithm] = source.digest
    return Wanted(source.name, url, source.format, source.size or size, hashes, headers, immutable=True)
