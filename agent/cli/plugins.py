"""Commands of other distributions: entry points of the group ``reeve.commands``, imported when they are used.

One that cannot be imported is listed with the reason, and fails with it; every other command works.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import re
from collections.abc import Container
from typing import Any, NoReturn

from cliff.command import Command

from agent.cli.base import CliError, Common

LOG = logging.getLogger(__name__)

GROUP = "reeve.commands"


class Found:
    """One entry point, as cliff's command manager wants it.

    :ivar name: the words of the command.
    """

    def __init__(self, name: str, point: importlib.metadata.EntryPoint) -> None:
        self.name = name
        self.value = point.value
        self._point = point

    def load(self) -> type[Command]:
        """The command's class; for a broken one a class that says so. Never fails."""
        try:
            found: Any = self._point.load()
            if not (isinstance(found, type) and issubclass(found, Command)):
                raise TypeError(f"{self.value} is no agent.cli.api.Command")
            if (version := getattr(found, "api_version", None)) is not None:
                from agent.loader import check_version  # here: it costs more than most commands

                check_version(version)
            return found
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # sys.exit() included
            LOG.debug("command %s", self.name, exc_info=True)
            return _broken(self.name, " ".join(f"{type(exc).__name__}: {exc}".split())[:300])


def find(ours: Container[str]) -> dict[str, Found]:
    """The commands of other distributions by name. :param ours: names that they cannot have."""
    found: dict[str, Found] = {}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        name = point.name.replace("_", " ")
        if not re.fullmatch(r"[a-z][a-z0-9-]*( [a-z][a-z0-9-]*){0,3}", name):
            LOG.warning("command %r of %s left out: its name is not lower-case words", point.name, point.value)
        elif name in ours or name in found:
            LOG.warning("command %r of %s left out: there is one already", name, point.value)
        else:
            found[name] = Found(name, point)
    return found


def _broken(name: str, why: str) -> type[Command]:
    error = CliError(f"the command {name!r} cannot be loaded ({why}): repair or remove its package")

    class Broken(Common):
        __doc__ = f"(cannot be used: {why})"

        def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
            raise error

        def take_action(self, parsed_args: argparse.Namespace) -> NoReturn:
            raise error

    return Broken
