"""`reeve top`: CPU, memory, disk and network rates of every domain."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from agent.cli.base import Common
from agent.cli.values import seconds
from hypervisor.errors import DomainNotFound, ToolstackError
from hypervisor.toolstack.api import DomainInfo, Toolstack

_COUNTERS = {
    "disk_read": ("disk", "read_bytes"),
    "disk_write": ("disk", "write_bytes"),
    "net_rx": ("nic", "rx_bytes"),
    "net_tx": ("nic", "tx_bytes"),
}
_REQUESTS = ("read_requests", "write_requests")
SORTS = ("cpu", "memory", "disk", "net", "name")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The counters of one domain at one moment.

    :ivar time: monotonic, seconds. `cpu_ns`: CPU time. `counters`: by name, bytes or requests since the run began.
    """

    info: DomainInfo
    time: float
    cpu_ns: int
    counters: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The rates of one domain between two samples: percent of one CPU, bytes and requests a second."""

    uuid: str
    name: str
    domid: int
    state: str
    vcpus: int
    cpu_percent: float
    memory_mib: int
    max_memory_mib: int
    disk_read_bytes_per_second: float
    disk_write_bytes_per_second: float
    disk_requests_per_second: float
    net_rx_bytes_per_second: float
    net_tx_bytes_per_second: float


def take(toolstack: Toolstack) -> dict[str, Sample]:
    """A sample of every domain; one without counters (foreign, unreadable) counts with what is known of it."""
    samples = {}
    for info in toolstack.list_domains():
        try:
            stats: Mapping[str, Any] = toolstack.stats(info.uuid)
        except DomainNotFound:
            continue  # it ended while the others were looked at
        except ToolstackError:
            stats = {}
        devices = stats.get("devices") or []
        counters = {name: _sum(devices, *of) for name, of in _COUNTERS.items()}
        counters["disk_requests"] = sum(_sum(devices, "disk", name) for name in _REQUESTS)
        cpu_ns = stats.get("cpu_time_ns", info.cpu_time_ns)
        samples[info.uuid] = Sample(info, time.monotonic(), cpu_ns, counters)
    return samples


def rates(before: Mapping[str, Sample], now: Mapping[str, Sample], sort: str) -> list[Row]:
    """The rows, highest first (by name: in order). A domain that is new since `before` has none yet: 0."""
    rows = []
    for uuid, sample in now.items():
        old, info = before.get(uuid), sample.info
        again = old is None or old.info.domid != info.domid
        elapsed = 0.0 if old is None or again else sample.time - old.time

        def rate(value: int, was: int, elapsed: float = elapsed) -> float:
            return round(max(0, value - was) / elapsed, 1) if elapsed > 0 else 0.0

        was = old.counters if old is not None and not again else sample.counters
        gone = {name: rate(value, was[name]) for name, value in sample.counters.items()}
        cpu_was = old.cpu_ns if old is not None and not again else sample.cpu_ns
        rows.append(
            Row(
                uuid=uuid,
                name=info.name,
                domid=info.domid,
                state=info.state.value,
                vcpus=info.vcpus,
                cpu_percent=round(rate(sample.cpu_ns, cpu_was) / 1e7, 1),
                memory_mib=info.memory_mib,
                max_memory_mib=info.max_memory_mib,
                disk_read_bytes_per_second=gone["disk_read"],
                disk_write_bytes_per_second=gone["disk_write"],
                disk_requests_per_second=gone["disk_requests"],
                net_rx_bytes_per_second=gone["net_rx"],
                net_tx_bytes_per_second=gone["net_tx"],
            )
        )
    if sort == "name":
        return sorted(rows, key=lambda row: row.name)
    keys = {
        "cpu": lambda row: row.cpu_percent,
        "memory": lambda row: row.memory_mib,
        "disk": lambda row: row.disk_read_bytes_per_second + row.disk_write_bytes_per_second,
        "net": lambda row: row.net_rx_bytes_per_second + row.net_tx_bytes_per_second,
    }
    return sorted(rows, key=lambda row: (-keys[sort](row), row.name))


class Top(Common):
    """Show CPU, memory, disk and network rates of every domain, anew every few seconds."""

    examples = (
        ("reeve top", "until Ctrl-C"),
        ("reeve top --sort disk --interval 5", "who uses the disks, over 5 s"),
        ("reeve top --once", "one table, for a look or a log"),
        ("reeve top --once -f json", "one JSON object, for a program; without --once one a line"),
    )
    notes = (
        "CPU is percent of one CPU: a domain with 4 busy vCPUs has 400. Rates are over the last interval; a domain\n"
        "that has just started has none yet. In a pipe, without -f json, it prints one table and ends."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--interval", type=seconds, default=2.0, metavar="SECONDS", help="over which rates are taken (default 2)")
        add("--once", action="store_true", help="print one table and end")
        add("--count", type=int, default=0, metavar="N", help="end after so many")
        add("--sort", choices=SORTS, default="cpu", help="highest first (default cpu)")
        add("-f", "--format", choices=["table", "json"], default="table", help="default table")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        interval, form = max(0.01, parsed_args.interval), parsed_args.format
        live = form == "table" and self.app.stdout.isatty() and not parsed_args.once
        count = parsed_args.count or (0 if live or (form == "json" and not parsed_args.once) else 1)
        with self.toolstack() as toolstack:
            if live:
                self._live(toolstack, interval, parsed_args.sort, count)
                return 0
            before, told = take(toolstack), 0
            while not count or told < count:
                time.sleep(interval)
                now = take(toolstack)
                rows = rates(before, now, parsed_args.sort)
                self.app.stdout.write(_json(rows, interval) if form == "json" else _text(rows))
                self.app.stdout.flush()
                before, told = now, told + 1
        return 0

    def _live(self, toolstack: Toolstack, interval: float, sort: str, count: int) -> None:
        from rich.console import Console
        from rich.live import Live

        before, told = take(toolstack), 0
        with Live(_table([], toolstack, interval), console=Console(file=sys.stdout), screen=True) as screen:
            while not count or told < count:
                time.sleep(interval)
                now = take(toolstack)
                screen.update(_table(rates(before, now, sort), toolstack, interval), refresh=True)
                before, told = now, told + 1


def _sum(devices: Any, kind: str, counter: str) -> int:
    return sum(int(device["stats"].get(counter, 0)) for device in devices if device["kind"] == kind)


def _json(rows: list[Row], interval: float) -> str:
    domains = [dataclasses.asdict(row) for row in rows]
    return json.dumps({"time": time.time(), "interval_seconds": interval, "domains": domains}) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.state,
        str(row.vcpus),
        f"{row.cpu_percent:.1f}",
        f"{row.memory_mib}",
        human(row.disk_read_bytes_per_second),
        human(row.disk_write_bytes_per_second),
        f"{row.disk_requests_per_second:.0f}",
        human(row.net_rx_bytes_per_second),
        human(row.net_tx_bytes_per_second),
    )


_HEADS = ("NAME", "STATE", "VCPUS", "CPU%", "MEM MiB", "READ/s", "WRITE/s", "IO/s", "RX/s", "TX/s")


def _text(rows: list[Row]) -> str:
    cells = [_HEADS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
    lines = []
    for line in cells:
        sized = enumerate(zip(line, widths, strict=True))
        padded = [cell.ljust(width) if number < 2 else cell.rjust(width) for number, (cell, width) in sized]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], toolstack: Toolstack, interval: float) -> Any:
    from rich.table import Table

    host = toolstack.host_info()
    used = host.memory_total_mib - host.memory_free_mib
    title = f"{host.hostname}: {host.domains} domains, {host.cpus} CPUs, {used} of {host.memory_total_mib} MiB"
    table = Table(title=title, caption=f"every {interval:g} s; Ctrl-C ends", expand=True, box=None)
    for number, head in enumerate(_HEADS):
        table.add_column(head, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def human(value: float) -> str:
    """A rate or size in bytes, in three digits or so."""
    for unit in ("", "K", "M", "G"):
        if value < 1024:
            return f"{value:.0f}{unit}" if unit == "" or value >= 100 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"
