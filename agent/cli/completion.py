"""`reeve completion`: a script that completes commands and options, made from the commands' own parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from agent.cli.base import CliError, Common

SHELLS = ("bash", "zsh")

_BASH = """\
# Completion of reeve for %(shell)s, made by `reeve completion %(shell)s`.
%(start)s_reeve() {
    local cur=${COMP_WORDS[COMP_CWORD]} words="" word i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        [[ $word == -* ]] || words+="${words:+ }$word"
    done
    local candidates=""
    # The longest beginning of what was typed that is a command or the first word of some.
    while :; do
        case $words in
%(cases)s
        esac
        [[ -n $candidates || -z $words ]] && break
        [[ $words == *" "* ]] && words=${words%% *} || words=""
    done
    COMPREPLY=($(compgen -W "$candidates" -- "$cur"))
    # Nothing of ours: a file.
    [[ ${#COMPREPLY[@]} -eq 0 && $cur != -* ]] && COMPREPLY=($(compgen -f -- "$cur"))
    return 0
}
complete -o filenames -F _reeve reeve
"""


def script(shell: str, commands: Mapping[str, Sequence[str]], common: Sequence[str]) -> str:
    """:param commands: command to its options. :param common: options every command takes."""
    following: dict[str, set[str]] = {"": set()}
    for name in commands:
        words = name.split()
        for count, word in enumerate(words):
            following.setdefault(" ".join(words[:count]), set()).add(word)
    names = sorted({*following, *commands})
    offered = {name: " ".join(_of(name, following, commands, common)) for name in names}
    cases = "\n".join(
        f"            {shlex.quote(name)}) candidates={shlex.quote(found)} ;;" for name, found in offered.items()
    )
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _BASH % {"shell": shell, "cases": cases, "start": start}


def _of(
    name: str, following: Mapping[str, set[str]], commands: Mapping[str, Sequence[str]], common: Sequence[str]
) -> list[str]:
    return sorted({*following.get(name, ()), *commands.get(name, ()), *common})


def options(parser: argparse.ArgumentParser) -> list[str]:
    """Its long options, without those that help does not show."""
    return [
        text
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for text in action.option_strings
        if text.startswith("--")
    ]


class Completion(Common):
    """Print a script that completes commands and options in a shell."""

    examples = (
        ("reeve completion bash", "put it into ~/.local/share/bash-completion/completions/reeve"),
        ("reeve completion zsh", "put it into a file that ~/.zshrc sources, after compinit"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("shell", choices=SHELLS, help="whose script")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        commands = {}
        for name, found in self.app.command_manager:
            try:
                commands[name] = options(found.load()(self.app, self.app.options).get_parser(f"reeve {name}"))
            except CliError as exc:  # another distribution's
                self.say(f"left out: {exc}")
        self.app.stdout.write(script(parsed_args.shell, commands, options(self.app.parser)))
        return 0
