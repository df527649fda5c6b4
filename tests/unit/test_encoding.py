"""The command line in locales that are not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.command import X07


@pytest.mark.parametrize("words", [tuple(X07), (str(Path(sys.executable).with_name("x07")),)])
def test_names_work_in_any_locale(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Names that are not ASCII work in any locale."""
    (tmp_path / "prüf.py").touch()
    done = subprocess.run(
        [*words, "init", "--json", "--toolchain", "python", "--entry", "prüf.py"],
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert json.loads(done.stdout)["status"] == "created"
    assert tomllib.loads((tmp_path / "x07-sandbox.toml").read_text(encoding="utf-8"))["entry"] == "prüf.py"


def test_os_runner_accepts_names_in_any_locale(tmp_path: Path) -> None:
    """x07-os-runner accepts names that are not ASCII in any locale."""
    words = ["-m", "x07_sandbox.cli.os_runner", "--artifact", "prüf", "--world", "run-os-sandboxed", "--policy", "p"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert "prüf" in done.stderr.decode()
