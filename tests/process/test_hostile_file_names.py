"""Files with hostile names that an ordinary program makes: what the commands about a sandbox print and copy."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.command import X07, x07
from tests.hostile_names import FILES, unseen
from tests.published import document
from tests.unit.test_hostile_names import exact
from x07_sandbox import Sandbox, SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from x07_sandbox.backends.process import OsBackend

pytestmark = pytest.mark.root

MAKE = """
import os, sys
for name in json.loads(sys.stdin.read()):
    raw = name.encode("latin-1")
    with open(raw, "wb") as file:
        file.write(raw)
os.write(1, b"\\n".join(os.listdir(b".")))
"""


@pytest.fixture
def opened(confined: OsBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox in a copy of a folder, which a process of its own holds."""
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
    (tmp_path / "work").mkdir()
    sandbox = Sandbox.create(backend=confined.name, workdir=tmp_path / "work", name="hostile")
    yield sandbox
    if sandbox.alive:
        sandbox.close("discard")


def on_a_terminal(*words: str) -> bytes:
    """Return what a command prints on a terminal."""
    ours, theirs = pty.openpty()
    argv = [*X07, *words]
    printed = bytearray()
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        try:
            while data := os.read(ours, 1 << 16):
                printed += data
        except OSError:  # the end of a terminal
            pass
    os.close(ours)
    assert child.returncode == 0, printed
    return bytes(printed)


def test_commands_about_a_sandbox_print_no_hostile_name(opened: Sandbox, tmp_path: Path) -> None:
    """ls, cp, exec, close, diff and logs print no control character of a file's name; --json and cp keep each name."""
    names = json.dumps([raw.decode("latin-1") for raw in FILES]).encode()
    made = opened.exec(["python3", "-c", f"import json{MAKE}"], input=names)
    assert made.ok, made.stderr
    listed = x07(tmp_path, "sandbox", "ls", "hostile")
    assert (listed.code, len(listed.out.splitlines()), unseen(listed.out)) == (0, len(FILES), set())
    rows = document(x07(tmp_path, "sandbox", "ls", "hostile", "--json").out)["files"]
    assert sorted(map(exact, rows)) == sorted(FILES)
    assert x07(tmp_path, "sandbox", "cp", "hostile:.", "copy").code == 0
    assert sorted(map(os.fsencode, (path.name for path in (tmp_path / "copy").iterdir()))) == sorted(FILES)
    for raw in FILES:
        done = x07(tmp_path, "sandbox", "cp", f"hostile:missing/{os.fsdecode(raw)}", "no")
        assert (done.code, unseen(done.err)) == (2, set())
        with pytest.raises((OSError, SandboxError)):
            opened.files.read(f"missing/{os.fsdecode(raw)}")
    for printed in (
        on_a_terminal("sandbox", "exec", "hostile", "--", "ls", "-A"),
        on_a_terminal("sandbox", "exec", "hostile", "--report-out", str(tmp_path / "report"), "--", "ls", "-A"),
        on_a_terminal("sandbox", "close", "hostile", "--changes", "keep"),
        on_a_terminal("diff", opened.id),
        on_a_terminal("diff", opened.id, "--stat"),
    ):
        text = printed.replace(b"\r\x1b[K", b"")  # of the progress line
        assert {char for char in unseen(text, kept="\n\t\r") if char < "\u00a0"} == set()
