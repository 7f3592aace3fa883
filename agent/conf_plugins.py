"""The options that plugins bring with them: each plugin's in a group of its own, read from files and environment.

They are read when the plugins are loaded, after the agent's own; the command line of the agent does not have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oslo_config import cfg

from agent.errors import ConfigError


def group_of(verb: str) -> str:
    """``plugin_<verb>``; in the environment ``OS_PLUGIN_<VERB>__<OPTION>``."""
    return f"plugin_{verb.replace('-', '_')}"


def read(verb: str, options: Sequence[cfg.Opt], files: Sequence[str]) -> Mapping[str, Any]:
    """The values of a plugin's options by their names, ``-`` in them as ``_``.

    :param files: configuration files, later ones win.
    :raises ConfigError: a value that cannot be, or a required one that is missing.
    """
    if not options:
        return {}
    group = group_of(verb)
    conf = cfg.ConfigOpts()
    try:
        conf.register_opts(options, group=group)
        conf([], project="reeve", default_config_files=list(files), default_config_dirs=[])
        return {option.dest: conf[group][option.dest] for option in options}
    except (cfg.Error, ValueError, TypeError) as exc:
        raise ConfigError(f"its options in [{group}] cannot be used: {' '.join(str(exc).split())[:200]}") from exc
