"""`x07 run --help` shows the common options; other help flags show the rest."""

from __future__ import annotations

import re

import pytest

from x07_sandbox.cli.main import main
from x07_sandbox.cli.parser import actions, parser_for
from x07_sandbox.options import BY_FLAG

RARE = {row.flag for row in BY_FLAG.values() if row.level == "all"}
X07_OPTIONS = {row.flag for row in BY_FLAG.values() if row.level == "x07"}
LINES = 60
COLUMNS = 110


def shown(capfd: pytest.CaptureFixture[str], flag: str) -> str:
    """The output of `x07 run` with this flag."""
    with pytest.raises(SystemExit) as ended:
        main(["run", flag])
    assert ended.value.code == 0
    return capfd.readouterr().out


def options(text: str) -> set[str]:
    """The options listed in a help text."""
    return {
        name
        for line in re.findall(r"^  (-\S.*?)(?:  |$)", text, re.MULTILINE)
        for name in re.findall(r"-[-\w=]+", line)
    }


def test_the_help_of_a_run_fits_a_screen(capfd: pytest.CaptureFixture[str]) -> None:
    """`x07 run --help` fits in 60 lines of 110 columns."""
    lines = shown(capfd, "--help").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert not [line for line in lines if line.startswith(" " * 30)], "a help text takes a second line"


def test_everyday_help_leaves_out_rare_and_x07_options(capfd: pytest.CaptureFixture[str]) -> None:
    """`x07 run --help` lists common options and the flags for more help."""
    found = options(shown(capfd, "--help"))
    assert {"-c", "--policy", "--timeout", "--allow-host", "--changes", "--json", "--help-all", "--help-x07"} <= found
    assert not found & (RARE | X07_OPTIONS)


def test_help_for_x07_shows_its_options_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """`--help-x07` lists exactly the options for X07."""
    assert options(shown(capfd, "--help-x07")) == X07_OPTIONS | {"--no-auto-ffi"}


def test_help_all_shows_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    """`--help-all` lists every option."""
    of_x07 = {"--version", "-v", "-V"}
    every = {name for action in actions(parser_for(["run"])) for name in action.option_strings} - of_x07
    assert options(shown(capfd, "--help-all")) == every
    assert every >= RARE | X07_OPTIONS
