"""A domain process from its fork until it says that the guest is built."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypervisor.errors import HostFailure
from hypervisor.host import channel as channels
from hypervisor.host.channel import Message
from hypervisor.host.handles import Handles
from hypervisor.host.process import ProcessHold
from hypervisor.host.records import RunSizes
from hypervisor.host.runtime import BuildRequest
from hypervisor.host.table import Domain
from hypervisor.host.zygote_client import ZygoteClient

LOG = logging.getLogger(__name__)

DOMAIN_LOG_NAME = "domain.log"


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A saved image that a domain comes from.

    :ivar descriptors: of the file, at the beginning of its libxc stream; or of a template's memory and state.
    :ivar run: sizes of the run that was saved; `pages` it had, or the most it can have.
    :ivar bits: the guest's word size.
    :ivar seconds: how long it may take to be read.
    :ivar template: ident of the template, "" for a saved image.
    """

    descriptors: tuple[int, ...]
    run: RunSizes
    pages: int
    bits: int
    seconds: float = 0.0
    template: str = ""


async def fork(
    zygote: ZygoteClient, folder: Path, request: BuildRequest, frames: int, sandbox: str, sources: Sequence[int] = ()
) -> ProcessHold:
    """:param folder: the domain's. :param frames: of its extent. :param sources: `Image.descriptors`.

    :raises ToolstackError: there is no process.
    """
    handles = Handles.create(f"reeve-{request.spec.uuid}", frames)
    ours, theirs = channels.pair()
    log = -1
    try:
        log = os.open(folder / DOMAIN_LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        message = {"op": "spawn", "request": request.to_json(), "directory": str(folder), "sandbox": sandbox}
        pid, pidfd = await zygote.spawn(message, [theirs.fileno(), log, *handles.pack(), *sources])
    except BaseException:
        handles.close()
        ours.close()
        raise
    finally:
        theirs.close()
        if log >= 0:
            os.close(log)
    return ProcessHold(pid, pidfd, ours, handles, zygote)


async def built(domain: Domain, folder: Path, timeout: float) -> dict[str, Any]:
    """What the process says of the guest it has built. :raises ToolstackError: why there is none."""
    process = domain.process
    assert process is not None
    try:
        message = await process.built(timeout)
    except HostFailure:
        _log_domain_log(domain.uuid, folder)
        raise
    for line in _missing(message):
        LOG.warning("domain %s runs without full sandbox: %s", domain.uuid, line)
    boot = message.get("boot")
    if not isinstance(boot, dict):
        raise HostFailure("the domain process did not say where it built the rings: see domain.log")
    return boot


def _log_domain_log(uuid: str, folder: Path) -> None:
    """What the process said last, before its folder goes."""
    try:
        text = (folder / DOMAIN_LOG_NAME).read_bytes()[-4000:]
    except OSError as exc:
        text = str(exc).encode()
    LOG.error("domain %s, domain.log ends with:\n%s", uuid, text.decode(errors="replace"))


def _missing(message: Message) -> list[str]:
    report = message.get("sandbox")
    values = report.get("missing") if isinstance(report, dict) else None
    return [str(value)[:200] for value in values[:8]] if isinstance(values, list) else []
