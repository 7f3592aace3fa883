"""What ``xl`` prints, as data. Strict: a line that is not understood is an error with its text, never a guess.

The forms are those of Xen 4.17. ``xl list -l`` is JSON; everything else is text for people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypervisor.errors import HostFailure
from hypervisor.toolstack.drivers.xl.runner import shown

MAX_DOMAINS = 0x7FF0
"""DOMID_FIRST_RESERVED: more cannot be."""

_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_LIST_HEADER = re.compile(
    r"Name {2,}ID {2,}Mem VCPUs\tState\tTime\(s\)(?P<verbose>\s+UUID\s+Reason-Code\s+Security Label)?"
)
_LIST_ROW = re.compile(
    r"(?P<name>\S.*?)\s+(?P<id>\d+)\s+(?P<mem>\d+)\s+(?P<vcpus>\d+)\s+(?P<flags>[r-][b-][p-][s-][-rscwS?][d-])"
    r"\s+(?P<time>\d+\.\d)"
    rf"(?P<rest>\s+(?P<uuid>{_UUID})\s+(?P<reason>[0-9a-f]{{1,8}}|-)\s+(?P<label>\S+))?"
)
_VCPU_HEADER = re.compile(r"Name\s+ID\s+VCPU\s+CPU\s+State\s+Time\(s\)\s+Affinity \(Hard / Soft\)")
_VCPU_ROW = re.compile(
    r"(?P<name>\S.*?)\s+(?P<id>\d+)\s+(?P<vcpu>\d+)\s+(?P<cpu>\d+|-)\s+(?P<flags>[r-][b-][p-])"
    r"\s+(?P<time>\d+\.\d)\s+(?P<hard>[\w,^-]+) / (?P<soft>[\w,^-]+)"
)
_SCHED_POOL = re.compile(r"Cpupool (?P<pool>\S.*): (?P<facts>.*)")
_SCHED_HEADER = re.compile(r"Name\s+ID\s+Weight\s+Cap")
_SCHED_ROW = re.compile(r"(?P<name>\S.*?)\s+(?P<id>\d+)\s+(?P<weight>\d+)\s+(?P<cap>\d+)")
_POOL_HEADER = re.compile(r"Name\s+CPUs\s+Sched\s+Active\s+Domain count")
_POOL_ROW = re.compile(r"(?P<name>\S.*?)\s+(?P<cpus>\d+)\s+(?P<sched>[a-z0-9_]+)\s+(?P<active>[yn])\s+(?P<domains>\d+)")
_NIC_HEADER = re.compile(r"Idx\s+BE\s+Mac Addr\.\s+handle\s+state\s+evt-ch\s+tx-/rx-ring-ref\s+BE-path")
_NIC_ROW = re.compile(
    r"(?P<idx>\d+)\s+(?P<be>\d+)\s+(?P<mac>[0-9a-f]{2}(?::[0-9a-f]{2}){5})\s+(?P<handle>-?\d+)\s+(?P<state>-?\d+)"
    r"\s+(?P<evtch>-?\d+)\s+(?P<tx>-?\d+)/(?P<rx>-?\d+)\s+(?P<path>/\S+)"
)
_DISK_HEADER = re.compile(r"Vdev\s+BE\s+handle\s+state\s+evt-ch\s+ring-ref\s+BE-path")
_DISK_ROW = re.compile(
    r"(?P<idx>\d+)\s+(?P<be>\d+)\s+(?P<handle>-?\d+)\s+(?P<state>-?\d+)\s+(?P<evtch>-?\d+)\s+(?P<ref>-?\d+)"
    r"\s+(?P<path>/\S+)"
)
_INFO = re.compile(r"(?P<key>[a-z][a-z0-9_ ]*?)\s*: ?(?P<value>.*)")
_INFO_NEEDED = ("host", "nr_cpus", "total_memory", "free_memory", "xen_version", "xen_caps", "virt_caps")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of ``xl list``.

    :ivar name: as it is; other toolstacks may use spaces in it.
    :ivar memory_mib: what it has now.
    :ivar vcpus: online.
    :ivar flags: the letters of ``rbpscd`` that are set. ``xl`` has the reason's letter where the ``c`` is: of one that
        crashed it is kept, any other is in `reason`.
    :ivar uuid: empty without ``-v``; ``reason``: why it ended, a number of SCHEDOP_shutdown, or None.
    """

    name: str
    domid: int
    memory_mib: int
    vcpus: int
    flags: str
    seconds: float
    uuid: str = ""
    reason: int | None = None


