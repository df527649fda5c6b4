"""Promises of --json where a verb cannot do what it was asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import jsonschema
import pytest

from x07_sandbox.cli import main
from x07_sandbox.cli.cancel import cancelled_by_signals
from x07_sandbox.errors import Cancelled
from x07_sandbox.reports.schemas import schemas

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = json.loads(schemas()["failure.schema.json"])


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["doctor", "--everything"], 2, "unrecognized arguments: --everything"),
        (["prune", "--all"], 2, "unrecognized arguments: --all"),
        (["init", "--toolchain", "rust"], 2, "invalid choice: 'rust'"),
        (["init", "--entry", "main.py"], 2, "it is for --toolchain python or --toolchain shell"),
        (["init", "a\udcff/file"], 2, "Not a directory"),
        (["image", "list"], 125, "it is a link or no folder"),
        (["image", "verify", "nothing"], 125, ""),
        (["pool", "status"], 125, "it is a link or no folder"),
        (["pool", "start", "--size", "0"], 2, "is no whole number of machines"),
        (["policy", "digest", "missing.json"], 2, "No such file"),
    ],
)
def test_an_error_is_one_json_object(tmp_path: Path, words: list[str], code: int, why: str) -> None:
    """With --json an error is one object of schemas/failure.schema.json on standard output; the exit code stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / os.fsdecode(b"a\xff")).write_bytes(b"")
    env = os.environ | {"X07_VM_STATE_DIR": str(tmp_path / "link/s"), "X07_VM_CACHE_DIR": str(tmp_path / "link/c")}
    argv = [sys.executable, "-m", "x07_sandbox.cli.main", *words, "--json"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, check=False, timeout=60)
    assert done.returncode == code
    assert done.stderr == b""
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert why in found["error"]["why"]
    assert found["error"]["fix"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_before_there_is_a_run_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """A run that is cancelled while its program is read ends with 130 or 143, and --json says so."""
    with cancelled_by_signals() as cancel:
        signal.raise_signal(number)
        with pytest.raises(Cancelled) as caught:
            cancel.check()
    assert main._failed(caught.value, ["run", "prog.py"]) == code  # noqa: SLF001 - how main ends on any error
    assert main._failed(caught.value, ["run", "--json", "prog.py"]) == code  # noqa: SLF001
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["outcome"], result["signal"], result["x07_exit_code"]) == ("cancelled", number, code)
    assert "a signal came" in said.err
