"""`reeve config check` and `reeve config show`: mistakes in the configuration, and what it comes to."""

from __future__ import annotations

import argparse
import configparser
import dataclasses
import difflib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from oslo_config import cfg

from agent import conf, conf_plugins
from agent.cli.base import EXIT_FAILED, List
from agent.errors import AgentError
from agent.loader import load_verbs
from agent.redact import HIDDEN
from agent.rpc import connection as broker

HYPERVISOR_CONFIG = Path("/etc/reeve/hypervisor.conf")
MAX_FILE_BYTES = 1 << 20

Options = Mapping[str, Mapping[str, cfg.Opt]]
"""Group to option's name, as a file has it, to option."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """:ivar where: file with line or group, or the variable. `what`: is wrong. `cure`: what to do."""

    severity: str
    where: str
    what: str
    cure: str


def error(where: str, what: str, cure: str) -> Problem:
    """The agent would not start, or not do what it is told."""
    return Problem("error", where, what, cure)


def warning(where: str, what: str, cure: str) -> Problem:
    """It can do without."""
    return Problem("warning", where, what, cure)


COLUMNS = tuple(field.name for field in dataclasses.fields(Problem))


def options_of(daemon: str) -> Options:
    """The options of ``agent`` (with those of plugins) or ``hypervisor``."""
    found: dict[str, dict[str, cfg.Opt]] = {}
    for point in importlib.metadata.entry_points(group="oslo.config.opts"):
        ours = point.name.startswith("reeve.") and (point.name == "reeve.hypervisor") == (daemon == "hypervisor")
        if ours:
            for group, options in point.load()():
                found.setdefault(str(group or "DEFAULT"), {}).update({option.dest: option for option in options})
    return {**found, **plugin_options()} if daemon == "agent" else found


def plugin_options() -> Options:
    """The options of every plugin that can be loaded."""
    verbs, _ = load_verbs()
    return {
        conf_plugins.group_of(name): {option.dest: option for option in verb.plugin.options}
        for name, verb in verbs.items()
        if verb.plugin.options
    }


def check_file(path: Path, options: Options) -> Iterator[Problem]:
    """What is wrong within one file: what cannot be read, unknown groups and options, bad values."""
    try:
        text = path.read_bytes()[: MAX_FILE_BYTES + 1].decode()
    except OSError as exc:
        yield Problem("error", str(path), exc.strerror or str(exc), "let this user read it, or name another")
        return
    except UnicodeDecodeError:
        yield error(str(path), "it is not UTF-8", "save it as UTF-8 text")
        return
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, default_section="\0")
    try:
        parser.read_string(text, source=str(path))
    except configparser.Error as exc:
        line = getattr(exc, "lineno", None) or next(iter(getattr(exc, "errors", [(0, "")])), (0, ""))[0]
        yield Problem(
            "error", f"{path}:{line}", "this is no line of a configuration file", "write name = value below a [group]"
        )
        return
    lines = _lines(text)
    for group in parser.sections():
        known = options.get(group)
        if known is None:
            yield _unknown("group", f"[{group}]", f"{path}:{lines.get((group, ''), 0)}", group, options)
            continue
        for name in parser.options(group):
            where = f"{path}:{lines.get((group, name), 0)}"
            option = known.get(name.replace("-", "_"))
            if option is None:
                yield _unknown("option", f"{name} of [{group}]", where, name, known)
            elif (bad := _bad(option, parser.get(group, name))) is not None:
                yield error(where, f"[{group}] {name}: {bad}", _cure(option))


def check_environment(environ: Mapping[str, str], options: Options) -> Iterator[Problem]:
    """The variables ``OS_GROUP__OPTION``, which oslo.config's environment driver reads."""
    for name, value in sorted(environ.items()):
        match = re.fullmatch(r"OS_([A-Z][A-Z_]*?)__([A-Z0-9_]+)", name)
        if match is None:
            continue
        group, option = match[1].lower(), match[2].lower()
        if group not in options:
            continue  # another program's, perhaps
        if option not in options[group]:
            yield _unknown("option", f"{option} of [{group}]", f"environment {name}", option, options[group])
        elif (bad := _bad(options[group][option], value)) is not None:
            yield error(f"environment {name}", bad, _cure(options[group][option]))


