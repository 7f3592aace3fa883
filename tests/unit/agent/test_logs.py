from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import logs
from agent.context import log_fields

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LOG = logging.getLogger("agent.test_logs")


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in kept[0]:
            handler.close()
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])


def test_json_lines_have_fields(tmp_path: Path) -> None:
    logs.setup("info", str(tmp_path / "log"), "json")
    with log_fields("i-1", "d-1", "req-1", {"traceparent": PARENT}):
        LOG.info("at %d\nsecond line", 1)
    try:
        raise ValueError("password=hunter2")
    except ValueError:
        LOG.exception("failed")
    LOG.debug("not at this level")
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "logger": "agent.test_logs", "message": "at 1\nsecond line",
        "instruction": "i-1", "domain": "d-1", "request": "req-1", "traceparent": PARENT,
    }  # fmt: skip
    assert "instruction" not in second and "ValueError" in second["exception"] and "hunter2" not in str(second)


def test_a_text_message_is_one_line_and_has_no_secret(tmp_path: Path) -> None:
    logs.setup("info", str(tmp_path / "log"))
    with log_fields("i-1", "d-1", "req-1", {"traceparent": PARENT}):
        LOG.info("bad %s", "x\n2026-01-01 INFO forged\x1b[2J\u2028")
    LOG.info("broker amqp://u:s3cret@h/ X-Auth-Token: s3cret")
    first, second = (tmp_path / "log").read_text().split("\n")[:2]
    assert f"[i-1 d-1 req-1] {PARENT} bad x\\n2026" in first and "\x1b" not in first and "\u2028" not in first
    assert "[- - -] broker amqp://u:***@h/ X-Auth-Token: ***" in second


def test_a_rotated_file_is_opened_again_with_what_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.setup("info", str(path))
    LOG.info("before")
    path.rename(tmp_path / "log.1")
    logs.reconfigure("debug", "json")
    LOG.debug("after")
    assert "before" in (tmp_path / "log.1").read_text()
    assert json.loads(path.read_text())["message"] == "after"
