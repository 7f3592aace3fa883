"""The exception tree: stable codes, a JSON form that survives a socket, the picture in the docstring."""

from __future__ import annotations

import re

import pytest

from hypervisor import errors


def subclasses(cls: type) -> set[type]:
    return {sub for direct in cls.__subclasses__() for sub in {direct} | subclasses(direct)}


EVERYONE_S = {cls for cls in subclasses(errors.ToolstackError) if cls.__module__ == errors.__name__}
TOOLSTACK = sorted(EVERYONE_S, key=lambda cls: cls.__name__)


def test_codes_are_unique_and_well_formed() -> None:
    codes = [cls.code for cls in TOOLSTACK]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", code) for code in codes)


def test_the_docstring_lists_every_class_with_its_code() -> None:
    listed = dict(re.findall(r"[├└]─ (\w+)\s+([a-z]+\.[a-z_]+)", errors.__doc__ or ""))
    assert listed == {cls.__name__: cls.code for cls in TOOLSTACK}


def test_the_docstring_says_which_are_retryable() -> None:
    listed = set(re.findall(r"[├└]─ (\w+)\s+[a-z]+\.[a-z_]+\s+retryable", errors.__doc__ or ""))
    assert listed == {cls.__name__ for cls in TOOLSTACK if cls.retryable}


@pytest.mark.parametrize("cls", TOOLSTACK, ids=lambda cls: cls.__name__)
def test_an_error_survives_its_json_form(cls: type[errors.ToolstackError]) -> None:
    error = cls("what went wrong: what to do")
    back = errors.from_json(error.to_json())
    assert type(back) is cls
    assert (back.message, back.code, back.retryable) == (error.message, cls.code, cls.retryable)
    assert str(back) == "what went wrong: what to do"


def test_what_has_no_code_of_its_own_arrives_as_its_parent() -> None:
    class Detailed(errors.HostFailure):
        def __init__(self, why: str, what: str) -> None:
            super().__init__(f"{what}: {why}")

    back = errors.from_json(Detailed("no room", "disk").to_json())
    assert type(back) is errors.HostFailure
    assert back.message == "disk: no room"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"code": "no.such", "message": "m"}, "m"),
        ({"code": ["x"], "message": "m"}, "m"),
        ({}, "no reason given"),
        ("just text", "just text"),
        (None, "None"),
        ({"code": "", "message": 7}, "7"),
    ],
)
def test_anything_else_becomes_a_host_failure(data: object, message: str) -> None:
    error = errors.from_json(data)
    assert type(error) is errors.HostFailure
    assert error.message == message


def test_kernel_errors_are_kernel_invalid() -> None:
    assert issubclass(errors.KernelNotXen, errors.KernelInvalid)
    assert issubclass(errors.KernelPvhOnly, errors.KernelInvalid)


def test_xen_error_carries_its_errno() -> None:
    error = errors.XenError(22, "bad port")
    assert (error.errno, error.why) == (22, "bad port")
    assert not isinstance(error, errors.ToolstackError)
