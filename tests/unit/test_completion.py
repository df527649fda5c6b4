"""`x07 completion`: shells complete the words that the parsers accept."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.command import X07
from x07_sandbox.cli.parser import VERBS

if TYPE_CHECKING:
    from pathlib import Path

# Asks as bash itself does on a tab: which function is registered for the command, then that function.
ASK = """
source "$1" || exit 9
shift
registered=$(complete -p "$1") || exit 8
function=$(sed -E 's/.*-F ([^ ]+) .*/\\1/' <<<"$registered")
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"$function" "$1" "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completion script for bash."""
    path = tmp_path_factory.mktemp("completion") / "x07.bash"
    path.write_bytes(subprocess.run([*X07, "completion", "bash"], capture_output=True, check=True).stdout)
    return path


def completed(script: Path, *words: str) -> set[str]:
    """The words that bash offers for the last word."""
    argv = ["/bin/bash", "--norc", "-c", ASK, "ask", str(script), *words]
    done = subprocess.run(argv, cwd=script.parent, capture_output=True, text=True, check=True)
    return {line.rstrip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("command", ["x07", "x07-sandbox"])
def test_bash_completes_verbs(script: Path, command: str) -> None:
    """Bash completes every verb for both names of the command."""
    assert set(VERBS) <= completed(script, command, "")
    assert completed(script, command, "pru") == {"prune"}


def test_bash_completes_options_and_choices(script: Path) -> None:
    """Bash completes options, sub-verbs' options and their choices."""
    assert {"--images", "--cache", "--runs", "--dry-run"} <= completed(script, "x07", "prune", "--")
    assert "--template" in completed(script, "x07", "policy", "init", "--")
    assert completed(script, "x07", "init", "--toolchain", "pyth") == {"python"}
    assert {"bash", "zsh", "tcsh"} <= completed(script, "x07", "completion", "")


def test_bash_completes_files_where_one_is_meant(script: Path) -> None:
    """Bash completes file names where a file is expected."""
    (script.parent / "policy one.json").touch()
    assert "policy one.json" in completed(script, "x07", "run", "--policy", "pol")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_gets_every_verb(shell: str) -> None:
    """The script for each shell names all verbs and no path of this machine."""
    done = subprocess.run([*X07, "completion", shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert all(re.search(rf"\b{verb}\b", done.stdout) for verb in VERBS)
    assert sys.prefix not in done.stdout
