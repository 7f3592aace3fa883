"""Looking into a domain from outside: SysRq keys and core dumps."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from hypervisor.errors import HostFailure, SpecInvalid, ToolstackError, WrongState
from hypervisor.host.new_file import already, checked, new_file
from hypervisor.host.process import ProcessHold
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import MAX_VCPUS
from hypervisor.toolstack.coredump import CoreHeader


def sysrq(domain: Domain, key: str) -> None:
    """:raises SpecInvalid: no key. :raises WrongState: the guest has ended."""
    if not (len(key) == 1 and key.isascii() and key.isalnum()):
        raise SpecInvalid(f"sysrq key {key[:20]!r} is not usable: give one letter or digit")
    if domain.record.ended or domain.dying or domain.attachment is None:
        raise WrongState(f"sysrq: domain {domain.uuid} has ended: destroy or reset it")
    domain.attachment.request_sysrq(key)


async def dump_core(domain: Domain, text: str) -> None:
    """See `hypervisor.toolstack.api.Toolstack.dump_core`. The guest stands still meanwhile."""
    path = checked(text)
    process = domain.process
    if process is None or not process.alive or domain.lost:
        raise WrongState(f"domain {domain.uuid} has no process any more, and so no memory: there is nothing to dump")
    try:
        with new_file(path) as out:
            try:
                await process.request("hold")
                await _write(await _header(process), process.handles.memory, out, path)
            finally:
                with contextlib.suppress(ToolstackError):
                    await process.request("release")
    except FileExistsError:
        raise already(path) from None
    except OSError as exc:
        raise HostFailure(f"{path} cannot be made: {exc.strerror}: give another path, or correct its rights") from exc


async def _header(process: ProcessHold) -> CoreHeader:
    """Nothing that a domain process says is believed as it stands."""
    said = await process.request("core")
    size = os.fstat(process.handles.memory).st_size
    try:
        count = int(said["vcpus"])
        fields = {name: int(said[name]) for name in ("bits", "base_mfn", "pages", "shared_info", "m2p")}
        if fields["bits"] not in (32, 64) or not 1 <= count <= MAX_VCPUS or not 0 <= fields["base_mfn"] < 1 << 40:
            raise ValueError("its numbers make no sense")
        width = fields["bits"] // 8
        if fields["pages"] < 0 or min(fields["shared_info"], fields["m2p"]) < 0:
            raise ValueError("its numbers make no sense")
        if max(fields["pages"] * 4096, fields["shared_info"] + 4096, fields["m2p"] + fields["pages"] * width) > size:
            raise ValueError("it points outside its memory")
        contexts = [
            base64.b64decode((await process.request("core", fields={"vcpu": number}))["context"])
            for number in range(count)
        ]
    except (KeyError, TypeError, ValueError) as exc:
        raise HostFailure(f"the domain process does not say what it holds ({exc}): see domain.log") from exc
    return CoreHeader(contexts=tuple(contexts), **fields)


async def _write(header: CoreHeader, memory: int, out: int, path: Path) -> None:
    """In a process of its own: gigabytes and a slow disk are nothing for this one's loop."""
    command = [sys.executable, "-m", "hypervisor.toolstack.coredump", str(memory), str(out)]
    pipe = asyncio.subprocess.PIPE
    child: Any = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe, pass_fds=(memory, out)
    )
    try:
        _, said = await child.communicate(json.dumps(header.to_json()).encode())
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        raise
    if child.returncode:
        why = said.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise HostFailure(f"the core dump {path} could not be written: {why}: make room, or give another path")
