"""For all tests: what hypothesis must not take for a fault of ours on a machine that has other work."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("reeve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reeve")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test that ran again had failed: whoever looks for the cause has nothing else."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"failed at first: {report.nodeid}")
        terminalreporter.line(report.longreprtext)
        for name, content in report.sections:
            terminalreporter.line(f"--- {name}")
            terminalreporter.line(content)
