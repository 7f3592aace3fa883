"""A suspended guest laid out so that others can begin from it at once: its memory as a file to be mapped, and the rest.

The memory file holds the page of frame n at n * 4096, where `hypervisor.suspended.state.place` puts it, page tables
with page numbers; pages of zeros are holes. The state file holds a `GuestState`, with a checksum. Both are made
from a libxc stream, in a process of its own, so that neither gigabytes nor a slow disk hold up the host process::

    python -m hypervisor.suspended.template STREAM_FD MEMORY_FD STATE_FD FRAMES

It prints a line when it is ready, and `Laid` as JSON at the end; what goes wrong is one line on stderr.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import mmap
import os
import struct
import sys
from typing import Any

import numpy as np

from hypervisor.cpu.policy import CpuPolicy
from hypervisor.errors import SpecInvalid, StreamInvalid, StreamUnsupported, ToolstackError
from hypervisor.suspended.state import GuestState, VcpuState, place
from hypervisor.suspended.transfer import Incoming
from hypervisor.toolstack.stream.source import Source
from hypervisor.types import PAGE_SIZE

Array = np.ndarray[Any, Any]

MAGIC, FORM = b"reeve template\n\0", 1
_HEAD = struct.Struct("<16sIIQQ32s")
"""Magic, form, bytes of JSON, page numbers, frames, SHA-256 of what follows."""
MAX_JSON = 32 << 20
MAX_FRAMES = 1 << 34
_VCPU = ("basic", "extended", "xsave", "msrs")


@dataclasses.dataclass(frozen=True, slots=True)
class Laid:
    """:ivar bits: the guest's word size. :ivar pages: that it has."""

    bits: int
    pages: int


def write_state(state: GuestState, frames: int) -> bytes:
    """:param frames: of the memory file."""
    about: dict[str, Any] = {
        "bits": state.bits,
        "p2m_frames": list(state.p2m_frames),
        "shared_info": base64.b64encode(state.shared_info).decode(),
        "vcpus": [
            {"id": vcpu.id, **{name: base64.b64encode(getattr(vcpu, name)).decode() for name in _VCPU}}
            for vcpu in state.vcpus
        ],
        "policy": state.policy.save() if state.policy is not None else None,
        "tsc_khz": state.tsc_khz,
        "elapsed_ns": state.elapsed_ns,
    }
    text = json.dumps(about).encode()
    types = state.types.astype(np.uint8).tobytes()
    return _HEAD.pack(MAGIC, FORM, len(text), len(types), frames, _sum(text, types)) + text + types


def read_state(descriptor: int, frames: int) -> tuple[GuestState, Array]:
    """The state, and the frame of each page number.

    :param frames: of the domain that begins from it.
    :raises StreamInvalid, StreamUnsupported: damaged, of another size or form. :raises OSError.
    """
    source = Source(lambda size: os.read(descriptor, size))
    magic, form, length, count, own, checksum = _HEAD.unpack(source.take(_HEAD.size, "header"))
    if magic != MAGIC:
        raise StreamInvalid("the template is damaged: its state has no header; make it again")
    if form != FORM:
        raise StreamUnsupported(f"the template has form {form}, this release knows {FORM}: make it again")
    if own != frames:
        raise StreamInvalid(f"the template has {own} frames, its domain {frames}: it is damaged; make it again")
    if length > MAX_JSON or count > 4 * frames + (1 << 16):
        raise StreamInvalid("the template is damaged: its state is too large; make it again")
    text, types = source.take(length, "state"), source.take(count, "page types")
    if _sum(text, types) != checksum:
        raise StreamInvalid("the template is damaged: its checksum is another; make it again")
    try:
        state = _state(json.loads(text), np.frombuffer(types, np.uint8))
    except (KeyError, TypeError, ValueError, SpecInvalid) as exc:
        raise StreamInvalid(f"the template is damaged: {exc}; make it again") from exc
    return state, place(state.types, frames)


def _sum(text: bytes, types: bytes) -> bytes:
    made = hashlib.sha256(text)
    made.update(types)
    return made.digest()


def _state(about: dict[str, Any], types: Array) -> GuestState:
    policy = about["policy"]
    return GuestState(
        bits=int(about["bits"]),
        types=types,
        p2m_frames=tuple(map(int, about["p2m_frames"])),
        shared_info=base64.b64decode(about["shared_info"]),
        vcpus=tuple(
            VcpuState(int(vcpu["id"]), *(base64.b64decode(vcpu[name]) for name in _VCPU)) for vcpu in about["vcpus"]
        ),
        policy=CpuPolicy.restore(policy) if policy is not None else None,
        tsc_khz=int(about["tsc_khz"]),
        elapsed_ns=int(about["elapsed_ns"]),
    )


def lay_out(stream: int, memory: int, state: int, frames: int) -> Laid:
    """Read a libxc stream to its end into two empty files, and wait until the disk has them.

    A disk that is full ends this process by SIGBUS. :raises ToolstackError, OSError: the files are of no use.
    """
    os.ftruncate(memory, frames * PAGE_SIZE)
    incoming = Incoming(Source(lambda size: os.read(stream, size)))
    incoming.begin()
    found, _ = incoming.finish(np.frombuffer(mmap.mmap(memory, frames * PAGE_SIZE), np.uint64), frames)
    content = memoryview(write_state(found, frames))
    while content:
        content = content[os.write(state, content) :]
    os.fsync(memory)
    os.fsync(state)
    return Laid(found.bits, len(found.present))


def main(arguments: list[str]) -> int:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        laid = lay_out(*map(int, arguments))
    except ToolstackError as exc:
        sys.stderr.write(exc.message)
        return 1
    except OSError as exc:
        sys.stderr.write(exc.strerror or str(exc))
        return 1
    sys.stdout.write(json.dumps(dataclasses.asdict(laid)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
