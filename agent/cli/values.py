"""Values of command line options: checked, with messages that say what would be right."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from typing import Any

from agent.cli.base import UsageError

MAX_FILE = 1 << 20
_MEMORY = re.compile(r"([0-9]{1,9})\s*(?:([MGT])(?:iB|B)?)?", re.IGNORECASE)
_UNIT_MIB = {"M": 1, "G": 1024, "T": 1 << 20}
_SIZE = re.compile(r"([0-9]{1,18})\s*(?:([KMGT])(?:iB|B)?)?", re.IGNORECASE)
_UNIT = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_-]*)*")


def memory_mib(text: str) -> int:
    """``256``, ``256M``, ``1G``, ``1GiB`` as MiB."""
    found = _MEMORY.fullmatch(text.strip())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory size: give MiB, or a number with M, G or T")
    return int(found[1]) * _UNIT_MIB[(found[2] or "M").upper()]


def size_bytes(text: str) -> int:
    """``20G``, ``512M``, ``1T`` or a plain number of bytes."""
    found = _SIZE.fullmatch(text.strip())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a number with K, M, G or T")
    return int(found[1]) * _UNIT[(found[2] or "").upper()]


def rate_bytes(text: str) -> int:
    """As `size_bytes`; 0 is no limit."""
    return 0 if text.strip() == "0" else size_bytes(text)


def seconds(text: str) -> float:
    """A number of seconds, not negative and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, for example 30 or 0.5")
    return value


def pair(text: str) -> tuple[str, str]:
    """``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is no KEY=VALUE")
    return key, value


def arguments(pairs: list[str]) -> dict[str, Any]:
    """``k=v`` words as an instruction's arguments.

    A value that is a JSON number, true, false, null, array, object or quoted string is that; anything else is a
    string as it stands. Dots in the key nest: ``boot.kernel=/k`` is ``{"boot": {"kernel": "/k"}}``.
    """
    found: dict[str, Any] = {}
    for text in pairs:
        key, value = pair(text)
        if not _KEY.fullmatch(key):
            raise UsageError(f"{key!r} is no argument name: give letters, digits and _, with dots to nest")
        place = found
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(f"{key!r} goes into {parent!r}, which has a value of its own")
        if last in place:
            raise UsageError(f"{key!r} is given twice")
        place[last] = _json_or_text(value)
    return found


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return value


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def read_json_object(path: str) -> dict[str, Any]:
    """A file (``-``: standard input) that holds one JSON object, at most 1 MiB."""
    raw, name = _read(path)
    try:
        data = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{name} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise UsageError(f"{name} holds a JSON {type(data).__name__}: give an object")
    return data


def read_text(path: str) -> str:
    """A file (``-``: standard input) of UTF-8 text, at most 1 MiB."""
    raw, name = _read(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{name} is not UTF-8 text: {exc}") from exc


def _read(path: str) -> tuple[bytes, str]:
    """Its bytes and what it is called. :raises UsageError: it cannot be read, or is too large."""
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_FILE + 1)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}") from exc
    name = "standard input" if path == "-" else path
    if len(raw) > MAX_FILE:
        raise UsageError(f"{name} is larger than {MAX_FILE} bytes")
    return raw, name
