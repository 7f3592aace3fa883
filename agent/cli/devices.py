"""`reeve domain attach-disk`, `detach-disk`, `attach-nic`, `detach-nic`; `reeve block list`, `reeve network list`."""

from __future__ import annotations

import argparse
import secrets
import time
from typing import Any

from agent.cli.base import List, Show, Table, UsageError, find_domain, plain, progress
from agent.cli.values import rate_bytes, seconds
from hypervisor.errors import DeviceNotFound, DomainNotFound
from hypervisor.toolstack.api import DomainInfo, DomainState, Toolstack
from hypervisor.toolstack.devices import MAX_NICS, DeviceInfo, DeviceState, DiskFormat, DiskSpec, NicSpec


def disk_of(text: str) -> dict[str, Any]:
    """``xvda=/path,format=qcow2,readonly`` as the JSON form of a disk.

    :raises UsageError: it is not of that form.
    """
    first, *words = text.split(",")
    ident, equals, path = first.partition("=")
    if not equals or not path:
        raise UsageError(f"disk {text!r} is not of the form xvda=/path/to/image[,format=qcow2][,readonly][,shared]…")
    return {"id": ident, "path": path, **_fields(text, words, {"format"}, {"readonly", "direct", "shared"})}


def nic_of(text: str, default_id: int) -> dict[str, Any]:
    """``network=default,mac=00:16:3e:…,address=192.0.2.5`` as the JSON form of a nic; all of it may be left out.

    :raises UsageError: it is not of that form.
    """
    words = text.split(",") if text else []
    addresses = [word.partition("=")[2] for word in words if word.startswith("address=")]
    rest = [word for word in words if not word.startswith("address=")]
    fields = _fields(text, rest, {"network", "mac"}, set())
    return {"id": default_id, "mac": random_mac(), "addresses": addresses, **fields}


def random_mac() -> str:
    """One of Xen's range, 00:16:3e."""
    return "00:16:3e:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def _fields(text: str, words: list[str], named: set[str], flags: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key in flags and not equals:
            fields[key] = True
        elif key in named and value:
            fields[key] = value
        else:
            known = [*sorted(f"{name}=…" for name in named), *sorted(flags)]
            raise UsageError(f"{word!r} in {text!r} is not known: give {', '.join(known)}")
    return fields


