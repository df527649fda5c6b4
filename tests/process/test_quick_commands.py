"""The modules of ours that a command without a run imports: each costs time at every start."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SHOW: Final = """
import os, sys
from x07_sandbox.cli.main import main
code = main(sys.argv[1:])
os.write(2, " ".join(sorted({*sys.modules})).encode())
sys.exit(code)
"""
START: Final = "cli cli.main host host.settings"
LISTS: Final = f"""{START} cli.console cli.json_output cli.parser errors host.documents host.linux host.locks host.paths
host.processes host.variables host.waiting options policy policy.denials records records.runs"""
SANDBOXES: Final = f"""{LISTS} cli.sandbox library library.listing policy.features policy.model reports
reports.sandboxes sessions sessions.result"""


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--version"], START),
        (["ps"], f"{LISTS} cli.runs records.listing records.reader"),
        (["sandbox", "list"], SANDBOXES),
    ],
    ids=["version", "ps", "list"],
)
def test_a_quick_command_imports_only_listed_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], ours: str
) -> None:
    """A command that only shows something imports the listed modules, and neither subprocess nor hashlib."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "state"))
    done = subprocess.run([sys.executable, "-I", "-c", SHOW, *words], capture_output=True, check=True)
    found = done.stderr.decode().split()
    assert sorted(name.removeprefix("x07_sandbox.") for name in found if "x07_sandbox." in name) == sorted(ours.split())
    assert {"subprocess", "hashlib", "locale", "pickle", "shutil"}.isdisjoint(found)
