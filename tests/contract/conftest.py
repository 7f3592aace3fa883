"""Runs every contract test on every driver that has a ``kit_NAME.py`` here."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import Capability, DomainInfo, DomainSpec, Toolstack

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import kit as kit_module  # noqa: E402

OWNER = "contract"
DRIVERS = sorted(path.stem.removeprefix("kit_") for path in HERE.glob("kit_*.py"))


@pytest.fixture(scope="session", params=DRIVERS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit_module.Kit]:
    module = importlib.import_module(f"kit_{request.param}")
    made = module.make_kit(tmp_path_factory.mktemp(request.param))
    yield made
    made.stop()


@dataclasses.dataclass(slots=True)
class Bench:
    """What a test works with: a connection and short ways to make domains."""

    toolstack: Toolstack
    kit: kit_module.Kit

    def spec(self, guest: str = kit_module.WAITS, **fields: object) -> DomainSpec:
        ident = str(uuid.uuid4())
        values: dict[str, object] = {
            "uuid": ident,
            "name": f"c-{ident[:8]}",
            "boot": self.boot(guest),
            "memory_mib": self.kit.memory_mib,
            "owner": OWNER,
        }
        return DomainSpec(**{**values, **fields})  # type: ignore[arg-type]

    def boot(self, guest: str) -> object:
        if guest not in self.kit.guests:
            pytest.skip(f"the {self.kit.name} kit has no guest that {guest}")
        return self.kit.guests[guest]

    def start(self, guest: str = kit_module.WAITS, **fields: object) -> DomainInfo:
        """A domain that was let run."""
        info = self.toolstack.create(self.spec(guest, **fields))
        self.toolstack.unpause(info.uuid)
        return info

    def booted(self, guest: str = kit_module.WAITS, **fields: object) -> DomainInfo:
        """A domain whose guest has printed its line."""
        info = self.start(guest, **fields)
        self.until(lambda: self.kit.line in self.toolstack.console_log(info.uuid), f"{guest} guest to boot")
        return info

    def until(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or self.kit.boot_timeout)
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}"
            time.sleep(0.01)  # a poll with a deadline, not a guess

    def needs(self, capability: Capability) -> None:
        if capability not in self.toolstack.capabilities():
            pytest.skip(f"the {self.kit.name} driver has no capability {capability.value}")

    def refused(self, error: type[ToolstackError], spec: DomainSpec) -> ToolstackError:
        """`create` fails with exactly `error` and leaves nothing behind."""
        before = self.toolstack.list_domains()
        free = self.toolstack.host_info().memory_free_mib
        with pytest.raises(ToolstackError) as caught:
            self.toolstack.create(spec)
        assert type(caught.value) is error, repr(caught.value)
        assert_readable(caught.value)
        assert [info.uuid for info in self.toolstack.list_domains()] == [info.uuid for info in before]
        assert self.toolstack.host_info().memory_free_mib == free
        return caught.value


def assert_readable(error: ToolstackError) -> None:
    """One line, a code, and a JSON form."""
    assert error.message and "\n" not in error.message
    assert error.to_json() == {"code": type(error).code, "message": error.message, "retryable": type(error).retryable}
    assert "." in error.code


@pytest.fixture
def bench(kit: kit_module.Kit) -> Iterator[Bench]:
    """A connection to an empty host; afterwards whatever the test left is destroyed and the memory must be back."""
    made = Bench(kit.connect(), kit)
    free = made.toolstack.host_info().memory_free_mib
    try:
        yield made
    finally:
        toolstack = made.toolstack
        for info in toolstack.list_domains():
            toolstack.destroy(info.uuid)
        made.until(lambda: toolstack.host_info().memory_free_mib == free, "the host's memory to be free again")
        assert toolstack.list_domains() == []
        toolstack.close()


def unavailable(reason: str) -> None:
    """For kits: skip with a plain reason, but fail where everything must be there (CI=true)."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
