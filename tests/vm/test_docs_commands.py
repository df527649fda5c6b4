"""The commands and Python programs of README, docs and examples, run as a reader types them.

Every `sh` and `python` block runs; a `text` block after it is its output, standard error included, in which `...`
stands for anything on a line, or for any lines. `console` blocks, which need a network, minutes or another machine, do
not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.conftest import FULL
from x07_sandbox.sessions.run import SCALING_HINT

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = ROOT / "README.md"
PAGES: Final = [
    README,
    ROOT / "docs" / "index.md",
    ROOT / "examples" / "README.md",
    ROOT / "docs" / "tutorial.md",
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *(ROOT / "docs" / "reference" / f"{name}.md" for name in ("library", "policy", "programs")),
]
_BLOCK: Final = re.compile(
    r"^```(?P<language>sh|python)\n(?P<text>.*?)^```$(?:\n\n^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL
)

pytestmark = pytest.mark.vm


class Example(NamedTuple):
    """A block of a page as shell text, and the output that the page shows."""

    text: str
    output: str | None


def examples(page: Path) -> list[Example]:
    """Return the blocks of a page; tests/vm/test_readme.py types those of the README without an output."""
    found = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if page != README or block["output"] is not None:
            text = block["text"] if block["language"] == "sh" else f"python -c {shlex.quote(block['text'])}\n"
            found.append(Example(text, block["output"]))
    return found


def typed(found: list[Example]) -> str:
    """Return one session of all blocks, with a NUL after the output of each.

    A failing command ends the session unless the page shows an output, since that may be of a failure.
    xpg_echo: echo interprets backslashes as in zsh and a plain sh, which readers use too.
    """
    blocks = (f"set {'-e' if one.output is None else '+e'}\n{one.text}printf '\\0'\n" for one in found)
    return "shopt -s xpg_echo\nset -u -o pipefail\n" + "".join(blocks)


def prints(shown: str) -> re.Pattern[str]:
    """Return the pattern of an output as a page shows it."""
    lines = [".*" if line == "..." else re.escape(line).replace(r"\.\.\.", "[^\n]*") for line in shown.splitlines()]
    return re.compile("\n".join(lines) + "\n", re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(page: Path, image: Image, state: Path, tmp_path: Path) -> None:
    """A page's commands and Python programs, typed in order, print what the page shows."""
    assert image.digest
    del state
    here = tmp_path / "here"
    here.mkdir()
    for name in (".venv", "examples", "scripts"):
        (here / name).symlink_to(ROOT / name)
    earlier = [] if FULL else [one for other in PAGES[: PAGES.index(page)] for one in examples(other)]
    found = [one for one in examples(page) if one.output is None or one not in earlier]
    done = subprocess.run(
        ["/bin/bash", "-c", typed(found)],
        cwd=here,
        # 3: the grader's submissions have few seconds each.
        env=os.environ
        | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
        | {"X07_VM_MAX_RUNNING": "3"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    said = done.stdout.replace(f" ({SCALING_HINT})", "").split("\0")  # only an emulated machine says it
    for one, output in zip(found, said, strict=False):
        if one.output is not None:
            assert prints(one.output).fullmatch(output), f"{one.text}{output}"
    assert len(said) == len(found) + 1, f"a command failed: {said[-1]}"
    assert "Traceback" not in done.stdout, done.stdout


def test_every_how_to_page_has_a_tested_block() -> None:
    """Every how-to page has a block that runs, but those that need a CI server, a registry or a framework."""
    pages = {page for page in PAGES if page.parent.name == "how-to" and not examples(page)}
    # The frameworks have environments of their own: tests/integrations.
    without = {page.stem for page in pages if "pip install -e '.[" not in page.read_text(encoding="utf-8")}
    # For the others, see test_imported_images and tests/containers/test_in_a_container.py.
    assert without == {"run-in-ci", "run-in-a-container", "use-a-container-image"}
