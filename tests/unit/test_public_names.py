"""The library's public names and their types."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import x07_sandbox
from x07_sandbox import errors
from x07_sandbox.errors import SandboxError
from x07_sandbox.policy.outcomes import OUTCOMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """from x07_sandbox import Outcome, Output, run_program

result = run_program("prog.py")
wanted: Outcome = "timeout"
stream: Output = result.stdout
good = result.outcome == "cpu-limit"
bad = result.outcome == "timed-out"
"""


def test_help_lists_the_public_functions() -> None:
    """`help(x07_sandbox)` lists every public name with its arguments, the most important functions first."""
    text = pydoc.plain(pydoc.render_doc(x07_sandbox))
    start = "\n".join(text.splitlines()[:40])
    assert all(call in start for call in ("run_program(program, args=(),", "exec_command(command,", "undo(run)"))
    named = {name for name in x07_sandbox.__all__ if not name.startswith("_")}
    top = text.partition("PACKAGE CONTENTS")[0]
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", top)] == []
    functions = text.partition("\nFUNCTIONS\n")[2]
    for name in ("run_program", "run_program_async", "load_policy"):
        assert f"\n    {name}(" in functions or f" {name}(" in functions
    assert set(x07_sandbox.__all__) <= set(dir(x07_sandbox))


def test_errors_that_docstrings_name_are_public() -> None:
    """Every error of this package that the docstring of a public function or class names is public."""
    ours = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SandboxError)}
    public = [getattr(x07_sandbox, name) for name in x07_sandbox.__all__]
    documented = [one for one in public if isinstance(one, type) or callable(one)]
    documented += [member for one in public if isinstance(one, type) for member in vars(one).values()]
    named = {word for one in documented for word in re.findall(r"\w+", one.__doc__ or "")}
    assert named & ours >= {"SandboxError", "UsageError"}
    assert named & ours <= set(x07_sandbox.__all__)


def test_outcome_lists_all_outcomes() -> None:
    """`Outcome` lists exactly the possible outcomes."""
    assert list(get_args(x07_sandbox.Outcome)) == list(OUTCOMES)


def test_a_type_checker_finds_a_wrong_outcome(tmp_path: Path) -> None:
    """A type checker rejects an impossible outcome."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    argv = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line] == ["7"], done.stdout
