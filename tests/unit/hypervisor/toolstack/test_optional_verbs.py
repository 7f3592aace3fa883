"""A driver that does not override a verb refuses it, naming what it lacks, and has none of what it would list."""

from __future__ import annotations

import pytest

from hypervisor.errors import TemplateNotFound, Unsupported
from hypervisor.toolstack.api import DomainSpec, KernelBoot, Toolstack
from hypervisor.toolstack.drivers._optional import OptionalVerbs

UUID = "00000000-0000-4000-8000-000000000000"
ALWAYS = {
    "capabilities", "host_info", "list_domains", "get_domain", "get_spec", "create", "unpause", "pause", "shutdown",
    "reboot", "reset", "destroy", "wait", "console_log", "open_console", "subscribe", "close", "name",
}  # fmt: skip
"""What no driver may lack."""


class Bare(OptionalVerbs):
    name = "bare"


def test_every_verb_that_may_be_lacking_is_there() -> None:
    verbs = {name for name in dir(Toolstack) if not name.startswith("_")}
    assert verbs - ALWAYS <= set(dir(Bare))


def test_templates_are_refused() -> None:
    bare = Bare()
    assert bare.template_list() == []
    for look in (bare.template_get, bare.template_remove):
        with pytest.raises(TemplateNotFound, match="bare driver"):
            look("web")
    with pytest.raises(Unsupported, match="templates"):
        bare.template_create(UUID, "web", ident="x")
    with pytest.raises(Unsupported, match="templates"):
        bare.clone("web", DomainSpec(UUID, "web", KernelBoot("/kernel"), 64))