def check_settings(settings: conf.Settings) -> Iterator[Problem]:
    """What the values name and is not there. Nothing is connected to or made."""
    yield from _check_folders(settings)
    yield from _check_files(settings)
    yield from _check_names(settings)


def _check_folders(settings: conf.Settings) -> Iterator[Problem]:
    folders: dict[str, Path] = {}
    if broker.is_filesystem(settings.broker_url):
        folders["[broker] url"] = Path(urlsplit(settings.broker_url).path or "/")
    else:
        try:
            broker.connect(settings.broker_url, tls=settings.broker_tls)  # which opens nothing
        except AgentError as exc:
            yield error("[broker] url", *_split(exc.message))
        if settings.signing.key_file and settings.oslo.enabled:
            what = "calls from oslo.messaging are not signed, so they are refused"
            yield warning("[signing] key_file", what, "set [oslo] enabled = false")
        if settings.broker_tls.insecure:
            yield warning("[broker] tls_insecure", "whoever answers is taken for the broker", "take it out")
    folders |= {
        "[agent] state_dir": settings.state_dir,
        "[journal] path": settings.journal_path.parent,
        "[agent] save_dir": settings.save_dir,
        "[agent] core_dir": settings.core_dir,
        "[images] config_drive_dir": settings.config_drive_dir,
    }
    for where, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            yield error(where, f"{there} is no folder", "name a folder, or move that file away")
        elif not os.access(there, os.W_OK | os.X_OK):
            yield error(where, f"{there} is not writable for this user", "run this as the agent's user, or chown it")
    if not settings.image_dir.is_dir():
        yield warning("[images] dir", f"there is no folder {settings.image_dir}", "reeve image build makes it")


def _check_files(settings: conf.Settings) -> Iterator[Problem]:
    try:
        settings.signing.signer()
    except AgentError as exc:
        yield error("[signing] key_file", *_split(exc.message))
    for where, file in {"[images] grub_x86_64": settings.grub_x86_64, "[images] grub_i386": settings.grub_i386}.items():
        if not os.access(file, os.R_OK):
            yield warning(where, f"there is no file {file} to read", "apt-get install grub-xen-host, or name it")
    control = settings.driver_settings.get("socket")
    if settings.driver == "embedded" and control and not Path(control).is_socket():
        yield warning("[driver] socket", f"there is no socket {control}", "start reeve-hypervisor, or name its socket")
    log = Path(settings.log.file) if settings.log.file else None
    if log is not None and not os.access(log if log.exists() else log.parent, os.W_OK):
        yield error("[log] file", f"{log} cannot be written", "make its folder, writable for the agent's user")


def _check_names(settings: conf.Settings) -> Iterator[Problem]:
    drivers = sorted(point.name for point in importlib.metadata.entry_points(group="reeve.drivers"))
    if settings.driver not in drivers:
        yield error("[driver] name", f"there is no driver {settings.driver!r}", f"give one of {', '.join(drivers)}")
    verbs, broken = load_verbs(files=settings.files)
    for name, why in broken.items():
        what, cure = _split(why)
        yield warning(f"plugin {name}", f"it is left out: {what}", cure)
    for verb in settings.allowed_verbs:
        if verb not in verbs and verb not in broken:
            yield error("[agent] allowed_verbs", f"there is no verb {verb!r}", "reeve schema lists them")


def check(files: Sequence[Path], hypervisor: Sequence[Path], environ: Mapping[str, str]) -> list[Problem]:
    """All that is wrong, in the order in which it is read."""
    found: list[Problem] = []
    for path in files:
        found += check_file(path, options_of("agent"))
    found += check_environment(environ, options_of("agent"))
    for path in hypervisor:
        found += check_file(path, options_of("hypervisor"))
    if any(problem.severity == "error" for problem in found):
        return found
    try:
        found += check_settings(conf.load([str(path) for path in files]))
    except AgentError as exc:
        found.append(error("the configuration as a whole", *_split(exc.message)))
    return found


