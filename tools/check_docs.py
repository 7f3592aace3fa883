"""Check that what the documents say exists: links, files, names, commands, and the options of the sample configuration.
What ``tools/gen_drivers.py`` generates must be as it would be now.

::

    python tools/check_docs.py [FILE ...]      # default: README.md, CONTRIBUTING.md, SECURITY.md and docs/

Run it where Reeve is installed (``tox -e docs``). Each problem is one line,
``file:line: what``; the exit code is 1 when there is one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from check_samples import sample_problems
from gen_drivers import problems as driver_problems

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agent", "bench", "docs", "etc", "hypervisor", "plugins", "tests", "tools", ".ci")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"(?:agent|hypervisor|plugins)(?:\.\w+)+(?:\(\))?")
FILE = re.compile(rf"(?:{'|'.join(re.escape(f) for f in FOLDERS)})/[\w./-]*")
SHELL_LANGUAGES = ("sh", "bash", "shell", "console")

Problems = Iterator[tuple[int, str]]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(text) for text in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}


def prose_and_code(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, fence language or "" for prose, line)."""
    language: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            language = (fence[1] or "text") if language is None else None
        else:
            yield number, language or "", line


def links(path: Path) -> Problems:
    for number, language, line in prose_and_code(path.read_text()):
        for target in LINK.findall(line) if not language else ():
            place, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = path.parent / place if place else path
            if not file.exists():
                yield number, f"link to {target}: no such file"
            elif anchor and anchor not in anchors(file):
                yield number, f"link to {target}: no such heading"


def spans(path: Path) -> Iterator[tuple[int, str]]:
    for number, language, line in prose_and_code(path.read_text()):
        for span in SPAN.findall(line) if not language else ():
            yield number, span


def files(path: Path) -> Problems:
    """Inline code that looks like a file of this repository. Words in capitals stand for something else."""
    for number, span in spans(path):
        if FILE.fullmatch(span) and not re.search(r"\b[A-Z]{3,}\b(?!\.md)", span) and not (ROOT / span).exists():
            yield number, f"`{span}`: no such file"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something inside one."""
    parts = dotted.removesuffix("()").split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


def names(path: Path) -> Problems:
    for number, span in spans(path):
        if NAME.fullmatch(span) and not resolves(span):
            yield number, f"`{span}`: no such module, class or function"


def commands(path: Path) -> Problems:
    """Shell lines of fenced blocks and inline code: what they call must exist."""
    for number, language, line in prose_and_code(path.read_text()):
        if language in SHELL_LANGUAGES:
            calls = [re.sub(r"\s#.*", "", line.strip().removeprefix("$ "))]
        else:
            calls = [] if language else [span for span in SPAN.findall(line) if " " in span]
        for call in calls:
            if problem := command_problem(call.split()):
                yield number, problem


def command_problem(words: list[str]) -> str:
    """Why this command line cannot work; "" when it can, or when it is not one of ours."""
    words = [re.sub(r"^.*/(?=\w+$)", "", words[0]), *words[1:]] if words else [""]
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        wrong = [word for word in rest if re.fullmatch(r"[a-z]+", word) and word not in targets]
        return f"make {wrong[0]}: no such target" if wrong else ""
    if program == "tox" and rest[:1] == ["-e"] and len(rest) > 1:
        known = re.findall(r"^\[testenv:(\w+)\]", (ROOT / "tox.ini").read_text(), re.M)
        wrong = [name for name in rest[1].split(",") if name not in known and not name.isupper()]
        return f"tox -e {wrong[0]}: no such environment" if wrong else ""
    if program in ("python", "python3") and rest and rest[0].endswith(".py") and not Path(rest[0]).stem.isupper():
        return "" if (ROOT / rest[0]).exists() else f"{rest[0]}: no such file"
    if program == "reeve":
        return reeve_problem(rest)
    return ""


@functools.cache
def reeve_help(*command: str) -> str:
    """What ``reeve COMMAND --help`` prints; "" when there is no such command."""
    program = Path(sys.executable).parent / "reeve"
    done = subprocess.run([program, *command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else ""


def reeve_problem(words: list[str]) -> str:
    """Check ``reeve WORDS``: the longest run of plain words must start with a command, its options must be known."""
    plain: list[str] = []
    for word in words:
        if not re.fullmatch(r"[a-z][a-z-]*", word):
            break
        plain.append(word)
    offered = reeve_help()
    known = [tuple(row.split()) for row in re.findall(r"^  ([a-z][a-z-]*(?: [a-z][a-z-]*)*)(?:  |$)", offered, re.M)]
    called = max((c for c in known if c == tuple(plain[: len(c)])), key=len, default=())
    if plain and not called:
        return f"reeve {' '.join(plain)}: no such command"
    text = reeve_help(*called) if called else offered
    wrong = [word for word in words if re.match(r"--[a-z]", word) and word.partition("=")[0] not in text + offered]
    return f"reeve {' '.join(called)} {wrong[0]}: no such option" if wrong else ""


CHECKS: tuple[Callable[[Path], Problems], ...] = (links, files, names, commands)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path)
    chosen = parser.parse_args(arguments).documents or documents()
    found = [
        f"{path}:{number}: {problem}" for path in chosen for check in CHECKS for number, problem in sorted(check(path))
    ]
    found += sample_problems(ROOT / "etc") + driver_problems()
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(found)} problems in {len(chosen)} documents, the drivers' table and the sample configuration")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
