"""Plugins and drivers, found by stevedore. A broken plugin is reported and left out; the agent goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import stevedore
from jsonschema.validators import extend

from agent.api import API_VERSION, InstructionError, Plugin
from agent.errors import ConfigError
from hypervisor.toolstack import drivers
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)

INSTRUCTIONS = "reeve.instructions"


def _is_integer(_checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    # Python's "$" also matches before a last newline; a schema's does not.
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


_Strict = extend(
    jsonschema.Draft202012Validator,
    {"pattern": _pattern},
    # JSON Schema takes 1.0 for an integer; a driver would not.
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Verb:
    """A plugin that may be called, with its compiled schema."""

    plugin: Plugin
    validator: Any

    @classmethod
    def of(cls, plugin: Plugin) -> Verb:
        """:raises ValueError: what is wrong with the plugin."""
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", plugin.verb):
            raise ValueError(f"verb {plugin.verb!r} is not lower-case letters, digits, '_' or '-'")
        if plugin.api_version[0] != API_VERSION[0]:
            raise ValueError(f"it is written for plugin API {plugin.api_version}, this agent has {API_VERSION}")
        names = [kind.name for kind in plugin.step_kinds]
        if len(set(names)) != len(names):
            raise ValueError("two of its steps have one name")
        try:
            _Strict.check_schema(dict(plugin.args_schema))
        except jsonschema.SchemaError as exc:
            raise ValueError(f"args_schema is no JSON Schema: {exc.message}") from exc
        return cls(plugin, _Strict(dict(plugin.args_schema)))

    def check(self, args: Mapping[str, Any]) -> None:
        """:raises InstructionError: ``instruction.bad_args``, naming the field."""
        error = jsonschema.exceptions.best_match(self.validator.iter_errors(dict(args)))
        if error is None:
            return
        where = ".".join(["args", *(str(part) for part in error.absolute_path)])
        # The value comes first, what is wrong with it last.
        text = error.message
        message = text if len(text) <= 200 else f"{text[:100]}…{text[-99:]}"
        known = ", ".join(sorted(self.plugin.args_schema.get("properties", {}))) or "none"
        raise InstructionError(
            "instruction.bad_args", f"{where}: {message} (arguments of {self.plugin.verb!r}: {known})"
        )


def load_verbs(namespace: str = INSTRUCTIONS) -> tuple[dict[str, Verb], dict[str, str]]:
    """(verbs by name, why each broken plugin was left out by entry-point name)."""
    broken: dict[str, str] = {}

    def failed(_manager: object, entry_point: importlib.metadata.EntryPoint, exc: BaseException) -> None:
        broken[entry_point.name] = f"cannot be imported: {exc!r}"

    manager = stevedore.ExtensionManager(namespace, invoke_on_load=True, on_load_failure_callback=failed)
    verbs: dict[str, Verb] = {}
    for extension in sorted(manager, key=lambda ext: ext.entry_point_target):
        name = extension.name
        try:
            if not isinstance(extension.obj, Plugin):
                raise TypeError(f"{extension.entry_point_target} is no agent.api.Plugin")
            if extension.obj.verb != name:
                raise ValueError(f"the entry point {name!r} leads to the verb {extension.obj.verb!r}")
            if name in verbs:
                raise ValueError(f"the verb {name!r} is given twice")
            verbs[name] = Verb.of(extension.obj)
        except (TypeError, ValueError, AttributeError) as exc:
            broken[name] = str(exc)
    for name, why in sorted(broken.items()):
        LOG.error("plugin %s left out: %s", name, why)
    return verbs, broken


def load_driver(name: str, settings: Mapping[str, str]) -> Toolstack:
    """Connect the driver `name`. What is wrong with the name alone is the configuration's fault.

    :raises ConfigError: there is no such driver.
    :raises ToolstackError: it refuses its settings or cannot reach the host.
    """
    known = drivers.names()
    if name not in known:
        raise ConfigError(f"driver {name!r} is not installed: give [driver] name one of {', '.join(known) or 'none'}")
    return drivers.load(name, settings)
