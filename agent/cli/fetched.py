"""`reeve image fetch`, `pin`, `unpin`, `evict`: the cache of fetched images, which the agent uses too."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from agent.cli.base import Common, Seconds, Show, Table, UsageError
from agent.images.remote.source import HASHES, Source

if TYPE_CHECKING:
    from agent.images.remote.cache import Entry
    from agent.images.remote.download import Progress
    from agent.images.remote.fetcher import Fetcher

FETCHED_COLUMNS = ("id", "format", "size", "disk_size", "used", "state")
_ID = re.compile(r"[0-9a-f]{8,64}(\.[a-z0-9]+)?")
_GLANCE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class FetchedCommand(Common):
    """A command about fetched images."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        json_argument(parser)

    def fetcher(self) -> Fetcher:
        return fetcher_of(self)


class OneFetched(FetchedCommand, Show):
    """A command about one of them."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("image", metavar="ID", help="as `reeve image list --fetched` shows it, or its beginning")


class ImageFetch(FetchedCommand, Show):
    """Fetch an image into the cache, with a progress bar; at once when it is there."""

    examples = (
        ("reeve image fetch https://images.example/web --image-format qcow2 --hash sha256:26f2…", "from a server"),
        ("reeve image fetch 7c1f0f52-… --image-format raw --pin", "an image of Glance; it stays until unpinned"),
    )
    notes = "The rules of the agent hold: [images] allowed_hosts, require_hash and the rest."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add = parser.add_argument
        add("source", metavar="URL|ID", help="a URL, or the id of an image of Glance")
        add("--image-format", required=True, choices=("raw", "qcow2", "kernel", "ramdisk"))
        add("--hash", metavar="ALGORITHM:HEX", default="", help=f"one of: {', '.join(HASHES)}")
        add("--size", type=int, default=0, metavar="BYTES", help="of the file; compared when given")
        add("--pin", action="store_true", help="keep it until `reeve image unpin`")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        from agent.images.remote.fetcher import simple_wait

        fetcher, source = self.fetcher(), _source(parsed_args)
        fetcher.prepare()
        with _bar(source.name) as tell:
            entry = fetcher.fetch(source, "", simple_wait, tell)
        if parsed_args.pin:
            entry = fetcher.cache.pin(entry.key, True)
        return show_fetched(fetcher, entry)


class ImagePin(OneFetched):
    """Keep a fetched image in the cache."""

    examples = (("reeve image pin 26f2c1d0", "it is never given up for room"),)
    pinned = True

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        fetcher = self.fetcher()
        return show_fetched(fetcher, fetcher.cache.pin(find_fetched(fetcher, parsed_args.image).key, self.pinned))


class ImageUnpin(ImagePin):
    """Let a fetched image be given up for room again."""

    examples = (("reeve image unpin 26f2c1d0", "the opposite of pin"),)
    pinned = False


class ImageEvict(OneFetched):
    """Remove a fetched image from the cache, unless it is pinned or in use."""

    examples = (("reeve image evict 26f2c1d0", "exit code 1 (image.in_use) when a domain's disk lies on it"),)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        fetcher = self.fetcher()
        entry = fetcher.cache.evict(find_fetched(fetcher, parsed_args.image).key)
        return ("evicted", "size"), (entry.key, entry.size)


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", dest="formatter", action="store_const", const="json", help="the same as -f json")


def fetcher_of(command: Common) -> Fetcher:
    from agent.images.remote.fetcher import Fetcher  # here: requests' import costs more than most commands

    return Fetcher(command.connection.images)


def find_fetched(fetcher: Fetcher, ident: str) -> Entry:
    """By its id or the beginning of it. :raises InstructionError: ``image.not_found``. :raises UsageError: several."""
    found = [entry for entry in fetcher.cache.list() if _ID.fullmatch(ident) and entry.key.startswith(ident)]
    if len(found) > 1:
        raise UsageError(f"{ident} is the beginning of {len(found)} images: give more of it")
    if found:
        return found[0]
    from agent.errors import InstructionError

    raise InstructionError("image.not_found", f"no fetched image {ident[:80]!r}: see `reeve image list --fetched`")


def looks_fetched(ident: str) -> bool:
    return _ID.fullmatch(ident) is not None


def show_fetched(fetcher: Fetcher, entry: Entry) -> tuple[tuple[str, ...], tuple[object, ...]]:
    columns = {
        "id": entry.key,
        "path": str(fetcher.cache.path(entry.key)),
        "format": entry.format,
        "size": entry.size,
        "disk_size": entry.disk_size,
        "hashes": Table(entry.hashes),
        "sources": Table([_public(source) for source in entry.sources]),
        "created": Seconds(entry.created),
        "used": Seconds(entry.used),
        "pinned": entry.pinned,
        "state": _state(fetcher, entry),
    }
    return tuple(columns), tuple(columns.values())


def list_fetched(fetcher: Fetcher) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    rows: list[tuple[object, ...]] = []
    for entry in fetcher.cache.list():
        state = _state(fetcher, entry)
        rows.append((entry.key, entry.format, entry.size, entry.disk_size, Seconds(entry.used), state))
    return FETCHED_COLUMNS, rows


def _state(fetcher: Fetcher, entry: Entry) -> str:
    return fetcher.cache.held(entry, fetcher.cache.in_use()) or "idle"


def _public(url: str) -> str:
    from agent.images.remote.source import public_url

    return public_url(url)


def _source(parsed_args: argparse.Namespace) -> Source:
    algorithm, _, value = parsed_args.hash.partition(":")
    if parsed_args.hash and (algorithm not in HASHES or re.fullmatch(r"[0-9a-fA-F]+", value) is None):
        raise UsageError("--hash is ALGORITHM:HEX, like sha256:26f2… (see --help)")
    kind = "glance" if _GLANCE.fullmatch(parsed_args.source) else "url"
    data: dict[str, Any] = {kind: parsed_args.source, "size": max(0, parsed_args.size)}
    if algorithm:
        data["hash"] = {"algorithm": algorithm, "value": value.lower()}
    return Source.from_json(data, parsed_args.image_format)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich import progress as bars  # here: its import costs more than most commands
    from rich.console import Console
    from rich.text import Text

    columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    console = Console(stderr=True)
    console.print(Text(f"fetching {name}"))
    with bars.Progress(*columns, console=console) as shown:
        task = shown.add_task("", total=None)
        yield lambda progress: shown.update(task, completed=progress.done, total=progress.total or None)
