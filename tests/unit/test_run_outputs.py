"""Files that the flags of a run name: what the project holds is not written over, what was done is told in any case."""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.published import document
from x07_sandbox.cli.written import place_for_artifact, write_files
from x07_sandbox.errors import UsageError
from x07_sandbox.runs.run import failure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a host without guest images."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def x07(*words: str, module: str = "main", most_bytes: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """A command of ours. most_bytes: how large a file it may write, so that a larger one meets the end of a disk."""

    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    argv = [sys.executable, "-m", f"x07_sandbox.cli.{module}", *words]
    return subprocess.run(argv, input=b"", capture_output=True, check=False, timeout=60, preexec_fn=limit)


# what cannot be written


def test_a_file_that_cannot_be_written_loses_nothing_else(place: Path) -> None:
    """Where one file cannot be written, the others are, and the result stays, with a warning and exit code 125."""
    options = argparse.Namespace(compiled_out=place / "gone/prog", diff=place / "gone/d", report_out=place / "r")
    result = failure(UsageError("a", "b", "c"))
    with contextlib.ExitStack() as stack:
        artifact = place_for_artifact(stack)
        assert artifact.take(b"\x7fELF")
        artifact.complete = True
        told, unwritten = write_files(options, result, artifact)
    assert [line.partition(": ")[0] for line in unwritten] == [
        f"cannot write {place}/gone/{name}" for name in ("prog", "d")
    ]
    assert (told.run, told.outcome, told.x07_exit_code) == (result.run, result.outcome, 125)
    assert told.warnings == [*result.warnings, *unwritten]
    assert document((place / "r").read_bytes())["warnings"] == told.warnings


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_report_that_cannot_be_written_leaves_the_result(words: tuple[str, ...]) -> None:
    """A full disk under --report-out is told beside how the run ended, not in place of it."""
    done = x07("run", *words, "--report-out", "r", "--toolchain", "shell", "-c", "true", most_bytes=100)
    assert done.returncode == 125
    if words:
        result = document(done.stdout)
        assert result["digests"]["source"]
        assert "cannot write r: File too large" in result["warnings"][0]
    else:
        assert b"x07: refused: no guest image" in done.stderr
        assert b"x07: cannot write r: File too large" in done.stderr
