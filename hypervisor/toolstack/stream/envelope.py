"""What is around a libxc stream: the header that `xl` writes, with the domain's configuration, and libxl's records."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.toolstack.stream.source import Source

MAGIC = b"Xen saved domain, xl format\n \0 \r"
BYTE_ORDER = 0x0102_0304
FLAG_JSON, FLAG_STREAM_V2 = 1, 2
MAX_CONFIG = 1 << 20

IDENT, VERSION = 0x4C69_6278_6C46_6D74, 2
BIG_ENDIAN, LEGACY = 1, 2
END, LIBXC_CONTEXT, EMULATOR_XENSTORE_DATA, EMULATOR_CONTEXT, CHECKPOINT_END, CHECKPOINT_STATE = range(6)
OPTIONAL = 1 << 31
_MAX_BODY = 64 << 20
_MAX_RECORDS = 64

_XL = struct.Struct("<IIII")
_LENGTH = struct.Struct("<I")
_LIBXL = struct.Struct(">QII")
_RECORD = struct.Struct("<II")


def opening(config: Mapping[str, Any]) -> bytes:
    """All that comes before the libxc stream. :raises StreamInvalid: as `header`."""
    return header(config) + _LIBXL.pack(IDENT, VERSION, 0) + _RECORD.pack(LIBXC_CONTEXT, 0)


def header(config: Mapping[str, Any]) -> bytes:
    """What `xl` writes before libxl does.

    :param config: JSON form of libxl's domain configuration. :raises StreamInvalid: it is too long.
    """
    text = json.dumps(config, indent=4).encode() + b"\n\0"
    if len(text) > MAX_CONFIG:
        raise StreamInvalid(f"the domain's configuration has {len(text)} bytes, at most {MAX_CONFIG} can be saved")
    data = _LENGTH.pack(len(text)) + text
    return MAGIC + _XL.pack(BYTE_ORDER, FLAG_JSON | FLAG_STREAM_V2, 0, len(data)) + data


def closing() -> bytes:
    return _RECORD.pack(END, 0)


def read_config(source: Source) -> dict[str, Any]:
    """What `xl` wrote: the domain's configuration. :raises StreamInvalid, StreamUnsupported."""
    if source.take(len(MAGIC), "header") != MAGIC:
        raise StreamInvalid("the file is no saved domain of xl's format: give one that save or `xl save` wrote")
    order, mandatory, _optional, size = _XL.unpack(source.take(_XL.size, "header"))
    if order == int.from_bytes(BYTE_ORDER.to_bytes(4, "little"), "big"):
        raise StreamUnsupported("the image is a big-endian host's")
    if order != BYTE_ORDER:
        source.bad("the header's byte order is none")
    if mandatory & ~(FLAG_JSON | FLAG_STREAM_V2) or mandatory & FLAG_JSON == 0 or mandatory & FLAG_STREAM_V2 == 0:
        raise StreamUnsupported(f"the image has flags {mandatory:#x}: Xen 4.6 to 4.17 write 0x3, others are not known")
    if not _LENGTH.size <= size <= MAX_CONFIG + (64 << 10):
        source.bad(f"a configuration of {size} bytes")
    data = source.take(size, "configuration")
    (length,) = _LENGTH.unpack_from(data)
    text = data[_LENGTH.size : _LENGTH.size + length]
    if len(text) != length or not text.endswith(b"\0"):
        source.bad("the configuration's length is wrong")
    try:
        config = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError) as exc:
        raise StreamInvalid(f"the image's domain configuration is no JSON ({str(exc)[:80]}): give another") from exc
    if not isinstance(config, dict):
        source.bad("the configuration is no object")
    return config


def read_libxl_header(source: Source) -> None:
    """Up to where the libxc stream begins. :raises StreamInvalid, StreamUnsupported."""
    ident, version, options = _LIBXL.unpack(source.take(_LIBXL.size, "libxl header"))
    if ident != IDENT:
        source.bad("there is no libxl header")
    if version != VERSION:
        raise StreamUnsupported(f"the image has version {version} of libxl's format, known is {VERSION}")
    if options & BIG_ENDIAN:
        raise StreamUnsupported("the image is a big-endian host's")
    if options & LEGACY:
        raise StreamUnsupported("the image was converted from a format before Xen 4.6: restore and save it there first")
    for _ in range(_MAX_RECORDS):
        if _next(source) == LIBXC_CONTEXT:
            return
    source.bad("it has no libxc stream")


def read_end(source: Source) -> None:
    """What follows the libxc stream. :raises StreamInvalid, StreamUnsupported."""
    for _ in range(_MAX_RECORDS):
        if _next(source) == END:
            return
    source.bad("it has too many records behind the libxc stream")


def _next(source: Source) -> int:
    """Take one record; emulators' are left alone, for no PV guest needs one."""
    number, size = _RECORD.unpack(source.take(_RECORD.size, "libxl record"))
    if size > _MAX_BODY:
        source.bad(f"a libxl record of {size} bytes")
    if number > CHECKPOINT_STATE and not number & OPTIONAL:
        raise StreamUnsupported(f"the image has a libxl record of kind {number:#x}, which is not known here")
    if number in (CHECKPOINT_END, CHECKPOINT_STATE):
        raise StreamUnsupported("the image is a continuous checkpoint's: give one that `xl save` wrote")
    if number in (END, LIBXC_CONTEXT) and size:
        source.bad(f"a libxl record of kind {number} with {size} bytes")
    body = source.take(size + -size % 8, "libxl record")
    if any(body[size:]):
        source.bad("the padding of a libxl record is not zero")
    return int(number)
