"""The config drives of a node: one file per domain, in a folder of the agent's own.

A drive is written before its domain is built and removed with it: by the instruction that destroys the domain, or by
`Drives.sweep` when the domain has ended in another way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from agent.configdrive.iso import maker_of, write_iso
from agent.durable import private
from agent.errors import ConfigError, InstructionError
from agent.steps import template_images
from hypervisor.errors import DomainNotFound
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)

YOUNG_SECONDS = 600.0
"""So old must a drive be before it counts as left over: its domain may still be on its way."""

_FILE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.(?:iso|iso\.new|keep)")
_NEW, _KEEP = ".new", ".keep"


class Drives:
    """:param folder: below one of the folders from which the hypervisor takes images; of one node alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Make the folder: a domain that moves here brings its drive along, by the hypervisor's hands."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"the folder of config drives {self.folder} cannot be made ({exc.strerror}): set [images] "
                "config_drive_dir to one that can"
            ) from exc

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

    def keep_for(self, domain: str, saved: str) -> None:
        """Do not remove a domain's drive while there is a file `saved`, from which the domain can come back.

        No effect when it has no drive. :raises InstructionError: it cannot be noted.
        """
        if not self.path(domain).exists():
            return
        note = self.path(domain).with_suffix(_KEEP)
        try:
            with open(note, "a", encoding="utf-8", opener=private) as file:
                file.write(json.dumps(saved) + "\n")
        except OSError as exc:
            raise InstructionError(
                "host.failure", f"{note} cannot be written: {exc.strerror}; free space or correct its rights"
            ) from exc

    def remove(self, domain: str) -> None:
        """Unless it is kept; no effect when there is none. :raises InstructionError: it stays."""
        path = self.path(domain)
        if self._kept(domain):
            LOG.info("config drive %s stays: a saved file needs it", path)
            return
        try:
            for item in (path, path.with_name(path.name + _NEW), path.with_suffix(_KEEP)):
                item.unlink(missing_ok=True)
        except OSError as exc:
            raise InstructionError(
                "host.failure", f"config drive {path} cannot be removed: {exc.strerror}; remove it, it holds secrets"
            ) from exc

    def _kept(self, domain: str) -> bool:
        try:
            lines = self.path(domain).with_suffix(_KEEP).read_text("utf-8").splitlines()
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True  # nobody can say that it is not
        return any(os.path.lexists(_saved(line)) for line in lines)

    def sweep(self, wanted: Callable[[], Set[str]]) -> int:
        """Remove what domains have left behind; returns how many drives went.

        :param wanted: UUIDs of all domains that are there or may come, and the paths of their disks; asked after the
            folder was read, so that no drive of a domain made meanwhile is missed. What it raises is passed on, and
            nothing is removed.
        """
        old = self._old()
        in_use = wanted() if old else frozenset()
        removed = 0
        for domain in sorted(old):
            if domain in in_use or str(self.path(domain)) in in_use or self._kept(domain):
                continue
            try:
                self.remove(domain)
            except InstructionError as exc:
                LOG.warning("%s", exc)
                continue
            removed += 1
            LOG.info("config drive of domain %s removed: the domain is gone", domain)
        return removed

    def _old(self) -> set[str]:
        """Domains of which nothing in the folder is young."""
        ages: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                name = _FILE.fullmatch(entry.name)
                if name and entry.is_file(follow_symlinks=False):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    ages[name[1]] = min(ages.get(name[1], age), age)
        return {domain for domain, age in ages.items() if not 0 <= age < YOUNG_SECONDS}


def wanted_drives(toolstack: Toolstack, domains: Set[str]) -> set[str]:
    """For `Drives.sweep`: the domains, and the disks of those that are there, or can come back from a template.

    A domain that was restored under another UUID has the drive of the one that was saved.
    :raises ToolstackError: the host does not answer.
    """
    paths = set()
    for domain in toolstack.list_domains():
        with contextlib.suppress(DomainNotFound):
            paths |= {disk.path for disk in toolstack.get_spec(domain.uuid).disks}
    return paths | domains | template_images(toolstack)


def _saved(line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
