"""Config drives on the command line: what `reeve domain create` tells a guest's cloud-init."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.cli.base import UsageError
from agent.cli.values import read_json_object, read_text
from hypervisor.toolstack.api import DomainSpec

MAKER = "operator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-drive", metavar="FILE", help="a JSON object for the first boot, as the verb create takes it; or -")
    add("--ssh-key", action="append", metavar="FILE", help="a public key for the guest's user; repeatable")
    add("--user-data", metavar="FILE", help="for cloud-init: #cloud-config, a script, …")
    add("--hostname", metavar="NAME", help="of the guest, by cloud-init")


def wanted(parsed_args: argparse.Namespace) -> dict[str, Any] | None:
    """What the options say, as the verb create takes it; None when there is to be no config drive.

    :raises UsageError: a file cannot be read, or does not fit.
    """
    file, keys, user_data = parsed_args.config_drive, parsed_args.ssh_key, parsed_args.user_data
    if not (file or keys or user_data or parsed_args.hostname):
        return None
    args = read_json_object(file) if file else {}
    if keys:
        args["ssh_keys"] = [*_list(args, "ssh_keys"), *(read_text(path).strip() for path in keys)]
    if user_data:
        args["user_data"] = read_text(user_data)
    if parsed_args.hostname:
        args["hostname"] = parsed_args.hostname
    return args


def _list(args: dict[str, Any], field: str) -> list[Any]:
    value = args.get(field, [])
    if not isinstance(value, list):
        raise UsageError(f"{field} of the config drive is {value!r}: give a list")
    return value


@contextlib.contextmanager
def config_drive(args: dict[str, Any] | None, spec: DomainSpec, folder: str) -> Iterator[DomainSpec]:
    """The spec with a config drive, which is on disk in the block and stays if the block ends well.

    :param folder: of the node's config drives.
    :raises UsageError, InstructionError: it cannot be written.
    """
    if args is None:
        yield spec
        return
    import jsonschema

    from agent.configdrive import Drives
    from agent.configdrive.request import CONFIG_DRIVE_SCHEMA, drive_disk, drive_files, first_boot

    try:
        jsonschema.validate(args, CONFIG_DRIVE_SCHEMA)
    except jsonschema.ValidationError as exc:
        place = ".".join(map(str, exc.absolute_path))
        raise UsageError(f"the config drive's {place or 'object'}: {exc.message[:300]}") from exc
    drives = Drives(Path(folder))
    disk = drive_disk(args, drives, spec.uuid, [item.to_json() for item in spec.disks])
    with_drive = dataclasses.replace(spec, disks=(*spec.disks, disk))
    with_drive.validate()
    drives.write(spec.uuid, *drive_files(args, first_boot(args, spec.uuid, spec.name, spec.nics)), MAKER)
    try:
        yield with_drive
    except BaseException:
        drives.remove(spec.uuid)
        raise


def remove_drive(domain: str, folder: str) -> None:
    """Of a domain that was destroyed."""
    from agent.configdrive import Drives

    Drives(Path(folder)).remove(domain)


def keep_drive(domain: str, saved: str, folder: str) -> None:
    """Of a domain that is saved to the file `saved`, and may come back from it."""
    from agent.configdrive import Drives

    Drives(Path(folder)).keep_for(domain, saved)
