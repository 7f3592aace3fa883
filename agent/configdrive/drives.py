"""The config drives of a node: one file per domain, in a folder of the agent's own.

A drive is written before its domain is built and removed with it: by the instruction that destroys the domain, or by
`Drives.sweep` when the domain has ended in another way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from agent.configdrive.iso import maker_of, write_iso
from agent.errors import InstructionError

LOG = logging.getLogger(__name__)

YOUNG_SECONDS = 600.0
"""So old must a drive be before it counts as left over: its domain may still be on its way."""

_FILE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.iso(?:\.new)?")


class Drives:
    """:param folder: below one of the folders from which the hypervisor takes images; of one node alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, domain: str) -> Path:
        """Where the drive of a domain is, by the domain's UUID."""
        return self.folder / f"{domain}.iso"

    def write(self, domain: str, label: str, files: Mapping[str, bytes], maker: str) -> None:
        """Write a domain's drive, in place of one that is there. :raises InstructionError: see `write_iso`."""
        write_iso(self.path(domain), label, files, maker)

    def made_by(self, domain: str, maker: str) -> bool:
        """Whether a whole drive is there that `maker` wrote. :raises InstructionError: nobody can tell."""
        try:
            return maker_of(self.path(domain)) == maker
        except OSError as exc:
            raise InstructionError(
                "host.failure", f"config drive {self.path(domain)} cannot be read: {exc.strerror}; correct its rights"
            ) from exc

    def remove(self, domain: str) -> None:
        """No effect when there is none. :raises InstructionError: it stays."""
        path = self.path(domain)
        try:
            for item in (path, path.with_name(path.name + ".new")):
                item.unlink(missing_ok=True)
        except OSError as exc:
            raise InstructionError(
                "host.failure", f"config drive {path} cannot be removed: {exc.strerror}; remove it, it holds secrets"
            ) from exc

    def sweep(self, wanted: Callable[[], Set[str]]) -> int:
        """Remove what domains have left behind; returns how many files went.

        :param wanted: UUIDs of all domains that are there or may come; asked after the folder was read, so that no
            drive of a domain made meanwhile is missed. What it raises is passed on, and nothing is removed.
        """
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                name = _FILE.fullmatch(entry.name)
                if name and not entry.is_dir(follow_symlinks=False):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if not 0 <= age < YOUNG_SECONDS:
                        found.append((name[1], entry.path))
        removed = 0
        domains = wanted() if found else frozenset()
        for domain, path in found:
            if domain in domains:
                continue
            with contextlib.suppress(FileNotFoundError):
                try:
                    os.unlink(path)
                except PermissionError as exc:
                    LOG.warning("config drive %s of a domain that is gone stays: %s", path, exc.strerror)
                    continue
                removed += 1
                LOG.info("config drive of domain %s removed: the domain is gone", domain)
        return removed
