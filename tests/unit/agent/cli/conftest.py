"""A command line against a fake host in a folder of its own."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli.main import ReeveApp
from hypervisor.toolstack.api import DomainInfo
from hypervisor.toolstack.drivers.fake import FakeToolstack


class BinaryText(io.TextIOWrapper):
    """Standard output as a program has it: text with bytes below."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def getvalue(self) -> str:
        return self.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined,no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The JSON error on standard error, which is all there is on it."""
        assert self.code != 0
        found: dict[str, Any] = json.loads(self.err)["error"]
        return found


@dataclasses.dataclass(slots=True)
class Reeve:
    """Runs `reeve` in this process.

    :ivar host: the same fake host, to arrange and to look.
    """

    folder: Path
    host: FakeToolstack

    @property
    def options(self) -> list[str]:
        state = self.folder / "agent"
        config = self.folder / "agent.conf"
        if not config.exists():
            config.write_text(
                f"[agent]\nhost = testnode\nstate_dir = {state}\n"
                f"[driver]\nname = fake\nsettings = state_dir:{self.folder / 'host'}\n"
            )
        return ["--config-file", str(config)]

    def __call__(self, *argv: str) -> Result:
        out, err = BinaryText(), io.StringIO()
        code = ReeveApp(stdin=io.StringIO(), stdout=out, stderr=err).run([*self.options, *argv])
        return Result(code, out.getvalue(), err.getvalue())

    @property
    def kernel(self) -> str:
        path = self.folder / "kernel"
        if not path.exists():  # an instruction may be reading it
            path.write_bytes(b"\x7fELF" + bytes(100))
        return str(path)

    def domain(self, name: str = "web", *more: str) -> DomainInfo:
        """A domain made by the command line."""
        made = self("domain", "create", name, "--kernel", self.kernel, "-f", "json", *more).json
        return self.host.get_domain(made["uuid"])


@pytest.fixture
def reeve(tmp_path: Path) -> Iterator[Reeve]:
    host = FakeToolstack(str(tmp_path / "host"))
    yield Reeve(tmp_path, host)
    host.close()
