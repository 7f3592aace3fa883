"""The example units under etc/systemd name programs and options that exist, and keep what keeps domains alive."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from oslo_config import cfg

from agent import conf as agent_conf
from agent.service import EXIT_UNFINISHED
from hypervisor.host import conf as host_conf

UNITS = sorted((Path(__file__).resolve().parents[2] / "etc" / "systemd").glob("*.service"))


def unit(name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(next(path for path in UNITS if path.stem == name))
    return parser["Service"]


def test_the_host_process_s_unit() -> None:
    service = unit("reeve-hypervisor")
    program, *words = service["ExecStart"].split()
    assert entry_points(group="console_scripts", name=Path(program).name)
    conf = cfg.ConfigOpts()
    host_conf.register(conf)
    conf(args=words, project="reeve", default_config_files=[])
    settings = host_conf.settings(conf)
    assert str(settings.state_dir) == "/var/lib/reeve/hypervisor" and str(settings.socket).startswith("/run/reeve/")
    assert service["KillMode"] == "process" and service["OOMPolicy"] == "continue", "or domains end with the unit"
    assert "MemoryDenyWriteExecute" not in service, "the engine writes code and runs it"


def test_the_agent_s_unit() -> None:
    service = unit("reeve-agent")
    program, *words = service["ExecStart"].split()
    assert entry_points(group="console_scripts", name=Path(program).name)
    settings = agent_conf.load([], words)
    assert settings.driver_settings["socket"] in unit("reeve-hypervisor")["ExecStart"]
    assert int(service["TimeoutStopSec"]) > settings.drain_seconds
    assert service["Type"] == "notify" and service["NotifyAccess"] == "main" and int(service["WatchdogSec"]) > 0
    assert int(service["SuccessExitStatus"]) == EXIT_UNFINISHED and "-HUP" in service["ExecReload"]
    assert service["User"] == unit("reeve-hypervisor")["User"], "the control socket takes its own user"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_can_read_them(tmp_path: Path) -> None:
    program = shutil.which("true")
    for path in UNITS:
        lines = path.read_text().splitlines()
        kept = [f"ExecStart={program}" if line.startswith("ExecStart=") else line for line in lines]
        (tmp_path / path.name).write_text("\n".join(kept))
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.glob("*.service")))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in done.stderr.splitlines() if "reeve-" in line]
    assert said == [] and done.returncode == 0, done.stderr
