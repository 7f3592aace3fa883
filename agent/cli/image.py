"""`reeve image`: guest images, each a kernel, a ramdisk and a manifest with checksums."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from agent import images
from agent.cli.base import Common, List, Seconds, Show, Table
from agent.cli.fetched import fetcher_of, find_fetched, json_argument, list_fetched, looks_fetched, show_fetched
from agent.images.store import check_name

LIST_COLUMNS = ("name", "size", "created", "packages", "cmdline")


class ImageCommand(Common):
    """A command about the image store."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images-dir", metavar="DIR", help="the image store (default: the agent's)")
        json_argument(parser)

    def store(self, parsed_args: argparse.Namespace) -> Path:
        return Path(parsed_args.images_dir or self.connection.image_dir)


class ImageBuild(ImageCommand, Show):
    """Build a guest image from Debian's packages, without root, or from given files."""

    examples = (
        ("reeve image build", "image 'demo': Debian's kernel and a busybox initramfs; downloads are cached"),
        ("reeve image build own --kernel vmlinuz --ramdisk initrd.img", "from files"),
        ("reeve image build tools --add ./bench:/bin/bench", "with a program of yours in the initramfs"),
    )
    notes = (
        "An image appears whole or not at all. What is not given comes from Debian through apt-get download;\n"
        "nothing is installed on this machine."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        add = parser.add_argument
        add("name", nargs="?", default="demo", metavar="NAME", help="default: demo")
        add("--kernel", metavar="FILE", help="instead of Debian's")
        add("--ramdisk", metavar="FILE", help="instead of the busybox initramfs")
        add("--cmdline", metavar="TEXT", help=f"kernel command line (default {images.DEFAULT_CMDLINE})")
        add("--add", action="append", default=[], metavar="SRC:DEST", help="a file for the initramfs; repeatable")
        add("--kernel-package", metavar="NAME", help="Debian package of the kernel (default linux-image-amd64)")
        add("--cache-dir", metavar="DIR", help="where downloads are kept")
        add("--replace", action="store_true", help="put it in the place of an image with that name")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        optional = {
            key: getattr(parsed_args, key)
            for key in ("kernel_package", "cache_dir")
            if getattr(parsed_args, key) is not None
        }
        with self.stages() as progress:
            image = images.build_image(
                self.store(parsed_args),
                name=parsed_args.name,
                kernel=parsed_args.kernel,
                ramdisk=parsed_args.ramdisk,
                cmdline=parsed_args.cmdline,
                add=parsed_args.add,
                replace=parsed_args.replace,
                progress=progress,
                **optional,
            )
        return show_image(image)

    @contextlib.contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """Tells of each stage: a spinner on a terminal, else one line each on standard error."""
        if not sys.stderr.isatty():
            yield self.say
            return
        from rich.console import Console  # here: its import costs more than most commands

        with Console(stderr=True).status("building") as status:
            yield lambda text: status.update(text.replace("[", r"\["))


class ImageList(ImageCommand, List):
    """List the usable images of the store, or those that were fetched."""

    examples = (
        ("reeve image list", "name, size in bytes, when and from what"),
        ("reeve image list -f value -c name", "names only"),
        ("reeve image list --fetched --json", "the cache of fetched images: size, last use, and why one stays"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--fetched", action="store_true", help="the cache instead of the store")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        if parsed_args.fetched:
            return list_fetched(fetcher_of(self))
        rows: list[tuple[object, ...]] = []
        for image in images.list_images(self.store(parsed_args)):
            packages = Table(dict(image.packages))
            rows.append((image.name, image.size, Seconds(image.created), packages, image.cmdline))
        return LIST_COLUMNS, rows


class OneImage(ImageCommand, Show):
    """A command about one image."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("image", metavar="NAME|DIR", help="an image of the store, or the path of its folder")


class ImageShow(OneImage):
    """Show an image: files, sizes, checksums, what it was made from; or a fetched one, by its id."""

    examples = (
        ("reeve image show demo -f json", "paths and checksums for a program"),
        ("reeve image show 26f2c1d0", "a fetched image, by the beginning of its id"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        name = parsed_args.image
        if looks_fetched(name) and not (self.store(parsed_args) / name).exists():
            fetcher = fetcher_of(self)
            return show_fetched(fetcher, find_fetched(fetcher, name))
        return show_image(images.load_image(image_folder(parsed_args.image, self.store(parsed_args))))


class ImageVerify(OneImage):
    """Read an image whole and compare its checksums."""

    examples = (("reeve image verify demo", "exit code 1 (image.invalid) when a file has changed"),)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        names, values = show_image(images.verify_image(image_folder(parsed_args.image, self.store(parsed_args))))
        return ("verified", *names), (True, *values)


def image_folder(name_or_path: str, store: Path) -> Path:
    """A plain word is an image of the store; anything with a slash is a path."""
    return Path(name_or_path) if os.sep in name_or_path else store / check_name(name_or_path)


def boot_of(name_or_path: str, image_dir: str) -> dict[str, object]:
    """The boot part of a domain spec.

    :raises ImageNotFound, ImageError: no such image, or it is damaged.
    """
    image = images.load_image(image_folder(name_or_path, Path(image_dir)))
    return {"kernel": image.kernel, "ramdisk": image.ramdisk, "cmdline": image.cmdline}


def show_image(image: images.Image) -> tuple[tuple[str, ...], tuple[object, ...]]:
    columns = {
        "name": image.name,
        "directory": str(image.directory),
        "kernel": image.kernel,
        "ramdisk": image.ramdisk,
        "cmdline": image.cmdline,
        "size": image.size,
        "sha256": Table({file.name: file.sha256 for file in image.files()}),
        "packages": Table(dict(image.packages)),
        "created": Seconds(image.created),
    }
    return tuple(columns), tuple(columns.values())
