"""Functions of the set-up scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_set_up_compiles_the_modules(tmp_path: Path) -> None:
    """The set-up compiles modules even with PYTHONDONTWRITEBYTECODE."""
    (tmp_path / "src/package").mkdir(parents=True)
    (tmp_path / "src/package/module.py").write_text("x = 1\n")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    argv = ["bash", "-euc", 'source "$1/scripts/lib.sh"; compile_modules "$2"', "bash", str(ROOT), sys.executable]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == b""
    assert list((tmp_path / "src/package/__pycache__").glob("module.*.pyc"))
