"""What is known of a template: a domain that suspended itself, from which others begin. Part of `toolstack.api`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.spec import MAX_NAME, DomainSpec

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclasses.dataclass(frozen=True, slots=True)
class TemplateInfo:
    """
    :ivar ident: UUID that whoever had it made gave it; another template of the same name has another.
    :ivar spec: of the domain it was made from, with the sizes it had then: what begins from it has the same.
    :ivar bits: the guest's word size. :ivar pages: with data.
    :ivar bytes: that it takes on disk.
    :ivar created_at: seconds since the epoch.
    :ivar downtime_ms: how long the guest stood still, 0 when its domain went.
    :ivar users: UUIDs of the domains that run on its memory; as long as there are any it cannot be removed.
    """

    name: str
    ident: str
    spec: DomainSpec
    bits: int = 64
    pages: int = 0
    bytes: int = 0
    created_at: float = 0.0
    downtime_ms: float = 0.0
    users: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "spec": self.spec.to_json(), "users": list(self.users)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TemplateInfo:
        """:raises SpecInvalid: for a missing, unknown or ill-typed field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, data)) - known):
            raise SpecInvalid(f"template: unknown field {unknown[0][:60]!r}: known are {', '.join(sorted(known))}")
        try:
            fields = dict(data)
            fields["spec"] = DomainSpec.from_json(dict(fields["spec"]))
            fields["users"] = tuple(map(str, fields.get("users", ())))
            made = cls(**fields)
        except (KeyError, TypeError, ValueError) as exc:
            raise SpecInvalid(f"template is not usable: {exc}") from exc
        numbers = (made.bits, made.pages, made.bytes, made.created_at, made.downtime_ms)
        if not all(isinstance(value, int | float) and value >= 0 for value in numbers):
            raise SpecInvalid("template: a number is none")
        check_template_name(made.name)
        return made


def check_template_name(name: str) -> None:
    """:raises SpecInvalid: not usable; it is the name of a folder."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not set(name) <= _NAME or not name[0].isalnum():
        raise SpecInvalid(
            f"template name {str(name)[:80]!r} is not usable: give 1 to {MAX_NAME} letters, digits, '.', '_' or '-',"
            " letter or digit first"
        )


def check_template_ident(ident: str) -> None:
    """:raises SpecInvalid: not usable."""
    if not isinstance(ident, str) or not 0 < len(ident) <= MAX_NAME or not set(ident) <= _NAME:
        raise SpecInvalid(f"template ident {str(ident)[:80]!r} is not usable: give a UUID")


def check_begins(spec: DomainSpec, template: TemplateInfo) -> None:
    """Whether a domain of that spec can begin from a template.

    :raises SpecInvalid: other sizes, or a device of the template's guest is missing.
    """
    known = template.spec
    for name in ("type", "vcpus", "memory_mib"):
        if getattr(spec, name) != getattr(known, name):
            raise SpecInvalid(
                f"{name} is {getattr(spec, name)}, but the guest of template {template.name} has"
                f" {getattr(known, name)}: give that, and resize the domain afterwards"
            )
    for name in ("max_vcpus", "max_memory_mib"):
        if getattr(spec, f"effective_{name}") != getattr(known, f"effective_{name}"):
            raise SpecInvalid(
                f"{name} is {getattr(spec, f'effective_{name}')}, but the guest of template {template.name} was started"
                f" with {getattr(known, f'effective_{name}')}: give that"
            )
    for kind in ("disks", "nics"):
        there = {device.id for device in getattr(spec, kind)}
        if missing := [str(device.id) for device in getattr(known, kind) if device.id not in there]:
            raise SpecInvalid(
                f"{kind}: the guest of template {template.name} uses {', '.join(missing)}: give a device of that id"
            )
