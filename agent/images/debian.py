"""Get files out of Debian's packages, without root: apt downloads, nothing is installed.

The machine's own package lists are used when they know the package; else a
private copy is fetched into the cache folder (``apt-get update`` with its state
there). Downloads are checked against the SHA256 of the signed lists, kept, and
used again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pwd
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.images.errors import ImageBuildFailed

LOG = logging.getLogger(__name__)

KERNEL_META_PACKAGE = "linux-image-amd64"
BUSYBOX_PACKAGE = "busybox-static"
_TIMEOUT = 600  # seconds for one apt command: a kernel package has some 70 MB
_MAX_MEMBER = 128 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """One version of a package, as the lists describe it."""

    name: str
    version: str
    architecture: str
    sha256: str
    depends: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """As apt names its downloads."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Apt:
    """apt-get and apt-cache of this machine, with its lists or private ones.

    :param cache_dir: holds downloads, and private lists when they are needed.
    :param run: runs a command and returns its output; a test's own in tests.
    """

    def __init__(
        self, cache_dir: Path, progress: Progress = lambda text: None, run: Callable[..., str] | None = None
    ) -> None:
        self._cache_dir = cache_dir
        self._progress = progress
        self._run = run or run_command
        self._options = _sandbox_option()
        self._private = False

    def fetch(self, name: str) -> tuple[Package, Path]:
        """The candidate version of a package and its file. Of a kernel meta package: the kernel's own package.

        Lists may be older than the mirror, which drops what a newer version replaces: then fresh ones are tried.

        :raises ImageBuildFailed: it cannot be had.
        """
        package = self._find_real(name)
        try:
            return package, self.download(package)
        except ImageBuildFailed as exc:
            if self._private:
                raise
            LOG.info("%s: trying fresh package lists", exc.message)
        self._use_private_lists()
        package = self._find_real(name)
        return package, self.download(package)

    def find(self, name: str) -> Package:
        """The candidate version of a package.

        :raises ImageBuildFailed: no list knows it, or apt is missing.
        """
        package = self._show(name)
        if package is None and not self._private:
            self._use_private_lists()
            package = self._show(name)
        if package is None:
            raise ImageBuildFailed(
                f"apt knows no package {name}: add a Debian source (deb http://deb.debian.org/debian bookworm main) "
                "to /etc/apt, or give the kernel and ramdisk as files"
            )
        return package

    def _find_real(self, name: str) -> Package:
        package = self.find(name)
        if name.startswith("linux-image-"):
            for depend in package.depends:
                if depend.startswith("linux-image-"):
                    return self.find(depend)
        return package

    def download(self, package: Package) -> Path:
        """The package file, from the cache if it is there and whole.

        :raises ImageBuildFailed: it cannot be downloaded, or is not what the signed list says.
        """
        path = self._cache_dir / package.file_name
        if _sha256(path) == package.sha256:
            return path
        self._progress(f"downloading {package.name} {package.version}")
        work = self._cache_dir / f".download-{os.getpid()}"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            self._run(
                ["apt-get", *self._options, "-q", "download", f"{package.name}={package.version}"], _TIMEOUT, cwd=work
            )
            found = list(work.glob("*.deb"))
            if len(found) != 1 or _sha256(found[0]) != package.sha256:
                raise ImageBuildFailed(f"{package.name} arrived damaged: try again")
            os.replace(found[0], path)
        except OSError as exc:
            raise ImageBuildFailed(f"{package.name} cannot be kept in {self._cache_dir}: {exc}") from exc
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return path

    def _show(self, name: str) -> Package | None:
        if not _NAME.fullmatch(name):
            raise ImageBuildFailed(f"{name!r} is no Debian package name: give one like {KERNEL_META_PACKAGE}")
        try:
            text = self._run(["apt-cache", *self._options, "show", "--no-all-versions", name], _TIMEOUT)
        except ImageBuildFailed as exc:
            LOG.debug("apt-cache show %s: %s", name, exc)
            if shutil.which("apt-cache") is None:
                raise
            return None
        return _parse_package(text, name)

    def _use_private_lists(self) -> None:
        self._private = True
        state = self._cache_dir / "apt"
        self._progress("fetching package lists")
        try:
            for folder in ("lists/partial", "cache/archives/partial"):
                (state / folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ImageBuildFailed(f"package lists cannot be kept in {state}: {exc}") from exc
        self._options += ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        self._run(["apt-get", *self._options, "-q", "update"], _TIMEOUT)


def read_member(package: Path, matches: Callable[[str], bool]) -> tuple[str, bytes]:
    """The first regular file of a .deb whose path (``./boot/...``) matches. Nothing else is unpacked.

    :raises ImageBuildFailed: the package has none, or is damaged.
    """
    return read_members(package, matches, 1)[0]


def read_members(package: Path, matches: Callable[[str], bool], count: int) -> list[tuple[str, bytes]]:
    """The first `count` regular files whose paths match, in one pass: (path, content) in the package's order.

    :raises ImageBuildFailed: the package has fewer, or is damaged.
    """
    try:
        unpacker = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as exc:
        raise ImageBuildFailed(f"dpkg-deb cannot be run ({exc.strerror}): install dpkg, or give files") from exc
    found: list[tuple[str, bytes]] = []
    with unpacker:
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                for member in archive:
                    if member.isreg() and matches(member.name):
                        found.append((member.name, _content(archive, member, package)))
                        if len(found) == count:
                            return found
        except (tarfile.TarError, EOFError) as exc:
            raise ImageBuildFailed(f"{package} is damaged: remove it and try again ({exc})") from exc
        finally:
            unpacker.kill()  # what follows the last member is of no interest
    raise ImageBuildFailed(f"{package.name} does not hold what the image needs")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, package: Path) -> bytes:
    content = archive.extractfile(member)
    if content is None or member.size > _MAX_MEMBER:
        raise ImageBuildFailed(f"{member.name} in {package.name} is too large")
    return content.read()


def run_command(command: Sequence[str], timeout: float, cwd: Path | None = None) -> str:
    """Run a program and return what it prints.

    :raises ImageBuildFailed: missing, failed or too slow; with its own last words.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as exc:
        raise ImageBuildFailed(f"{command[0]} is not installed: use a Debian machine, or give the files") from exc
    except subprocess.TimeoutExpired as exc:
        raise ImageBuildFailed(f"{command[0]} did not end within {timeout:.0f} s: check the network") from exc
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
        raise ImageBuildFailed(
            f"{command[0]} failed ({' '.join(words)[:300] or 'no reason given'}): check apt's sources"
        )
    return done.stdout


def _sandbox_option() -> list[str]:
    """Root's apt would hand downloads to the user _apt, which may not write to our folders."""
    try:
        return ["-o", f"APT::Sandbox::User={pwd.getpwuid(os.geteuid()).pw_name}"]
    except KeyError:  # a user without a name, as in some containers, is not root
        return []


def _parse_package(text: str, name: str) -> Package | None:
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            fields[key] = value.strip()
    if fields.get("Package") != name or not fields.get("SHA256") or not fields.get("Version"):
        return None
    depends = (item.split()[0] for item in fields.get("Depends", "").split(",") if item.strip())
    return Package(
        name=name,
        version=fields["Version"],
        architecture=fields.get("Architecture", "all"),
        sha256=fields["SHA256"].lower(),
        depends=tuple(depends),
    )


def _sha256(path: Path) -> str:
    """Hex digest of a file; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
