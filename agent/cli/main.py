"""Entry point of `reeve`: the table of commands, options every command takes, and what an error looks like."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import inspect
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from cliff import help as cliff_help
from cliff.app import App
from cliff.commandmanager import CommandManager

from agent.cli import (
    completion,
    config,
    console,
    devices,
    doctor,
    domain,
    events,
    fetched,
    image,
    inside,
    instruct,
    lock,
    manual,
    migration,
    node,
    placement,
    plugins,
    quarantine,
    resize,
    saving,
    schema,
    snapshot,
    standby,
    template,
    top,
)
from agent.cli.base import EXIT_FAILED, EXIT_OK, CliError, UsageError, error_json, usage_error
from agent.cli.settings import Connection

LOG = logging.getLogger(__name__)

COMMANDS: dict[str, Any] = {
    "node show": node.NodeShow,
    "domain list": domain.DomainList,
    "domain show": domain.DomainShow,
    "domain create": domain.DomainCreate,
    "domain destroy": domain.DomainDestroy,
    "domain shutdown": domain.DomainShutdown,
    "domain reboot": domain.DomainReboot,
    "domain reset": domain.DomainReset,
    "domain pause": domain.DomainPause,
    "domain unpause": domain.DomainUnpause,
    "domain wait": domain.DomainWait,
    "domain console": console.DomainConsole,
    "domain console-log": console.DomainConsoleLog,
    "domain events": events.DomainEvents,
    "domain attach-disk": devices.DomainAttachDisk,
    "domain detach-disk": devices.DomainDetachDisk,
    "domain attach-nic": devices.DomainAttachNic,
    "domain detach-nic": devices.DomainDetachNic,
    "domain resize": resize.DomainResize,
    "domain save": saving.DomainSave,
    "domain clone": snapshot.DomainClone,
    "domain snapshot": snapshot.DomainSnapshot,
    "domain revert": snapshot.DomainRevert,
    "domain restore": saving.DomainRestore,
    "template create": template.TemplateCreate,
    "template list": template.TemplateList,
    "template show": template.TemplateShow,
    "template remove": template.TemplateRemove,
    "domain migrate": migration.DomainMigrate,
    "domain standby start": standby.StandbyStart,
    "domain standby status": standby.StandbyStatus,
    "domain standby stop": standby.StandbyStop,
    "domain standby takeover": standby.StandbyTakeover,
    "domain sysrq": inside.DomainSysrq,
    "domain dump-core": inside.DomainDumpCore,
    "block list": devices.BlockList,
    "network list": devices.NetworkList,
    "migration list": migration.MigrationList,
    "migration show": migration.MigrationShow,
    "migration cancel": migration.MigrationCancel,
    "migration resolve": migration.MigrationResolve,
    "host evacuate": migration.HostEvacuate,
    "placement show": placement.PlacementShow,
    "placement audit": placement.PlacementAudit,
    "placement repair": placement.PlacementRepair,
    "top": top.Top,
    "lock list": lock.LockList,
    "lock break": lock.LockBreak,
    "cancel": lock.Cancel,
    "quarantine list": quarantine.QuarantineList,
    "quarantine show": quarantine.QuarantineShow,
    "quarantine retry": quarantine.QuarantineRetry,
    "quarantine drop": quarantine.QuarantineDrop,
    "instruct": instruct.Instruct,
    "schema": schema.Schema,
    "doctor": doctor.Doctor,
    "completion": completion.Completion,
    "manual": manual.Manual,
    "config check": config.ConfigCheck,
    "config show": config.ConfigShow,
    "image build": image.ImageBuild,
    "image list": image.ImageList,
    "image show": image.ImageShow,
    "image verify": image.ImageVerify,
    "image fetch": fetched.ImageFetch,
    "image pin": fetched.ImagePin,
    "image unpin": fetched.ImageUnpin,
    "image evict": fetched.ImageEvict,
}
DESCRIPTION = """\
Look after a Reeve node: its domains, its images and what it needs.

