"""The fake driver's save and restore: a file of its own form, one JSON object after a line that names it."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import Any

from hypervisor.errors import HostFailure, OperationTimeout, SpecInvalid, StreamInvalid, StreamUnsupported, WrongState
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, SaveInfo
from hypervisor.toolstack.drivers import _fake_guest as guest
from hypervisor.toolstack.drivers._fake_devices import DeviceVerbs, appearing
from hypervisor.toolstack.drivers._fake_store import FakeDomain

MAGIC = "reeve fake domain"
FORM = 1
MAX_BYTES = 1 << 20


class SavingVerbs(DeviceVerbs):
    """Part of `hypervisor.toolstack.drivers.fake.FakeToolstack`."""

    def check_room(self, spec: DomainSpec, memory_mib: int = 0) -> None:
        raise NotImplementedError

    def save(self, uuid: str, path: str, *, keep_running: bool = False, timeout: float = 60.0) -> SaveInfo:
        began = time.monotonic()
        with self._verb("save"):
            domain = self._live(uuid, "save")
            if not path.startswith("/") or "\0" in path or os.path.lexists(path):
                raise SpecInvalid(f"save file {path!r}: give a full path where nothing is yet")
            if domain.state is not DomainState.RUNNING:
                raise WrongState(f"domain {uuid} is {domain.state.value}, its guest cannot suspend: unpause it first")
            if guest.option(domain, "shutdown") == "ignore":
                raise OperationTimeout(f"the guest of domain {uuid} did not suspend within {timeout:g} s: it runs on")
            try:
                with appearing(path) as file:
                    file.write(f"{MAGIC} {FORM}\n{json.dumps(domain.to_json())}\n")
                size = os.path.getsize(path)
            except OSError as exc:
                raise HostFailure(f"save file {path} cannot be written: {exc.strerror}: give another") from exc
            if not keep_running:
                self.store.delete(uuid)
                self.store.emit("destroyed", uuid, "saved")
            took = time.monotonic() - began
            pages = domain.memory_mib * 256
            return SaveInfo(uuid, domain.spec.name, path, size, pages, took * 1000 if keep_running else 0.0, took)

    def restore(self, path: str, *, owner: str, name: str = "", uuid: str = "") -> DomainInfo:
        with self._verb("restore"):
            kept = _read(path)
            spec = dataclasses.replace(kept.spec, owner=owner, name=name or kept.spec.name, uuid=uuid or kept.spec.uuid)
            spec.validate()
            self.check_room(spec, kept.held_mib)
            self.new_devices(spec)  # looks at images and networks; what was counted goes on
            kept.spec, kept.domid, kept.created_at = spec, self.store.next_domid(), time.time()
            kept.state, kept.readable, kept.migration, kept.hidden = DomainState.PAUSED, True, "", False
            kept.template = ""
            self.store.put(kept)
            self.store.emit("created", spec.uuid, "restored")
            return kept.info()


def _read(path: str) -> FakeDomain:
    """:raises SpecInvalid, StreamInvalid: no such file, or none of `SavingVerbs.save`."""
    if not path.startswith("/") or "\0" in path:
        raise SpecInvalid(f"save file {path!r}: give a full path")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise SpecInvalid(f"save file {path}: {exc.strerror}: give a readable file") from exc
    head, _, body = data.partition(b"\n")
    if not head.startswith(MAGIC.encode()) or len(data) > MAX_BYTES or not body.endswith(b"\n"):
        raise StreamInvalid(f"{path} is no save file of the fake driver, or cut short: give another")
    if head != f"{MAGIC} {FORM}".encode():
        raise StreamUnsupported(f"{path} has form {head[len(MAGIC) :].decode(errors='replace').strip()}, not {FORM}")
    try:
        found: Any = json.loads(body)
        return FakeDomain.from_json(found)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise StreamInvalid(f"{path} is damaged ({str(exc)[:80]}): give another") from exc
