"""Plugins and drivers, found by stevedore. A broken plugin is reported and left out; the agent goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import stevedore
from jsonschema.validators import extend

from agent import conf_plugins
from agent.api import API_VERSION, InstructionError, Plugin, Step
from agent.errors import ConfigError
from hypervisor.toolstack import drivers
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)

INSTRUCTIONS = "reeve.instructions"
OURS = "plugins."
LANES = ("work", "quick", "drain")


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


def check_version(version: object) -> None:
    """Whether what was written for this version of `agent.api` runs here. :raises ValueError: it does not."""
    if not (isinstance(version, tuple) and len(version) == 2 and all(type(number) is int for number in version)):
        raise ValueError(f"api_version {version!r} is no (major, minor)")
    major, minor = version
    if major == API_VERSION[0] and minor <= API_VERSION[1]:
        return
    has = ".".join(map(str, API_VERSION))
    cure = "upgrade the agent" if version > API_VERSION else "upgrade the plugin"
    raise ValueError(f"it is written for plugin API {major}.{minor}, this agent has {has}: {cure}")


@dataclasses.dataclass(frozen=True, slots=True)
class Verb:
    """A plugin that may be called, with its compiled schema and the values of its options."""

    plugin: Plugin
    validator: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, plugin: Plugin, files: Sequence[str] = ()) -> Verb:
        """:raises ValueError: what is wrong with the plugin. :raises ConfigError: with the values of its options."""
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", plugin.verb):
            raise ValueError(f"verb {plugin.verb!r} is not lower-case letters, digits, '_' or '-'")
        check_version(plugin.api_version)
        if plugin.lane not in LANES:
            raise ValueError(f"lane {plugin.lane!r} is none of {', '.join(LANES)}")
        if not all(isinstance(kind, type) and issubclass(kind, Step) for kind in plugin.step_kinds):
            raise ValueError("its step_kinds are not all classes of agent.api.Step")
        names = [kind.name for kind in plugin.step_kinds]
        if len(set(names)) != len(names):
            raise ValueError("two of its steps have one name")
        try:
            _Strict.check_schema(dict(plugin.args_schema))
        except jsonschema.SchemaError as exc:
            raise ValueError(f"args_schema is no JSON Schema: {exc.message}") from exc
        return cls(plugin, _Strict(dict(plugin.args_schema)), conf_plugins.read(plugin.verb, plugin.options, files))

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


class _Unloadable(Exception):
    """What stevedore does not catch: an import may end in anything, ``sys.exit()`` included."""


class _Plugins(stevedore.ExtensionManager):  # type: ignore[misc,unused-ignore]
    def list_entry_points(self) -> Any:
        """What is installed now: stevedore keeps its list in a cache for the length of the process, and in files."""
        return list(importlib.metadata.entry_points(group=self.namespace))

    def _load_one_plugin(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._load_one_plugin(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            raise _Unloadable(_line(exc)) from exc


def load_verbs(namespace: str = INSTRUCTIONS, files: Sequence[str] = ()) -> tuple[dict[str, Verb], dict[str, str]]:
    """(verbs by name, why each broken plugin was left out by entry-point name).

    :param files: the configuration files that have the plugins' own options.
    """
    broken: dict[str, str] = {}

    def failed(_manager: object, entry_point: importlib.metadata.EntryPoint, exc: BaseException) -> None:
        LOG.debug("plugin %s", entry_point.name, exc_info=exc)
        broken[_free(entry_point, broken)] = f"cannot be loaded: {exc}"

    manager = _Plugins(namespace, invoke_on_load=True, on_load_failure_callback=failed)
    verbs: dict[str, Verb] = {}
    # Ours first: nobody takes a verb away by giving it again.
    for extension in sorted(
        manager, key=lambda ext: (not ext.entry_point_target.startswith(OURS), str(ext.entry_point))
    ):
        name = extension.name
        try:
            if not isinstance(extension.obj, Plugin):
                raise TypeError(f"{extension.entry_point_target} is no agent.api.Plugin")
            if extension.obj.verb != name:
                raise ValueError(f"the entry point {name!r} leads to the verb {extension.obj.verb!r}")
            if name in verbs:
                raise ValueError(f"there is a verb {name!r} already, of {type(verbs[name].plugin).__module__}")
            verbs[name] = Verb.of(extension.obj, files)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # a property of it may raise anything, too
            broken[_free(extension.entry_point, broken)] = (
                str(exc) if isinstance(exc, TypeError | ValueError | ConfigError) else _line(exc)
            )
    for name, why in sorted(broken.items()):
        LOG.error("plugin %s left out: %s", name, why)
    return verbs, broken


def _free(point: importlib.metadata.EntryPoint, taken: Mapping[str, str]) -> str:
    """Its name; where that is taken, its target with it."""
    return point.name if point.name not in taken else f"{point.name} ({point.value})"


def _line(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]


def load_driver(name: str, settings: Mapping[str, str]) -> Toolstack:
    """Connect the driver `name`. What is wrong with the name alone is the configuration's fault.

    :raises ConfigError: there is no such driver.
    :raises ToolstackError: it refuses its settings or cannot reach the host.
    """
    known = drivers.names()
    if name not in known:
        raise ConfigError(f"driver {name!r} is not installed: give [driver] name one of {', '.join(known) or 'none'}")
    return drivers.load(name, settings)
