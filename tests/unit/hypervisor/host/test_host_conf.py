from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from oslo_config import cfg

from hypervisor.host import conf as options
from hypervisor.host import main, protocol
from hypervisor.host.settings import HostSettings, available_mib

SAMPLE = Path(__file__).resolve().parents[4] / "etc" / "reeve" / "hypervisor.conf.sample"


def settings(*words: str) -> HostSettings:
    conf = cfg.ConfigOpts()
    options.register(conf)
    conf(args=list(words), project="reeve", default_config_files=[])
    return options.settings(conf)


def test_devices_of_the_host(tmp_path: Path) -> None:
    made = settings("--state-dir", str(tmp_path))
    assert made.driver_log_kib == 4096 and made.device_backends == ()
    file = tmp_path / "conf"
    file.write_text("[hypervisor]\ndriver_log_kib = 64\ndevice_backends = disk:module:Toy,nic:module:Nics\n")
    made = settings("--config-file", str(file))
    assert made.driver_log_kib == 64
    assert dict(made.device_backends) == {"disk": "module:Toy", "nic": "module:Nics"}


def test_the_sample_is_what_the_options_say(tmp_path: Path) -> None:
    made = tmp_path / "sample"
    command = [sys.executable, "-m", "oslo_config.generator", "--namespace", "reeve.hypervisor", "--output-file"]
    subprocess.run([*command, str(made)], check=True, timeout=60)
    assert made.read_text() == SAMPLE.read_text(), (
        "run: oslo-config-generator --namespace reeve.hypervisor --output-file etc/reeve/hypervisor.conf.sample"
    )


def test_every_option_has_help() -> None:
    for _, group in options.list_opts():
        for option in group:
            assert option.help and option.help.endswith("."), option.dest


def test_everything_lies_in_a_given_state_folder(tmp_path: Path) -> None:
    found = settings("--state-dir", str(tmp_path), "--memory-mib", "512", "--debug")
    assert found.socket == tmp_path / "hypervisor.sock"
    assert found.xenstored_socket == tmp_path / "xenstored.sock"
    assert found.cache_dir == str(tmp_path / "cache")
    assert (found.memory_mib, found.log_level) == (512, logging.DEBUG)
    assert settings("--state-dir", str(tmp_path), "--socket", "/x/s").socket == Path("/x/s")


def test_defaults() -> None:
    found = settings()
    assert found.socket == protocol.default_socket()
    assert found.state_dir == protocol.default_state_dir()
    assert found.sandbox == "auto"
    assert found.effective_cpus >= 1


def test_a_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "h.conf"
    file.write_text(
        f"[hypervisor]\nstate_dir = {tmp_path}/a\nsocket = {tmp_path}/s\nmemory_mib = 7\nsandbox = required\n"
    )
    found = settings("--config-file", str(file))
    assert (found.state_dir, found.socket) == (tmp_path / "a", tmp_path / "s")
    assert (found.memory_mib, found.sandbox) == (7, "required")
    assert settings("--config-file", str(file), "--memory-mib", "8").memory_mib == 8


def test_a_wrong_option_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "h.conf"
    file.write_text("[hypervisor]\nsandbox = maybe\n")
    assert main.main(["--config-file", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reeve-hypervisor: configuration:") and "sandbox" in error


def test_available_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")
    assert available_mib(meminfo) == 2048
    meminfo.write_text("")
    assert available_mib(meminfo) > 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert "--state-dir DIR" in text
    assert "\n  XENSTORED_PATH=~/reeve-test/xenstored.sock xenstore-ls -f\n" in text


def test_the_cpu_policy_is_checked_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "h.conf"

    def read(text: str) -> str:
        file.write_text(f"[hypervisor]\ncpu_policy = {text}\n")
        return settings("--config-file", str(file)).cpu_policy

    assert settings().cpu_policy == "engine"
    assert read("x86-64-v2,+aes") == "x86-64-v2,+aes"
    with pytest.raises(cfg.ConfigFileValueError, match="'x86-64-v7' is neither a level"):
        read("x86-64-v7")
