"""Which commands the waiting interpreter, or a copy of it, may run."""

from __future__ import annotations

import pytest

from x07_sandbox.channel.messages import ENVIRONMENT
from x07_sandbox.guest.interpreter import PYTHON, can_become, can_fork
from x07_sandbox.guest.waiting import CODE_MAX, PLACEHOLDER

SCRIPT = [PYTHON, "/x07/in/program/a.py"]
LONG = "x" * (len(PLACEHOLDER) + 1)

COPIED: dict[str, tuple[list[str], dict[str, str], bool]] = {
    "script": ([PYTHON, "a.py", "b"], {}, True),
    "script of a run": (SCRIPT, {}, True),
    "code": ([PYTHON, "-c", "pass"], {}, True),
    "module": ([PYTHON, "-m", "json.tool", "x"], {}, True),
    "long code": ([PYTHON, "-c", "#" * CODE_MAX], {}, True),
    "too long code": ([PYTHON, "-c", "#" * (CODE_MAX + 1)], {}, False),
    "too long code in bytes": ([PYTHON, "-c", "#" * (CODE_MAX // 2) + "\u00e4" * (CODE_MAX // 2)], {}, False),
    "long path": ([PYTHON, LONG], {}, False),
    "no arguments": ([PYTHON], {}, False),
    "no code": ([PYTHON, "-c"], {}, False),
    "standard input": ([PYTHON, "-"], {}, False),
    "option": ([PYTHON, "-u", "a.py"], {}, False),
    "option with code": ([PYTHON, "-Ic", "pass"], {}, False),
    "other interpreter": (["/opt/x07/venv/bin/python3", "a.py"], {}, False),
    "other program": (["/bin/sh", "-c", "pass"], {}, False),
    "variable of x07": ([PYTHON, "a.py"], {"X07_IN": "/x07/in"}, True),
    "variable": ([PYTHON, "a.py"], {"OTHER": "1"}, False),
    "variable of Python": ([PYTHON, "a.py"], {"PYTHONPATH": "/x"}, False),
    "variable of the loader": ([PYTHON, "a.py"], {"LD_PRELOAD": "/x"}, False),
    "other home": ([PYTHON, "a.py"], {"HOME": "/tmp"}, False),  # noqa: S108 - no file of this host
}


@pytest.mark.parametrize("case", COPIED)
def test_only_plain_commands_of_python_start_from_a_copy(case: str) -> None:
    """A copy runs scripts, code and modules of the image's Python, unless something was read before the copy."""
    argv, env, copied = COPIED[case]
    assert can_fork(argv, {**ENVIRONMENT, **env}, own_modules=False) is copied
    assert not can_fork(argv, {**ENVIRONMENT, **env}, own_modules=True)


def test_a_variable_that_python_reads_early_must_have_the_usual_value() -> None:
    """Without a variable that the waiting interpreter had, a fresh one is started."""
    for name in ("HOME", "LANG", "PYTHONUNBUFFERED"):
        env = {key: value for key, value in ENVIRONMENT.items() if key != name}
        assert not can_fork([PYTHON, "a.py"], env, own_modules=False)


def test_the_waiting_interpreter_becomes_only_scripts_of_a_run() -> None:
    """The interpreter itself becomes the script of a run; for other commands it stays, to be copied."""
    assert can_become(SCRIPT, ENVIRONMENT, preload=True, alone=False, own_modules=False)
    assert not can_become(SCRIPT, ENVIRONMENT, preload=True, alone=True, own_modules=False)
    for argv in ([PYTHON, "a.py"], [PYTHON, "-c", "pass"], ["/bin/true"]):
        assert not can_become(argv, ENVIRONMENT, preload=True, alone=False, own_modules=False)
