"""`x07 policy` as a user starts it, for the tests of its actions."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.published import document

if TYPE_CHECKING:
    from pathlib import Path


def policy(where: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `x07 policy`, started in *where*."""
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "policy", *words]
    done = subprocess.run(argv, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def as_json(where: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object of `x07 policy --json`, after its schema; standard error is empty."""
    code, out, err = policy(where, *words, "--json")
    assert err == ""
    return code, document(out)
