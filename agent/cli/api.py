"""All that a plugin's command may import from the command line, besides `agent.api`.

A command is a subclass of `Command`, `Show` or `List` and an entry point of the group ``reeve.commands``, whose name
is the command with ``_`` for spaces. Its class may say for which `API_VERSION` it was written, as ``api_version``.
"""

from __future__ import annotations

from agent.api import API_VERSION
from agent.cli.asking import InstructionFailed, ask
from agent.cli.base import CliError, List, Seconds, Show, Table, UsageError, find_domain, progress
from agent.cli.base import Common as Command

__all__ = [
    "API_VERSION",
    "CliError",
    "Command",
    "InstructionFailed",
    "List",
    "Seconds",
    "Show",
    "Table",
    "UsageError",
    "ask",
    "find_domain",
    "progress",
]
