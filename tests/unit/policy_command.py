"""Helpers that run `x07 policy` as a user does."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.published import document

if TYPE_CHECKING:
    from pathlib import Path


def policy(where: Path, *words: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `x07 policy`, started in *where*."""
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", "policy", *words]
    done = subprocess.run(argv, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def as_json(where: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON document of `x07 policy --json`, checked against its schema."""
    code, out, err = policy(where, *words, "--json")
    assert err == ""
    return code, document(out)
