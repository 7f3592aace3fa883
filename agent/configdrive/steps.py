"""Steps that write a config drive and take it away."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import ClassVar

from agent.api import Check, Context, Host, JsonDict, Step
from agent.configdrive.content import FirstBoot
from agent.configdrive.drives import Drives
from agent.configdrive.request import drive_files
from agent.errors import InstructionError
from agent.steps import template_images
from hypervisor.errors import ToolstackError

LOG = logging.getLogger(__name__)


def drives_of(host: Host) -> Drives:
    """The config drives of this node."""
    return Drives(Path(host.settings["config_drive_dir"]))


@dataclasses.dataclass(frozen=True)
class WriteDriveStep(Step):
    """:ivar format: a `ConfigDriveFormat`; `first`: JSON form of the `FirstBoot`."""

    name: ClassVar[str] = "config_drive"
    title: ClassVar[str] = "write the config drive"

    domain: str
    format: str
    first: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        label, files = drive_files({"format": self.format}, FirstBoot.from_json(self.first))
        drives_of(ctx.host).write(self.domain, label, files, _maker(ctx))
        return None

    def check(self, ctx: Context) -> Check:
        return Check.DONE if drives_of(ctx.host).made_by(self.domain, _maker(ctx)) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        # Nobody else's: when the plan was made there was no domain with that UUID, and its build is undone.
        drives_of(ctx.host).remove(self.domain)


@dataclasses.dataclass(frozen=True)
class RemoveDriveStep(Step):
    """After the domain has gone. That a drive cannot be removed is told, and tried again, but brings no domain back."""

    name: ClassVar[str] = "remove_drive"
    title: ClassVar[str] = "remove its config drive"
    changes: ClassVar[bool] = False

    domain: str

    def run(self, ctx: Context) -> JsonDict | None:
        drives = drives_of(ctx.host)
        try:
            if str(drives.path(self.domain)) not in template_images(ctx.host.toolstack):
                drives.remove(self.domain)
        except (InstructionError, ToolstackError) as exc:
            LOG.warning("config drive of domain %s stays: %s", self.domain, exc)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


def remove_drive_steps(host: Host, domain: str) -> tuple[Step, ...]:
    """What a plan that ends a domain takes last: nothing for a domain without a config drive."""
    with contextlib.suppress(OSError):
        if drives_of(host).path(domain).exists():
            return (RemoveDriveStep(domain),)
    return ()


def _maker(ctx: Context) -> str:
    """An instruction's id as a drive can hold it."""
    return hashlib.sha256(ctx.instruction.encode()).hexdigest()
