"""Colours appear on a terminal that supports them and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.command import X07

MISSING = ["policy", "explain", "missing.json"]
RED = b"\x1b[1;31m"


def _output(tmp_path: Path, words: list[str], stream: str, **env: str) -> bytes:
    """Return the output of a command on that stream, a terminal."""
    ours, theirs = pty.openpty()
    argv = [*X07, *words]
    place = {"X07_VM_STATE_DIR": str(tmp_path / "state"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    others = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "TERM"}}
    streams: dict[str, int] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
    with subprocess.Popen(argv, cwd=tmp_path, env=others | place | env, stdin=subprocess.DEVNULL, **streams):  # type: ignore[call-overload]
        os.close(theirs)
        output = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # how the end of a terminal reads
                break
            output += data
    os.close(ours)
    return output


def test_an_error_is_red_on_a_terminal(tmp_path: Path) -> None:
    """A terminal shows the failed action in red."""
    output = _output(tmp_path, MISSING, "stderr", TERM="xterm-256color")
    assert output.startswith(RED + b"x07: ")
    assert b"missing.json" in output


@pytest.mark.parametrize("env", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_no_colour_where_it_is_not_wanted(tmp_path: Path, env: dict[str, str]) -> None:
    """NO_COLOR, TERM=dumb and an unset TERM disable colours."""
    output = _output(tmp_path, MISSING, "stderr", **env)
    assert b"x07: " in output
    assert b"\x1b[1" not in output
    assert b"\x1b[3" not in output


def test_no_colour_without_a_terminal(tmp_path: Path) -> None:
    """A pipe gets plain text, whatever TERM says."""
    argv = [*X07, *MISSING]
    done = subprocess.run(argv, cwd=tmp_path, env=os.environ | {"TERM": "xterm"}, capture_output=True, check=False)
    assert done.stderr.startswith(b"x07: ")
    assert b"\x1b" not in done.stderr


def test_doctor_marks_its_findings_in_colour(tmp_path: Path) -> None:
    """On a terminal `x07 doctor` shows good findings in green and bad ones in red."""
    output = _output(tmp_path, ["doctor"], "stdout", TERM="xterm")
    assert b"\x1b[32mgood\x1b[0m  folders: " in output
    assert RED + b"BAD\x1b[0m   " in output  # there is no image