class ConfigCheck(List):
    """Say what is wrong in the configuration of agent and host process, where, and how to cure it.

    Unknown groups and options, values that cannot be, also in the environment; folders and files that cannot be
    reached. It connects to nothing and changes nothing.
    """

    examples = (
        ("reeve config check", "the configuration that the agent would read"),
        ("reeve config check --config-file new.conf", "another file, before it is installed"),
        ("reeve config check -f json", "for a program; an empty list: nothing is wrong"),
    )
    notes = "Exit code 1 when there is an error; with --strict for warnings, too."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--strict", action="store_true", help="exit code 1 for warnings, too")
        parser.add_argument(
            "--hypervisor-file",
            action="append",
            metavar="FILE",
            help=f"configuration of reeve-hypervisor; default: {HYPERVISOR_CONFIG}, if it is there",
        )

    def run(self, parsed_args: argparse.Namespace) -> int:
        self.bad = False
        code = super().run(parsed_args)
        return EXIT_FAILED if self.bad else int(code)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        files = self.app.options.config_file or conf.config_files()
        given = parsed_args.hypervisor_file or ([str(HYPERVISOR_CONFIG)] if HYPERVISOR_CONFIG.exists() else [])
        problems = check([Path(name) for name in files], [Path(name) for name in given], os.environ)
        self.bad = any(problem.severity == "error" or parsed_args.strict for problem in problems)
        if not problems:
            self.say(f"nothing is wrong; read: {', '.join([*map(str, files), *given]) or 'no file, defaults only'}")
        return COLUMNS, [dataclasses.astuple(problem) for problem in problems]


class ConfigShow(List):
    """Show every option of the agent with the value it comes to; secrets are hidden."""

    examples = (
        ("reeve config show", "a table"),
        ("reeve config show -f json", "for a program: files and environment together"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        files = self.app.options.config_file or conf.config_files()
        values = conf.values(files)
        rows: list[tuple[object, ...]] = []
        for group, options in conf.GROUPS.items():
            for option in options:
                value = values[group][option.dest]
                shown = HIDDEN if option.secret and value else value
                rows.append((group, option.dest, shown, bool(option.mutable)))
        verbs, _ = load_verbs(files=files)
        for name, verb in verbs.items():
            for option in verb.plugin.options:
                value = verb.options[option.dest]
                shown = HIDDEN if option.secret and value else value
                rows.append((conf_plugins.group_of(name), option.dest, shown, False))
        return ("group", "option", "value", "changes_on_sighup"), rows


def _bad(option: cfg.Opt, text: str | None) -> str | None:
    """Why `text` cannot be the option's value; never the value of a secret."""
    if text is None:
        return "there is no value"
    if "$" in text:
        return None  # a reference to another option: the configuration as a whole shows
    try:
        option.type(text)
    except (ValueError, TypeError) as exc:
        return "the value cannot be used" if option.secret else " ".join(str(exc).split())[:200]
    return None


def _cure(option: cfg.Opt) -> str:
    kind = option.type
    if choices := getattr(kind, "choices", None):
        return f"give one of {', '.join(map(str, choices))}"
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    return f"give a value of type {kind}{', ' if limits else ''}{' and '.join(limits)}"


def _unknown(what: str, name: str, where: str, typed: str, known: Iterable[str]) -> Problem:
    close = difflib.get_close_matches(typed.replace("-", "_"), list(known), n=1)
    cure = f"did you mean {close[0]}?" if close else "remove it; the sample under etc/reeve lists what there is"
    return error(where, f"there is no {what} {name}", cure)


def _lines(text: str) -> dict[tuple[str, str], int]:
    """(group, option) to its last line; (group, "") to the group's."""
    found, group = {}, ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\[([^\]]+)\]", line):
            group = header[1]
            found[group, ""] = number
        elif option := re.match(r"([A-Za-z0-9_.-]+)\s*[=:]?", line):
            found[group, option[1].lower()] = number
    return found


def _split(message: str) -> tuple[str, str]:
    what, _, cure = message.rpartition(": ")
    return (what, cure) if what else (message, "see the sample under etc/reeve")
