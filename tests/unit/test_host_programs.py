"""Where programs are found, and what other programs inherit of the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from x07_sandbox.host.paths import PROGRAMS, find_program
from x07_sandbox.host.variables import inherited_environment

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_path_and_the_current_folder_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is found by name in system folders only, or by its absolute path."""
    program = tmp_path / "fetcher"
    program.touch(mode=0o755)
    (tmp_path / "plain").touch(mode=0o644)
    (tmp_path / "cat").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f":.:{tmp_path}")
    for name in ("fetcher", "./fetcher", f"../{tmp_path.name}/fetcher", "", str(tmp_path / "plain")):
        assert find_program(name) is None, name
    assert find_program(str(program)) == str(program)
    assert os.path.dirname(find_program("cat") or "") in PROGRAMS  # noqa: PTH120 - the text


def test_inherited_variables_load_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that inherit the caller's variables get none that makes them load code, and a PATH of system folders."""
    for name in (
        "PYTHONPATH",
        "PERL5OPT",
        "PERLLIB",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "BASH_ENV",
        "BASH_FUNC_x%%",
        "ENV",
    ):
        monkeypatch.setenv(name, "/hostile")
    monkeypatch.setenv("PATH", ":/hostile")
    kept = {"PIP_INDEX_URL": "https://packages.example", "ENVIRONMENT": "test", "X07_VM_MAX_RUNNING": "1"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    found = inherited_environment()
    assert kept.items() <= found.items()
    assert "/hostile" not in "".join(found.values())
