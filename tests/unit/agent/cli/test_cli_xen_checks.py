"""`reeve doctor` on a Xen host names what is wrong."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.cli import xen_checks
from agent.cli.checks import Status


def proc(folder: Path, capabilities: str | None, *, xen: bool = True) -> Path:
    if xen:
        (folder / "xen").mkdir(parents=True)
    if capabilities is not None:
        (folder / "xen" / "capabilities").write_text(capabilities)
    return folder


@pytest.mark.parametrize(
    ("xen", "capabilities", "words"),
    [
        (False, None, "no Xen below"),
        (True, None, "xenfs is not mounted"),
        (True, "", "a guest of Xen"),
        (True, "control_d\n", ""),
    ],
)
def test_dom0(tmp_path: Path, xen: bool, capabilities: str | None, words: str) -> None:
    finding = xen_checks.dom0(proc(tmp_path, capabilities, xen=xen))
    assert words in finding.detail
    assert (finding.status is Status.OK) == (not words) == (not finding.cure)


def test_the_program(tmp_path: Path) -> None:
    missing = xen_checks.toolstack({"xl": str(tmp_path / "xl")})
    assert missing.status is Status.MISSING and "xen-utils" in missing.cure
    (tmp_path / "xl").write_text("#!/bin/sh\n")
    assert xen_checks.toolstack({"xl": str(tmp_path / "xl")}).status is Status.MISSING, "it cannot be run"
    (tmp_path / "xl").chmod(0o755)
    assert xen_checks.toolstack({"xl": str(tmp_path / "xl")}).status is Status.OK


def test_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    finding = xen_checks.privileges({})
    assert finding.status is Status.MISSING and "not root" in finding.detail
    assert xen_checks.privileges({"prefix": "no-such-program -n"}).status is Status.MISSING
    assert xen_checks.privileges({"prefix": "env A=b"}).status is Status.OK
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert xen_checks.privileges({}).status is Status.OK


def test_xenstored(tmp_path: Path) -> None:
    settings = {"xenstore": str(tmp_path / "xs")}
    assert "xenstored is down" in xen_checks.xenstored(settings).detail
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(settings["xenstore"])
        assert "xenstored is down" in xen_checks.xenstored(settings).detail, "a socket nobody listens on"
        listener.listen()
        assert xen_checks.xenstored(settings).status is Status.OK
    assert all(finding.check for finding in xen_checks.run_all(settings, tmp_path))
