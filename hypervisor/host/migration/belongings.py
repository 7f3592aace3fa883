"""What the host process holds of a domain, as it goes to another host: record, xenstore, console, devices.

The sender is the operator's other host, proved by its certificate; still its bytes are checked like any message, and a
domain that comes with nonsense is refused before anything of this host is touched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from hypervisor.errors import MigrationFailed, SpecInvalid
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.device_specs import key_of, specs_of
from hypervisor.host.records import DomainRecord, Phase, RunSizes
from hypervisor.toolstack.api import DomainSpec, DomainState

VERSION = 1
MAX_BYTES = 16 << 20
MAX_DEVICE_BYTES = 128 * 1024
MAX_TYPED = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Belongings:
    """:ivar store: of `hypervisor.xenstore.moving`. :ivar console: of `ConsoleRing.save`; `printed` what of the log the
    target has not got yet. :ivar devices: as in `DomainRecord.devices`.
    """

    spec: DomainSpec
    domid: int
    run: RunSizes
    created_at: float
    started_at: float
    restarts: int
    cpu_time_ns: int
    store: Mapping[str, Any]
    console: Mapping[str, Any]
    printed: bytes
    devices: Mapping[str, Any]

    @classmethod
    def of(
        cls, record: DomainRecord, store: Mapping[str, Any], printed: bytes, devices: Mapping[str, Any]
    ) -> Belongings:
        return cls(
            spec=record.spec,
            domid=record.domid,
            run=record.run,
            created_at=record.created_at,
            started_at=record.started_at,
            restarts=record.restarts,
            cpu_time_ns=record.cpu_time_ns,
            store=store,
            console=record.console,
            printed=printed,
            devices=devices,
        )

    def pack(self) -> bytes:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data |= {"version": VERSION, "spec": self.spec.to_json(), "run": dataclasses.asdict(self.run)}
        data["printed"] = self.printed.decode("latin-1")
        return json.dumps(data, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Belongings:
        """:raises MigrationFailed: it is none, or of another version."""
        try:
            fields = _object(json.loads(data) if len(data) <= MAX_BYTES else None)
            if (version := fields.pop("version", None)) != VERSION:
                raise ValueError(f"version {version!r}, this host knows {VERSION}")
            fields["spec"] = DomainSpec.from_json(_object(fields["spec"]))
            fields["run"] = _sizes(fields["run"])
            for name in ("store", "console", "devices"):
                _object(fields[name])
            for name in ("domid", "restarts", "cpu_time_ns"):
                if type(fields[name]) is not int or not 0 <= fields[name] < 1 << 63:
                    raise ValueError(f"{name} is {str(fields[name])[:40]!r}")
            for name in ("created_at", "started_at"):
                fields[name] = float(fields[name])
            fields["printed"] = fields["printed"].encode("latin-1")
            if len(str(fields["console"].get("typed", ""))) > MAX_TYPED:
                raise ValueError("its console has too much typed")
            made = cls(**fields)
            made._check_devices()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SpecInvalid) as exc:
            raise MigrationFailed(f"what the source says of the domain makes no sense: {str(exc)[:200]}") from exc
        return made

    def tell(self, record: DomainRecord, spec: DomainSpec, commands: str) -> DomainRecord:
        """To the record of the half that is all here now. :param commands: that decide what becomes of it."""
        record.spec = spec
        record.run, record.restarts, record.cpu_time_ns = self.run, self.restarts, self.cpu_time_ns
        record.created_at, record.started_at = self.created_at, self.started_at
        record.console, record.devices = dict(self.console), dict(self.devices)
        record.phase, record.state = Phase.MADE, DomainState.PAUSED
        record.detail = f"whole and paused until it is known that it left its source: {commands}"
        return record

    def _check_devices(self) -> None:
        known = {key_of(spec) for spec in specs_of(self.spec)}
        for key, memory in self.devices.items():
            if key not in known or len(json.dumps(memory)) > MAX_DEVICE_BYTES:
                raise ValueError(f"device {key[:40]!r}")
            _check_memory(DeviceMemory.from_json(memory))


def _check_memory(memory: DeviceMemory) -> None:
    good = isinstance(memory.broken, str) and isinstance(memory.leaving, bool) and type(memory.restarts) is int
    good = good and (memory.front is None or isinstance(memory.front, dict)) and isinstance(memory.counted, dict)
    good = good and all(isinstance(k, str) and type(v) is int for k, v in memory.counted.items())
    if not good or not (memory.carried is None or isinstance(memory.carried, dict)):
        raise ValueError("a device's memory that is none")


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object is missing, or too large")
    return value


def _sizes(value: object) -> RunSizes:
    sizes = RunSizes(**_object(value))
    if any(type(size) is not int or not 0 < size < 1 << 31 for size in dataclasses.astuple(sizes)):
        raise ValueError("sizes of no domain")
    return sizes