@dataclass(frozen=True, slots=True)
class VcpuRow:
    """A line of ``xl vcpu-list``. :ivar cpu: where it runs now; None: it is offline."""

    domid: int
    vcpu: int
    cpu: int | None
    flags: str
    seconds: float
    hard: str
    soft: str


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A line of ``xl block-list`` or ``network-list``.

    :ivar devid: its number, by which the back end and the guest know it.
    :ivar state: XenbusState as the guest's front end says; whatever the guest wrote, -1 when it removed the node.
    :ivar path: of the back end in xenstore.
    :ivar mac: of a nic.
    """

    devid: int
    state: int
    path: str
    mac: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """A line of ``xl cpupool-list``."""

    name: str
    cpus: int
    scheduler: str
    active: bool
    domains: int


def domain_rows(text: str) -> list[Row]:
    """Of ``xl list`` or ``xl list -v``, by domid. :raises HostFailure: a line is not understood, or there are none."""
    lines = _lines(text, "list")
    header = _match(_LIST_HEADER, next(lines, ""), "list")
    found = []
    for line in lines:
        row = _match(_LIST_ROW, line, "list")
        if bool(row["rest"]) is not bool(header["verbose"]):
            raise _unknown("list", line)
        reason = None if row["reason"] in (None, "-") else int(row["reason"], 16)
        letters = row["flags"]
        flags = (letters if letters[4] == "c" else letters[:4] + letters[5:]).replace("-", "")
        numbers = (int(row["id"]), int(row["mem"]), int(row["vcpus"]))
        found.append(Row(row["name"], *numbers, flags, float(row["time"]), row["uuid"] or "", reason))
    domids = [row.domid for row in found]
    if not found or len(found) > MAX_DOMAINS or len(set(domids)) != len(domids):
        raise HostFailure(f"xl list: {len(found)} domains, or one twice: that cannot be; is it xl?")
    return sorted(found, key=lambda row: row.domid)


def domain_configs(text: str) -> dict[int, dict[str, Any]]:
    """``config`` of each domain of ``xl list -l``, by domid. :raises HostFailure: it is not of that form."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise HostFailure(f"xl list -l: no JSON ({shown(str(exc))[:80]}): {shown(text)[:80]!r}") from None
    if isinstance(found, dict):
        found = [found]  # of one domain that was named
    if not isinstance(found, list):
        raise HostFailure(f"xl list -l: a list was expected, not {shown(text)[:80]!r}")
    configs = {}
    for item in found:
        domid, config = (item.get("domid"), item.get("config")) if isinstance(item, dict) else (None, None)
        if not isinstance(domid, int) or isinstance(domid, bool) or not isinstance(config, dict) or domid in configs:
            raise HostFailure(f"xl list -l: an item is no domain: {shown(json.dumps(item))[:120]}")
        configs[domid] = config
    return configs


def host_facts(text: str) -> dict[str, str]:
    """``key: value`` of ``xl info``. :raises HostFailure: a line is not understood, or a needed one is missing."""
    facts: dict[str, str] = {}
    for line in _lines(text, "info"):
        row = _match(_INFO, line, "info")
        if row["key"] in facts:
            raise HostFailure(f"xl info: {row['key']} comes twice: is it xl?")
        facts[row["key"]] = row["value"].strip()
    for key in _INFO_NEEDED:
        if key not in facts:
            raise HostFailure(f"xl info: no {key} in its output: is it of Xen 4.17, and whole?")
    for key in ("nr_cpus", "total_memory", "free_memory"):
        if not re.fullmatch(r"\d{1,12}", facts[key]):
            raise HostFailure(f"xl info: {key} is {shown(facts[key])[:40]!r}, no number")
    return facts


