"""Steps that fetch images and make a domain's files of them, and what plans say instead of sources: their paths."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Step
from agent.errors import InstructionError
from agent.images.remote.disks import Place
from agent.images.remote.source import Source
from agent.steps import template_images
from hypervisor.errors import ToolstackError

if TYPE_CHECKING:
    from agent.images.remote.download import Progress
    from agent.images.remote.fetcher import Fetcher

LOG = logging.getLogger(__name__)


def sources_of(host: Host) -> Fetcher:
    """:raises InstructionError: images are not fetched here."""
    if host.sources is None:
        raise InstructionError("image.source_refused", "images are not fetched here: give paths of files on the host")
    return host.sources


@dataclasses.dataclass(frozen=True)
class FetchStep(Step):
    """:ivar items: of each file ``source`` (JSON form of a `Source`) and ``place`` (of a `Place`)."""

    name: ClassVar[str] = "fetch"
    title: ClassVar[str] = "fetch its images"

    items: list[JsonDict]

    def run(self, ctx: Context) -> JsonDict | None:
        fetcher = sources_of(ctx.host)
        for item in self.items:
            fetcher.disks.check_free(Place(**item["place"]), ctx.instruction)
        return {item["place"]["what"]: self._one(fetcher, item, ctx) for item in self.items}

    def check(self, ctx: Context) -> Check:
        # Not done also when it is: what is in the cache is found there, and the step's output is made by running it.
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        sources_of(ctx.host).cache.release(ctx.instruction)

    def _one(self, fetcher: Fetcher, item: JsonDict, ctx: Context) -> JsonDict:
        source, place = Source(**item["source"]), Place(**item["place"])

        def tell(progress: Progress) -> None:
            ctx.progress(
                progress.done, progress.total or max(source.size, progress.done + 1), "bytes", image=place.what
            )

        seconds = fetcher.settings.fetch_seconds
        entry = fetcher.fetch(source, ctx.instruction, lambda ready: ctx.poll(ready, seconds), tell)
        return {"image": entry.key, "bytes": entry.size, "disk_bytes": entry.disk_size}


@dataclasses.dataclass(frozen=True)
class PlaceStep(Step):
    """Make the domain's files of what was fetched. :ivar places: JSON forms of `Place`."""

    name: ClassVar[str] = "place"
    title: ClassVar[str] = "make its disks and kernel of them"

    places: list[JsonDict]

    def run(self, ctx: Context) -> JsonDict | None:
        fetcher = sources_of(ctx.host)
        for data in self.places:
            self._one(fetcher, Place(**data), ctx)
        # From here on the disks themselves hold the images they lie on.
        fetcher.cache.release(ctx.instruction)
        return None

    def check(self, ctx: Context) -> Check:
        disks = sources_of(ctx.host).disks
        done = all(disks.made_by(Place(**data), ctx.instruction) for data in self.places)
        return Check.DONE if done else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        for data in self.places:
            sources_of(ctx.host).disks.unmake(Place(**data), ctx.instruction)

    def _one(self, fetcher: Fetcher, place: Place, ctx: Context) -> None:
        if fetcher.disks.made_by(place, ctx.instruction):
            return
        got = ctx.outputs["fetch"][place.what]
        image = fetcher.cache.path(got["image"])
        if place.mode != "link":
            if 0 < place.size < got["disk_bytes"]:
                text = f"disk {place.what}: the image holds {got['disk_bytes']} bytes, more than disk_mib says"
                raise InstructionError("instruction.bad_args", f"{text}: disks never shrink")
            if place.mode == "overlay":
                place = dataclasses.replace(place, size=place.size or got["disk_bytes"])
        if not image.exists():
            raise InstructionError("image.not_found", f"image {got['image']} has gone: send it again", retryable=True)
        fetcher.disks.make(place, image, ctx.instruction)


@dataclasses.dataclass(frozen=True)
class RemoveFilesStep(Step):
    """After the domain has gone: its kernel, and disks that were to go with it. That one stays is told in the log."""

    name: ClassVar[str] = "remove_files"
    title: ClassVar[str] = "remove its kernel, and disks that go with it"
    changes: ClassVar[bool] = False

    domain: str

    def run(self, ctx: Context) -> JsonDict | None:
        try:
            sources_of(ctx.host).disks.forget(self.domain, template_images(ctx.host.toolstack))
        except (InstructionError, ToolstackError) as exc:
            LOG.warning("files of domain %s stay: %s", self.domain, exc)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


def remove_file_steps(host: Host, domain: str) -> tuple[Step, ...]:
    """What a plan that ends a domain takes last: nothing for a domain that has no such files."""
    if host.sources is None or not host.sources.disks.has(domain):
        return ()
    return (RemoveFilesStep(domain),)


def local_files(args: Mapping[str, Any], host: Host, domain: str) -> tuple[dict[str, Any], tuple[Step, ...]]:
    """Arguments of a new domain with paths where they had sources, and the steps that make those files.

    :raises InstructionError: a source that is refused.
    """
    made, items = dict(args), []
    for what in ("kernel", "ramdisk"):
        if isinstance(args.get(what), Mapping):
            fetcher = sources_of(host)
            source = Source.from_json(args[what], what)
            fetcher.check(source)
            place = Place(domain, what, str(fetcher.disks.path(domain, what)), "link", what)
            items.append((source, place))
            made[what] = place.path
    disks = []
    for disk in args.get("disks", ()):
        if "source" in disk:
            disk, source, place = _disk(disk, host, domain)
            items.append((source, place))
        disks.append(disk)
    if "disks" in args:
        made["disks"] = disks
    return made, _steps(items)


def local_disk(disk: Mapping[str, Any], host: Host, domain: str) -> tuple[dict[str, Any], tuple[Step, ...]]:
    """The same for one disk."""
    if "source" not in disk:
        return dict(disk), ()
    made, source, place = _disk(disk, host, domain)
    return made, _steps([(source, place)])


def _disk(disk: Mapping[str, Any], host: Host, domain: str) -> tuple[dict[str, Any], Source, Place]:
    fetcher = sources_of(host)
    given = disk["source"]
    source = Source.from_json(given)
    fetcher.check(source)
    mode = given.get("mode", fetcher.settings.disk_mode)
    image_format = "qcow2" if mode == "overlay" else source.format
    path = str(fetcher.disks.path(domain, disk["id"], image_format))
    size = given.get("disk_mib", 0) << 20
    if size > fetcher.settings.max_disk_mib << 20:
        text = f"disk {disk['id']}: {size >> 20} MiB is more than [images] max_disk_mib"
        raise InstructionError("image.too_large", text)
    place = Place(domain, disk["id"], path, mode, image_format, size, given.get("delete_on_destroy", False))
    made = {key: value for key, value in disk.items() if key != "source"}
    return {**made, "path": path, "format": image_format}, source, place


def _steps(items: list[tuple[Source, Place]]) -> tuple[Step, ...]:
    if not items:
        return ()
    both = [{"source": dataclasses.asdict(source), "place": dataclasses.asdict(place)} for source, place in items]
    return FetchStep(both), PlaceStep([item["place"] for item in both])