class _Attach(Show):
    """Adds a device and says what became of it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("domain", metavar="NAME|UUID", help="which domain")
        self.add_device(parser)
        add("--bytes-per-second", type=rate_bytes, default=0, metavar="SIZE", help="limit, for example 50M; 0: none")
        add("--iops", type=int, default=0, metavar="N", help="requests (nic: packets) a second; 0: no limit")
        add("--wait", type=seconds, default=10.0, metavar="SECONDS", help="for the guest to take it up (default 10)")

    def add_device(self, parser: argparse.ArgumentParser) -> None:
        raise NotImplementedError

    def attach(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> DeviceInfo:
        raise NotImplementedError

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            device = self.attach(toolstack, info, parsed_args)
            with progress(f"waiting for {info.name} to take {device.kind} {device.id} up"):
                device = _taken_up(toolstack, info.uuid, device, parsed_args.wait)
        return show_device(device)


class DomainAttachDisk(_Attach):
    """Give a domain one more disk. It becomes part of its spec."""

    examples = (
        ("reeve domain attach-disk web xvdb /srv/data.img", "a raw image, or a block device"),
        (
            "reeve domain attach-disk web xvdb /srv/data.qcow2 --image-format qcow2 --readonly",
            "never guessed: say qcow2",
        ),
        ("reeve domain attach-disk web xvdb /srv/data.img --bytes-per-second 50M --iops 500", "with limits"),
    )
    notes = (
        "The guest sees it by its ID. With state `connecting` the guest has not taken it up (yet); it stays attached."
    )

    def add_device(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("id", metavar="ID", help="xvda to xvdp")
        add("path", metavar="PATH", help="full path of the image or block device")
        add("--image-format", choices=[item.value for item in DiskFormat], default="raw", help="default raw")
        add("--readonly", action="store_true", help="the guest cannot write")
        add("--direct", action="store_true", help="past the host's page cache")
        add("--no-discard", action="store_true", help="the guest cannot punch holes")
        add("--shared", action="store_true", help="other domains may use it, too")

    def attach(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> DeviceInfo:
        fields = {
            "id": parsed_args.id,
            "path": parsed_args.path,
            "format": parsed_args.image_format,
            "readonly": parsed_args.readonly,
            "direct": parsed_args.direct,
            "discard": not parsed_args.no_discard,
            "shared": parsed_args.shared,
            "limits": limits(parsed_args),
        }
        disk = DiskSpec.from_json(fields)
        disk.validate()
        return toolstack.attach_disk(info.uuid, disk)


class DomainAttachNic(_Attach):
    """Give a domain one more network interface. It becomes part of its spec."""

    examples = (
        ("reeve domain attach-nic web", "on the network `default`, with a MAC of its own"),
        ("reeve domain attach-nic web --network blue --mac 00:16:3e:12:34:56", "as you say"),
        ("reeve domain attach-nic web --address 192.0.2.5 --address 2001:db8::5", "it may send from these only"),
    )

    def add_device(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--id", type=int, metavar="N", help=f"0 to {MAX_NICS - 1}; default: the next free one")
        add("--mac", metavar="MAC", help="default: a random one of Xen's, 00:16:3e:…")
        add("--network", default="default", metavar="NAME", help="a network of the host (default: default)")
        add("--address", action="append", default=[], metavar="IP", help="the guest may send from it; repeatable")
        add("--queues", type=int, default=1, metavar="N", help="pairs of rings, 1 to 8 (default 1)")

    def attach(self, toolstack: Toolstack, info: DomainInfo, parsed_args: argparse.Namespace) -> DeviceInfo:
        number = parsed_args.id
        if number is None:
            taken = {device.id for device in toolstack.list_devices(info.uuid) if device.kind == "nic"}
            number = next((n for n in range(MAX_NICS) if str(n) not in taken), MAX_NICS)
        fields = {
            "id": number,
            "mac": parsed_args.mac or random_mac(),
            "network": parsed_args.network,
            "addresses": parsed_args.address,
            "queues": parsed_args.queues,
            "limits": limits(parsed_args),
        }
        nic = NicSpec.from_json(fields)
        nic.validate()
        return toolstack.attach_nic(info.uuid, nic)


class _Detach(Show):
    kind = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("domain", metavar="NAME|UUID", help="which domain")
        add("id", metavar="ID", help=f"of the {self.kind}; see `reeve {_group(self.kind)} list`")
        add("--wait", type=seconds, default=30.0, metavar="SECONDS", help="what the guest has (default 30)")
        add("--force", action="store_true", help="take it away when the guest has not let go of it by then")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            there = [device.id for device in toolstack.list_devices(info.uuid) if device.kind == self.kind]
            if parsed_args.id not in there:
                raise DeviceNotFound(f"{info.name} has no {self.kind} {parsed_args.id}: it has {_names(there)}")
            with progress(f"waiting for {info.name} to let go of {self.kind} {parsed_args.id}"):
                toolstack.detach_device(info.uuid, self.kind, parsed_args.id, parsed_args.wait, force=parsed_args.force)
        return ("domain", "kind", "id", "state"), (info.name, self.kind, parsed_args.id, "detached")


class DomainDetachDisk(_Detach):
    """Have the guest let go of a disk and take it away."""

    kind = "disk"
    examples = (
        ("reeve domain detach-disk web xvdb", "exit code 1 (domain.timeout) if the guest keeps it"),
        ("reeve domain detach-disk web xvdb --wait 5 --force", "take it away after 5 s; what the guest holds is lost"),
    )


class DomainDetachNic(_Detach):
    """Have the guest let go of a network interface and take it away."""

    kind = "nic"
    examples = (("reeve domain detach-nic web 1", "by its number; see `reeve network list`"),)


class _DeviceList(List):
    kind = ""
    columns: tuple[str, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", nargs="?", metavar="NAME|UUID", help="only of this domain")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        rows: list[tuple[object, ...]] = []
        with self.toolstack() as toolstack:
            one = parsed_args.domain
            for info in [find_domain(toolstack, one)] if one else toolstack.list_domains():
                try:
                    devices = toolstack.list_devices(info.uuid)
                except DomainNotFound:
                    if one:
                        raise
                    continue  # it ended while the others were looked at
                for device in devices:
                    if device.kind == self.kind:
                        data = plain({**device.spec, **device.to_json(), "domain": info.name, "uuid": info.uuid})
                        row = [data.get(column) for column in self.columns[:-1]]
                        rows.append((*row, Table(data["stats"])))
        return self.columns, rows


class BlockList(_DeviceList):
    """List the disks of a domain, or of all of them."""

    kind = "disk"
    columns = ("domain", "uuid", "id", "state", "size_bytes", "path", "format", "readonly", "detail", "stats")
    examples = (
        ("reeve block list", "every disk on this host"),
        ("reeve block list web -c id -c size_bytes -c path", "of one domain, some columns"),
        ("reeve block list -f json", "with counters, for a program"),
    )


class NetworkList(_DeviceList):
    """List the network interfaces of a domain, or of all of them."""

    kind = "nic"
    columns = ("domain", "uuid", "id", "state", "network", "mac", "addresses", "queues", "detail", "stats")
    examples = (
        ("reeve network list", "every interface on this host"),
        ("reeve network list web -f json", "of one domain, with counters, for a program"),
    )


def limits(parsed_args: argparse.Namespace) -> dict[str, Any]:
    return {"bytes_per_second": parsed_args.bytes_per_second, "iops": parsed_args.iops}


def show_device(device: DeviceInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    data = plain(device.to_json())
    return tuple(data), tuple(Table(value) if isinstance(value, dict) else value for value in data.values())


def _taken_up(toolstack: Toolstack, uuid: str, device: DeviceInfo, timeout: float) -> DeviceInfo:
    """The device once the guest uses it, or as it is after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while device.state is DeviceState.CONNECTING and time.monotonic() < deadline:
        if toolstack.get_domain(uuid).state is not DomainState.RUNNING:
            break  # nobody there to take it up
        time.sleep(0.05)
        device = next(
            (now for now in toolstack.list_devices(uuid) if (now.kind, now.id) == (device.kind, device.id)), device
        )
    return device


def _group(kind: str) -> str:
    return "block" if kind == "disk" else "network"


def _names(there: list[str]) -> str:
    return ", ".join(there) or "none"
