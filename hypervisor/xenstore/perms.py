"""Node permissions: an owner, a default, and entries for single domains.

Source: ``docs/misc/xenstore.txt`` (SET_PERMS) and https://wiki.xen.org/wiki/XenBus.
The first entry names the owner, who may do everything, and its letter is what
every domain without an entry of its own may do.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from hypervisor.xenstore.errors import Invalid

DOMID_ANY = 0x7FF4
"""Stands for every domain in an entry (XENSTORE_SERVER_FEATURE_DOMID_ANY)."""

PRIVILEGED_DOMID = 0


class Access(enum.IntFlag):
    NONE = 0
    READ = 1
    WRITE = 2
    OWNER = 4


ALL = Access.READ | Access.WRITE | Access.OWNER

_LETTERS = {
    b"n": Access.NONE,
    b"r": Access.READ,
    b"w": Access.WRITE,
    b"b": Access.READ | Access.WRITE,
}
_NAMES = {access: letter.decode() for letter, access in _LETTERS.items()}


class Entry(NamedTuple):
    domid: int
    access: Access


@dataclass(slots=True)
class Who:
    """Who asks. A domain with a target has the target's rights as well (SET_TARGET)."""

    domid: int
    target: int | None = None

    @property
    def privileged(self) -> bool:
        return self.domid == PRIVILEGED_DOMID

    def is_meant(self, domid: int) -> bool:
        return domid == self.domid or domid == self.target or domid == DOMID_ANY


DOM0 = Who(PRIVILEGED_DOMID)


@dataclass(frozen=True, slots=True)
class Acl:
    """A node's permissions; immutable. The first entry is the owner's."""

    entries: tuple[Entry, ...]

    @property
    def owner(self) -> int:
        return self.entries[0].domid

    def allowed(self, who: Who) -> Access:
        """What `who` may do with the node."""
        if who.privileged or who.is_meant(self.entries[0].domid):
            return ALL
        for entry in self.entries[1:]:
            if who.is_meant(entry.domid):
                return entry.access
        return self.entries[0].access

    def readable(self, who: Who) -> bool:
        return bool(self.allowed(who) & Access.READ)

    def owned_by(self, domid: int) -> Acl:
        return Acl((Entry(domid, self.entries[0].access), *self.entries[1:]))

    def without(self, domid: int) -> Acl:
        """The same without the entries (not the ownership) of a domain that is gone."""
        return Acl((self.entries[0], *(e for e in self.entries[1:] if e.domid != domid)))

    def encode(self) -> bytes:
        """The wire form, ``n0\\0r1\\0``."""
        return b"".join(f"{_NAMES[e.access]}{e.domid}".encode() + b"\0" for e in self.entries)

    def __str__(self) -> str:
        return ",".join(f"{_NAMES[e.access]}{e.domid}" for e in self.entries)


def parse(fields: list[bytes]) -> Acl:
    """From strings like ``n0``, ``r1``. :raises Invalid: none at all, or one that is not a letter and a domid."""
    entries = []
    for field in fields:
        letter, digits = field[:1], field[1:]
        if letter not in _LETTERS or not digits.isdigit() or len(digits) > 5 or int(digits) > 0xFFFF:
            raise Invalid(f"{field[:20]!r} is not a permission: give n, r, w or b and a domid")
        entries.append(Entry(int(digits), _LETTERS[letter]))
    if not entries:
        raise Invalid("no permission given: the first one names the owner")
    return Acl(tuple(entries))


def parse_text(text: str) -> Acl:
    """From the form that `str` gives, ``n0,r1``."""
    return parse(text.encode().split(b","))
