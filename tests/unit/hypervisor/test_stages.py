"""Stages are told at level debug only."""

from __future__ import annotations

import logging

import pytest

from hypervisor.stages import stage


def test_a_stage_is_one_line_at_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hypervisor.stages"):
        stage("unseen")
    with caplog.at_level(logging.DEBUG, logger="hypervisor.stages"):
        stage("engine")
    (line,) = [record.getMessage() for record in caplog.records]
    word, name, at, cpu = line.split()
    assert (word, name) == ("stage", "engine") and float(at) > 0 and float(cpu) >= 0
