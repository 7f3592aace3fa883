"""The module of exceptions for clients: needs nothing, names what the documents name."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from agent import oslo

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "reeve_errors.py"


@pytest.fixture(scope="module")
def errors() -> ModuleType:
    """The file by itself, as a client has it."""
    spec = importlib.util.spec_from_file_location("reeve_errors", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_the_standard_library_only() -> None:
    for node in ast.walk(ast.parse(FILE.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), names


def test_every_code_is_documented(errors: ModuleType) -> None:
    table = (ROOT / "docs" / "instructions.md").read_text().split("\n## Errors")[1]
    documented = set(re.findall(r"`([a-z]+\.[a-z_0-9]+)`", table))
    assert set(errors.CODES) <= documented, set(errors.CODES) - documented
    assert len(errors.CODES) > 40


def test_a_class_is_named_after_its_code(errors: ModuleType) -> None:
    for code in errors.CODES:
        kind = getattr(errors, oslo.class_name(code))
        assert kind.code == code and issubclass(kind, errors.ReeveError)
        assert kind.__module__ == oslo.ERRORS_MODULE
        assert issubclass(kind, getattr(errors, f"{code.partition('.')[0].capitalize()}Error"))


def test_it_is_made_as_the_client_makes_it(errors: ModuleType) -> None:
    details = {"code": "domain.not_found", "retryable": True, "undone": True, "host": "h", "instruction": "i"}
    made = errors.DomainNotFound(*["no such domain"], **details)
    assert str(made) == "no such domain" and made.args == ("no such domain",)
    assert (made.code, made.retryable, made.undone, made.host, made.instruction) == (*details.values(),)
    again = errors.DomainNotFound(*made.args, **made.kwargs)
    assert (again.code, again.kwargs) == (made.code, made.kwargs)
    assert errors.DomainNotFound("x").code == "domain.not_found"


def test_a_code_that_came_later_is_the_common_base(errors: ModuleType) -> None:
    assert errors.TeapotIsEmpty is errors.ReeveError
    assert errors.TeapotIsEmpty("x", code="teapot.is_empty", new="y").code == "teapot.is_empty"
    for name in ("__path__", "domain_not_found", "_Private"):
        with pytest.raises(AttributeError):
            getattr(errors, name)
