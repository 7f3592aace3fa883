"""All of a suspended guest but its pages, free of machine frame numbers."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np

from hypervisor.cpu.policy import CpuPolicy
from hypervisor.errors import StreamInvalid
from hypervisor.toolstack.stream.records import PageType, has_data

Array = np.ndarray[Any, Any]

EXTENDED = struct.Struct("<IIQQHHBBxxQ24x")
"""struct xen_domctl_ext_vcpucontext: vCPU, size, two callbacks, their CS and masks, MCG_CAP."""

ABSENT = int(PageType.ABSENT)
NOWHERE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU that is up.

    :ivar basic: `struct vcpu_guest_context` of the guest's word size, page numbers instead of frame numbers.
    :ivar extended: `struct xen_domctl_ext_vcpucontext`, empty for all zeros.
    :ivar xsave: what `XEN_DOMCTL_getvcpuextstate` gives; `msrs` `XEN_DOMCTL_get_vcpu_msrs`. Both may be empty.
    """

    id: int
    basic: bytes
    extended: bytes = b""
    xsave: bytes = b""
    msrs: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class GuestState:
    """:ivar types: uint8, of each page number from 0 on: `PageType`, `PINNED`; ABSENT where there is no page.

    :ivar p2m_frames: page numbers of the pages of its list of frames, the first one first.
    :ivar shared_info: the page.
    :ivar policy: what it was told of its processor; None: the stream did not say.
    :ivar tsc_khz: ticks per millisecond of the time stamp counter it knew; `elapsed_ns` its system time.
    """

    bits: int
    types: Array
    p2m_frames: tuple[int, ...]
    shared_info: bytes
    vcpus: tuple[VcpuState, ...]
    policy: CpuPolicy | None
    tsc_khz: int
    elapsed_ns: int

    @property
    def present(self) -> Array:
        """Page numbers that have a page, ascending."""
        return np.flatnonzero(has_data(self.types))

    @property
    def mcg_cap(self) -> int:
        """MCG_CAP that vCPU 0 was shown (MSR 0x179)."""
        return int(unpack_extended(self.vcpus[0].extended)[-1]) if self.vcpus else 0


def unpack_extended(data: bytes) -> tuple[int, ...]:
    """The fields of `EXTENDED`; what is missing is 0."""
    return EXTENDED.unpack(data[: EXTENDED.size].ljust(EXTENDED.size, b"\0"))


def place(types: Array, ram: int) -> Array:
    """An index of a frame for each page number, `NOWHERE` for those without a page; the same number wherever it can be.

    :param types: `GuestState.types`. :param ram: frames that the domain may have.
    :raises StreamInvalid: more pages than that.
    """
    present = np.flatnonzero(has_data(types))
    if len(present) > ram:
        raise StreamInvalid(f"the image has {len(present)} pages, and its domain at most {ram}: it is damaged")
    frames = np.full(len(types), NOWHERE, np.int64)
    low, high = present[present < ram], present[present >= ram]
    frames[low] = low
    if len(high):
        free = np.ones(ram, bool)
        free[low] = False
        frames[high] = np.flatnonzero(free)[: len(high)]
    return frames
