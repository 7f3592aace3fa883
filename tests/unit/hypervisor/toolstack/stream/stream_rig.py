"""A small stream of the right order, for tests."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np

from hypervisor.toolstack.stream import envelope, libxc
from hypervisor.toolstack.stream.records import (
    CpuidPolicy,
    Kind,
    Marker,
    MsrPolicy,
    P2mFrames,
    PageData,
    PvInfo,
    Record,
    SharedInfo,
    TscInfo,
    VcpuBlob,
)
from hypervisor.toolstack.stream.source import Source

CONFIG = {"c_info": {"type": "pv", "name": "x"}}


def stream_records() -> list[Record]:
    types = np.array([0, 9, 15], np.uint8)
    return [
        PvInfo(64),
        CpuidPolicy(((0, 0xFFFFFFFF, 1, 2, 3, 4),)),
        MsrPolicy(((0xCE, 0),)),
        Marker(Kind.STATIC_DATA_END),
        P2mFrames(0, 2, (0,)),
        PageData(np.arange(3, dtype=np.uint64), types, b"a" * 4096 + b"b" * 4096),
        TscInfo(0, 1000, 5),
        SharedInfo(bytes(4096)),
        VcpuBlob(Kind.X86_PV_VCPU_BASIC, 0, bytes(5168)),
        VcpuBlob(Kind.X86_PV_VCPU_EXTENDED, 0, bytes(64)),
        VcpuBlob(Kind.X86_PV_VCPU_XSAVE, 0, bytes(848)),
        VcpuBlob(Kind.X86_PV_VCPU_MSRS, 0, bytes(16)),
        Marker(Kind.END),
    ]


def libxc_bytes(records: Iterable[Record]) -> bytes:
    return libxc.header_bytes() + b"".join(map(libxc.record_bytes, records))


def whole(records: Iterable[Record] | None = None) -> bytes:
    chosen = stream_records() if records is None else records
    return envelope.opening(CONFIG) + libxc_bytes(chosen) + envelope.closing()


def read_all(data: bytes) -> tuple[dict[str, object], list[Record]]:
    """As whoever restores does it. :raises StreamInvalid."""
    source = Source.of_file(io.BytesIO(data))
    config = envelope.read_config(source)
    envelope.read_libxl_header(source)
    header = libxc.read_header(source)
    found = list(libxc.read_records(source, header.version))
    envelope.read_end(source)
    return config, found
