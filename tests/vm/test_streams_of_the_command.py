"""The command's own standard streams: closed, broken, or a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]


def _shell(tmp_path: Path, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which $X07 is the command and $PROGRAM a program that prints two control characters."""
    program = tmp_path / "program.py"
    program.write_text('print("early \\x9b31m \\u202e")\n', encoding="utf-8")
    names = {"X07": f"{sys.executable} -m x07_sandbox.cli.main", "PROGRAM": str(program)}
    return subprocess.run(
        ["/bin/sh", "-c", line],
        env=os.environ | names | {"X07_VM_STATE_DIR": str(tmp_path / "jobs")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


def test_a_closed_standard_output_is_never_mistaken(tmp_path: Path, image: Image) -> None:
    """With standard output, or all three streams, closed, the program runs to its end and nothing is cancelled."""
    assert image.digest
    done = _shell(tmp_path, "$X07 run $PROGRAM <&- >&- 2>&-; echo $?")
    assert done.stdout == b"0\n"


def test_json_holds_no_control_character(tmp_path: Path, image: Image) -> None:
    """The JSON result is ASCII: control characters of a guest's text are escaped, and the value is the program's."""
    assert image.digest
    done = _shell(tmp_path, "$X07 run --json $PROGRAM")
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["stdout"]["text"] == "early \x9b31m \u202e\n"


def test_output_that_cannot_be_passed_on_is_said(tmp_path: Path, image: Image) -> None:
    """A full disk behind standard output is told on standard error, and is no bug of ours."""
    assert image.digest
    done = _shell(tmp_path, "$X07 run $PROGRAM >/dev/full")
    assert b"could not be passed on" in done.stderr
    assert b"Traceback" not in done.stderr


def test_input_that_cannot_be_read_is_said(tmp_path: Path, image: Image) -> None:
    """Input that breaks off in an error is a warning, and has no digest."""
    assert image.digest
    done = _shell(tmp_path, "$X07 run --json $PROGRAM </proc/self/mem")
    result = json.loads(done.stdout)
    assert [warning for warning in result["warnings"] if "input could not be read" in warning]
    assert result["digests"]["input"] is None


@pytest.mark.parametrize(
    ("words", "code"), [("run --json", 2), ("run --json --bogus x.py", 2), ("run --json /dev/null/x.py", 2)]
)
def test_wrong_usage_with_json_is_one_object(tmp_path: Path, words: str, code: int) -> None:
    """With --json wrong usage, too, is exactly one JSON object on standard output, and exit 2."""
    done = _shell(tmp_path, f"$X07 {words}")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (code, "usage-error")


def test_a_folder_is_no_program(tmp_path: Path, image: Image) -> None:
    """A folder with the name of a source is wrong usage, not a bug."""
    assert image.digest
    (tmp_path / "folder.py").mkdir()
    done = _shell(tmp_path, f"$X07 run {tmp_path}/folder.py")
    assert done.returncode == 2
    assert b"no regular file" in done.stderr
