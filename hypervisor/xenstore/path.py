"""Path rules of xenstore (``docs/misc/xenstore.txt``, ``XENSTORE_*_PATH_MAX``)."""

from __future__ import annotations

import re

from hypervisor.xenstore.errors import Invalid

ABS_PATH_MAX = 3072
REL_PATH_MAX = 2048

INTRODUCE_DOMAIN = "@introduceDomain"
RELEASE_DOMAIN = "@releaseDomain"

_ALLOWED = re.compile(rb"[-A-Za-z0-9/_@]+\Z")


def domain_path(domid: int) -> str:
    """A domain's home, to which its relative paths belong."""
    return f"/local/domain/{domid}"


def is_relative(raw: bytes) -> bool:
    return raw[:1] not in (b"/", b"@")


def canonical(raw: bytes, home: str, *, special: bool = False) -> str:
    """The absolute form of a path as a client sent it.

    :param home: what a relative path is relative to.
    :param special: whether ``@name`` (special watches) may stand here; it may have any bytes.
    :raises Invalid: a forbidden character, a doubled or trailing slash, empty or too long.
    """
    if special and raw[:1] == b"@":
        if len(raw) > REL_PATH_MAX:
            raise Invalid(f"a special watch path is longer than {REL_PATH_MAX} bytes")
        return raw.decode("latin-1")
    if not _ALLOWED.match(raw):
        raise Invalid("a path is empty or has a character outside A-Z a-z 0-9 - / _ @")
    if raw[:1] == b"@":
        raise Invalid("a special watch path is not allowed here")
    text = raw.decode("ascii")
    relative = is_relative(raw)
    if len(text) > (REL_PATH_MAX if relative else ABS_PATH_MAX):
        raise Invalid(f"a path is longer than {REL_PATH_MAX} (relative) or {ABS_PATH_MAX} (absolute) bytes")
    if relative:
        text = f"{home}/{text}"
    if "//" in text or (text.endswith("/") and text != "/"):
        raise Invalid("a path has a doubled or a trailing slash")
    return text


def parent(path: str) -> str:
    """The parent's path; ``/`` for ``/``, a top-level node and a special one, as xenstored has it."""
    return path[: path.rfind("/")] if path.rfind("/") > 0 else "/"


def basename(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def child(path: str, name: str) -> str:
    return f"/{name}" if path == "/" else f"{path}/{name}"


def levels_below(path: str, ancestor: str) -> int:
    """How many levels `path` lies below `ancestor`; -1 when it does not."""
    if path == ancestor:
        return 0
    if ancestor == "/":
        return path.count("/") if path.startswith("/") else -1
    if path.startswith(ancestor + "/"):
        return path.count("/", len(ancestor))
    return -1
