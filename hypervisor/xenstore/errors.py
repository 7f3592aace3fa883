"""What a xenstore request can fail with, and the one table to errno names.

The wire carries the *name* of an errno (``xsd_errors`` in Xen's
``public/io/xs_wire.h``), never a number.

::

    XenstoreError            a request fails; the connection goes on
     ├─ Invalid              EINVAL
     ├─ AccessDenied         EACCES
     ├─ NotPermitted         EPERM
     ├─ NotFound             ENOENT
     ├─ AlreadyExists        EEXIST
     ├─ QuotaExceeded        ENOSPC
     ├─ Conflict             EAGAIN   the transaction must be done again
     ├─ Busy                 EBUSY
     ├─ TooBig               E2BIG
     └─ UnknownOperation     ENOSYS
    ProtocolViolation        the byte stream cannot be followed any longer: the connection ends
"""

from __future__ import annotations


class XenstoreError(Exception):
    """A request fails; its sender gets an ERROR reply."""


class Invalid(XenstoreError):
    pass


class AccessDenied(XenstoreError):
    pass


class NotPermitted(XenstoreError):
    pass


class NotFound(XenstoreError):
    pass


class AlreadyExists(XenstoreError):
    pass


class QuotaExceeded(XenstoreError):
    pass


class Conflict(XenstoreError):
    pass


class Busy(XenstoreError):
    pass


class TooBig(XenstoreError):
    pass


class UnknownOperation(XenstoreError):
    pass


class ProtocolViolation(Exception):
    """The peer broke the framing."""


ERRNO_NAMES: dict[type[XenstoreError], bytes] = {
    Invalid: b"EINVAL",
    AccessDenied: b"EACCES",
    NotPermitted: b"EPERM",
    NotFound: b"ENOENT",
    AlreadyExists: b"EEXIST",
    QuotaExceeded: b"ENOSPC",
    Conflict: b"EAGAIN",
    Busy: b"EBUSY",
    TooBig: b"E2BIG",
    UnknownOperation: b"ENOSYS",
    XenstoreError: b"EIO",
}
"""Every exception's errno name; the base class stands for what nobody named."""

_BY_NAME = {name: kind for kind, name in ERRNO_NAMES.items()}


def errno_name(exc: XenstoreError) -> bytes:
    for kind in type(exc).__mro__:
        if kind in ERRNO_NAMES:
            return ERRNO_NAMES[kind]
    return b"EIO"


def from_errno_name(name: bytes, text: str = "") -> XenstoreError:
    """The exception that an ERROR reply stands for."""
    return _BY_NAME.get(name, XenstoreError)(text or name.decode("ascii", "replace"))
