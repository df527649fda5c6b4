"""Output of commands on any kind of standard output."""

from __future__ import annotations

import fcntl
import os
import subprocess

import pytest

from tests.command import X07
from x07_sandbox.cli.console import LiveLine
from x07_sandbox.host.waiting import Notice


@pytest.mark.parametrize(
    "words",
    [
        ("policy", "explain", "--json"),
        ("policy", "explain"),
        ("policy", "schema"),
        ("completion", "bash"),
        ("run", "--help-all"),
    ],
)
def test_a_slow_reader_gets_all_output(words: tuple[str, ...]) -> None:
    """A non-blocking standard output with a slow reader gets all output."""
    argv = [*X07, *words]
    whole = subprocess.run(argv, capture_output=True, check=True).stdout
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, False)
    with subprocess.Popen(argv, stdout=write, stderr=subprocess.PIPE) as child, os.fdopen(read, "rb", 0) as pipe:
        os.close(write)
        got = b"".join(iter(lambda: pipe.read(512), b""))
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert len(whole) > 4096
    assert (child.returncode, got == whole) == (0, True)


def test_notices_are_printed_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal ordinary progress is silent and a notice is one line."""
    live = LiveLine()
    live("copying files in")
    live(Notice("saving a machine"))
    live("")
    assert capsys.readouterr().err == "x07: saving a machine\n"
