from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from agent.cli.main import COMMANDS, main


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in ("reeve", *words))
    program = f'. {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _reeve; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=script.parent, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "reeve.bash"
    script.write_text(capsys.readouterr().out)
    assert set(completed(script, "")) >= {name.split()[0] for name in COMMANDS}
    assert completed(script, "conf") == ["config"]
    assert set(completed(script, "config", "")) >= {"check", "show"}
    assert completed(script, "config", "check", "--str") == ["--strict"]
    assert completed(script, "--driver", "--conf") == ["--config-file"]
    assert set(completed(script, "domain", "create", "web", "--mem")) >= {"--memory"}
    (tmp_path / "a-file").write_text("")
    assert completed(script, "domain", "create", "a-f") == ["a-file"]


def test_zsh_uses_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert "bashcompinit" in out and "complete -o filenames -F _reeve reeve" in out
