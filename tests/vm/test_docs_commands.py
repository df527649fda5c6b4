"""README, docs and examples, typed page by page as they stand there; where an output follows, it is compared."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import FULL
from x07_sandbox.runs.run import SCALING_HINT

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK: Final = re.compile(
    r"^```(?P<language>sh|python)\n(?P<text>.*?)^```$(?:\n\n^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL
)
# Those that take minutes, or change the machine; tests of their own run them.
_OTHERS: Final = ("scripts/", "x07 image build")

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def examples(page: Path) -> list[tuple[list[str], str | None]]:
    """Command, output: of the page's commands that are ours, and of its Python programs, which an output follows.

    xpg_echo: echo takes backslashes as it does in zsh and in a plain sh, in which commands are typed too.
    """
    found: list[tuple[list[str], str | None]] = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        text, output = block["text"], block["output"]
        if block["language"] == "python" and output:
            found.append(([".venv/bin/python", "-c", text], output))
        if page == PAGES[0] and not output:
            continue  # tests/vm/test_readme.py types these
        if block["language"] == "sh" and ".venv/bin/" in text and not any(other in text for other in _OTHERS):
            found.append((["/bin/bash", "-O", "xpg_echo", "-euo", "pipefail", "-c", text], output))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(page: Path, image: Image, state: Path, tmp_path: Path) -> None:
    """A page's commands and Python programs, one after the other, end well, with the output that the page shows."""
    assert image.digest
    del state
    here = tmp_path / "here"  # what they write goes below build/, which is the test's own
    here.mkdir()
    for name in (".venv", "examples", "scripts"):
        (here / name).symlink_to(ROOT / name)
    before = PAGES[: PAGES.index(page)]
    known = [] if FULL else [one for earlier in before for one in examples(earlier)]
    for argv, output in examples(page):
        if (argv, output) in known and output is not None:
            continue  # what stands on an earlier page too is typed there
        done = subprocess.run(
            argv,
            cwd=here,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{argv[-1]}{done.stderr}"
        if output is not None:
            assert done.stdout.replace(f" ({SCALING_HINT})", "") == output, argv[-1]  # only an emulated machine says it
    assert sorted(path.name for path in here.iterdir()) in (
        [".venv", "examples", "scripts"],
        [".venv", "build", "examples", "scripts"],
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_is_python(page: Path) -> None:
    """Every Python block of a page compiles, also those that are only a part of a program."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["language"] == "python":
            compile(block["text"], str(page), "exec")
