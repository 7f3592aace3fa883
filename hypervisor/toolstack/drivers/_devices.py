"""What drivers that run no back ends themselves ask of disks and nics."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from typing import TypeVar

from hypervisor.errors import DeviceExists, ImageInUse, ImageInvalid, NetworkUnknown
from hypervisor.toolstack.devices import SECTOR, DiskFormat, DiskSpec, NicSpec
from hypervisor.toolstack.spec import DomainSpec

QCOW2_MAGIC = b"QFI\xfb"

_Spec = TypeVar("_Spec", DiskSpec, NicSpec)


def image_size(disk: DiskSpec) -> int:
    """Bytes the guest sees. :raises ImageInvalid: missing, unreadable, or not what `DiskSpec.format` says."""
    try:
        with open(disk.path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) and not stat.S_ISBLK(os.fstat(file.fileno()).st_mode):
                raise ImageInvalid(f"disk {disk.id}: {disk.path} is no file and no block device: give an image")
            head = file.read(32)
            size = file.seek(0, os.SEEK_END)
    except OSError as exc:
        raise ImageInvalid(f"disk {disk.id}: {disk.path}: {exc.strerror}: give a readable image") from exc
    if disk.format is DiskFormat.QCOW2:
        if head[:4] != QCOW2_MAGIC or len(head) < 32:
            raise ImageInvalid(f"disk {disk.id}: {disk.path} is no qcow2 image: give format raw, or another file")
        return int.from_bytes(head[24:32], "big")
    return size // SECTOR * SECTOR


def check_disk(uuid: str, disk: DiskSpec, there: Iterable[DomainSpec]) -> None:
    """:param there: every domain that may hold an image. :raises ImageInvalid, ImageInUse: `uuid` cannot have it."""
    image_size(disk)
    for other in there:
        for theirs in other.disks:
            if other.uuid != uuid and _same_file(theirs.path, disk.path) and not (theirs.shared and disk.shared):
                raise ImageInUse(
                    f"disk {disk.id}: {disk.path} is in use by domain {other.uuid} ({other.name}): detach it"
                    " there, or give both shared"
                )


def check_nic(nic: NicSpec, there: Iterable[DomainSpec], networks: Collection[str]) -> None:
    """:param there: every domain that may hold a MAC. :raises NetworkUnknown, DeviceExists: nobody can have it now."""
    if nic.network not in networks:
        known = ", ".join(sorted(networks))
        raise NetworkUnknown(f"nic {nic.id}: network {nic.network!r} is not configured: give one of {known}")
    for other in there:
        if any(theirs.mac == nic.mac for theirs in other.nics):
            raise DeviceExists(
                f"nic {nic.id}: mac {nic.mac} belongs to domain {other.uuid} ({other.name}): give another"
            )


def attached(there: tuple[_Spec, ...], wanted: _Spec, kind: str) -> bool:
    """Whether that very device is there. :raises DeviceExists: another with its id is."""
    for item in there:
        if item == wanted:
            return True
        if item.id == wanted.id:
            raise DeviceExists(f"{kind} {wanted.id} is attached already, with another spec: detach it or give another")
    return False


def with_one_more(there: tuple[_Spec, ...], new: _Spec) -> tuple[_Spec, ...]:
    """By id."""
    found = list(there)
    found.append(new)
    return tuple(sorted(found, key=lambda item: str(item.id)))


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