`node`, `domain`, `block`, `network` and `migration` commands and `top` talk to the driver on this machine;
`domain migrate`, `domain standby` and `host evacuate` ask the agent, since two hosts take part, `domain snapshot`,
`domain revert` and `domain clone` too; `instruct` sends any instruction through the message broker, as a cloud
scheduler would.
Start with `reeve doctor`."""


class ReeveApp(App):  # type: ignore[misc,unused-ignore]
    """cliff's application with one-line errors and no interactive mode."""

    NAME = "reeve"
    options: argparse.Namespace
    connection: Connection

    def __init__(self, stdin: TextIO | None = None, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        manager = CommandManager()
        super().__init__(
            description=DESCRIPTION,
            version=importlib.metadata.version("reeve"),
            command_manager=manager,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            deferred_help=True,
        )
        for name, command in COMMANDS.items():
            manager.add_command(name, command)
        manager.commands.update(plugins.find(COMMANDS))  # type: ignore[arg-type]
        self.json_errors = False

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, Any] | None = None
    ) -> argparse.ArgumentParser:
        kwargs = {
            "prog": self.NAME,
            "allow_abbrev": False,  # or it would take options that belong to a command
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            **(argparse_kwargs or {}),
        }
        parser = super().build_option_parser(description, version, kwargs)
        parser.error = usage_error  # type: ignore[method-assign]
        for action in parser._actions:
            if action.dest == "version":
                action.version = f"{self.NAME} {version}"  # type: ignore[attr-defined]
        Connection.add_arguments(parser)
        return parser

    def configure_logging(self) -> None:
        """Warnings to standard error; more with -v (info) and -vv (debug). cliff's default is one step louder."""
        level = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO}.get(self.options.verbose_level, logging.DEBUG)
        handler: logging.Handler = logging.StreamHandler(self.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        handler.setLevel(level)
        handlers = [handler]
        if self.options.log_file:
            handler = logging.FileHandler(self.options.log_file)
            handler.setFormatter(logging.Formatter(self.LOG_FILE_MESSAGE_FORMAT))
            handlers.append(handler)
            level = logging.DEBUG
        root = logging.getLogger()
        for old in [item for item in root.handlers if getattr(item, "_reeve_cli", False)]:
            root.removeHandler(old)
        for item in handlers:
            item._reeve_cli = True  # type: ignore[attr-defined]
            root.addHandler(item)
        root.setLevel(level)
        logging.getLogger("stevedore").setLevel(logging.WARNING)

    def run(self, argv: list[str]) -> int:
        self.json_errors = _wants_json(argv)
        try:
            self.options, rest = self.parser.parse_known_args(argv)
            self.configure_logging()
            self.connection = Connection.from_options(self.options)
            if self.options.deferred_help:
                rest.insert(0, "help")
            if not rest:
                raise UsageError("no command given (`reeve --help` lists them)")
            return self.run_subcommand(rest)
        except cliff_help.HelpExit:
            return EXIT_OK
        except SystemExit as exc:  # --version
            return exc.code if isinstance(exc.code, int) else EXIT_FAILED
        except BrokenPipeError:
            return 128 + 13
        except KeyboardInterrupt:
            return 128 + 2
        except Exception as exc:
            return self.report(exc)

    def run_subcommand(self, argv: list[str]) -> int:
        factory, name, rest = self._find(argv)
        wants_name = "cmd_name" in inspect.getfullargspec(factory.__init__).args
        command = factory(self, self.options, **({"cmd_name": name} if wants_name else {}))
        parsed = command.get_parser(f"{self.NAME} {name}").parse_args(rest)
        return int(command.run(parsed) or EXIT_OK)

    def _find(self, argv: list[str]) -> tuple[Any, str, list[str]]:
        words = [word for word in argv if not word.startswith("-")]
        try:
            return self.command_manager.find_command(argv)
        except ValueError:
            typed = " ".join(words[:2])
            names = list(self.command_manager.commands)
            group = sorted(name for name in names if words and name.split()[0] == words[0])
            close = group or difflib.get_close_matches(typed, names, n=3)
            hint = f"did you mean: {', '.join(close)}" if close else "`reeve --help` lists the commands"
            raise UsageError(f"{typed or argv[0]!r} is not a command: {hint}") from None

    def report(self, error: Exception) -> int:
        """Tell of a failure; returns the exit code."""
        data = error_json(error)
        if getattr(self, "options", None) is not None and self.options.debug:
            LOG.error("%s", data["message"], exc_info=error)
        if self.json_errors:
            self.stderr.write(json.dumps({"error": data}) + "\n")
        else:
            self.stderr.write(f"error: {data['code']}: {data['message']}\n")
        return error.exit_code if isinstance(error, CliError) else EXIT_FAILED


def _wants_json(argv: Sequence[str]) -> bool:
    """Whether ``-f json`` (for some ``--json``, too) is there; asked before parsing, for errors in parsing it."""
    for index, word in enumerate(argv):
        following = argv[index + 1] if index + 1 < len(argv) else ""
        if word in ("-fjson", "--format=json") or (word in ("-f", "--format") and following == "json"):
            return True
    return "--json" in argv and not {"cancel", "image", "lock", "placement", "quarantine"}.isdisjoint(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return ReeveApp().run(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