def vcpu_rows(text: str) -> list[VcpuRow]:
    """Of ``xl vcpu-list``. :raises HostFailure: a line is not understood."""
    return [
        VcpuRow(
            int(row["id"]),
            int(row["vcpu"]),
            None if row["cpu"] == "-" else int(row["cpu"]),
            row["flags"].replace("-", ""),
            float(row["time"]),
            row["hard"],
            row["soft"],
        )
        for row in _table(text, "vcpu-list", _VCPU_HEADER, _VCPU_ROW)
    ]


def disk_rows(text: str) -> list[DeviceRow]:
    """Of ``xl block-list`` of one domain. :raises HostFailure: a line is not understood."""
    rows = _table(text, "block-list", _DISK_HEADER, _DISK_ROW)
    return _devices("block-list", [DeviceRow(int(row["idx"]), int(row["state"]), row["path"]) for row in rows])


def nic_rows(text: str) -> list[DeviceRow]:
    """Of ``xl network-list`` of one domain. :raises HostFailure: a line is not understood."""
    rows = _table(text, "network-list", _NIC_HEADER, _NIC_ROW)
    found = [DeviceRow(int(row["idx"]), int(row["state"]), row["path"], row["mac"]) for row in rows]
    return _devices("network-list", found)


def _devices(verb: str, rows: list[DeviceRow]) -> list[DeviceRow]:
    """:raises HostFailure: one twice, or a back end that is not its own: that cannot be."""
    for row in rows:
        if not row.path.endswith(f"/{row.devid}") or not row.path.startswith("/local/domain/") or "//" in row.path:
            raise HostFailure(f"xl {verb}: {shown(row.path)[:80]!r} is no back end of device {row.devid}: is it xl?")
    if len({row.devid for row in rows}) != len(rows):
        raise HostFailure(f"xl {verb}: a device comes twice: is it xl?")
    return rows


def pools(text: str) -> list[Pool]:
    """Of ``xl cpupool-list``. :raises HostFailure: a line is not understood."""
    return [
        Pool(row["name"], int(row["cpus"]), row["sched"], row["active"] == "y", int(row["domains"]))
        for row in _table(text, "cpupool-list", _POOL_HEADER, _POOL_ROW)
    ]


def weights(text: str) -> dict[int, tuple[int, int]]:
    """Weight and cap by domid, of ``xl sched-credit2`` or ``sched-credit``. :raises HostFailure: not understood."""
    found: dict[int, tuple[int, int]] = {}
    wanted = "pool"
    for line in _lines(text, "sched-credit2"):
        if _SCHED_POOL.fullmatch(line):
            wanted = "header"
        elif wanted == "header":
            _match(_SCHED_HEADER, line, "sched-credit2")
            wanted = "row"
        elif wanted == "row":
            row = _match(_SCHED_ROW, line, "sched-credit2")
            found[int(row["id"])] = (int(row["weight"]), int(row["cap"]))
        else:
            raise _unknown("sched-credit2", line)
    if wanted != "row":
        raise HostFailure("xl sched-credit2: its output is cut short")
    return found


def _table(text: str, verb: str, header: re.Pattern[str], row: re.Pattern[str]) -> list[re.Match[str]]:
    lines = _lines(text, verb)
    _match(header, next(lines, ""), verb)
    return [_match(row, line, verb) for line in lines]


def _lines(text: str, verb: str) -> Iterator[str]:
    if text and not text.endswith("\n"):
        raise HostFailure(f"xl {verb}: its output is cut short at {shown(text.splitlines()[-1])[:80]!r}")
    return iter([line.rstrip() for line in text.split("\n")[:-1]])


def _match(pattern: re.Pattern[str], line: str, verb: str) -> re.Match[str]:
    found = pattern.fullmatch(line) if len(line) < 4096 else None
    if found is None:
        raise _unknown(verb, line)
    return found


def _unknown(verb: str, line: str) -> HostFailure:
    return HostFailure(f"xl {verb}: this line is not understood: {shown(line)[:160]!r}")
