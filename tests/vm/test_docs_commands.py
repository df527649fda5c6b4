"""Every command in the README and the docs, typed as it stands there; where its output follows, compared with it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from x07_sandbox.images.store import Image

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK: Final = re.compile(r"^```sh\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
# Those that take minutes, or change the machine; tests of their own run them.
_OTHERS: Final = ("scripts/", "x07 image build")

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def examples() -> list[tuple[str, str, str | None]]:
    """Page, commands, output: of every block whose commands are ours."""
    found = []
    for page in PAGES:
        for commands, output in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if ".venv/bin/" in commands and not any(other in commands for other in _OTHERS):
                found.append((page.name, commands, output or None))
    return found


@pytest.mark.parametrize(("page", "commands", "output"), examples())
def test_the_commands_of_a_page_work(
    page: str, commands: str, output: str | None, image: Image, state: Path, tmp_path: Path
) -> None:
    """Each block ends well, with the output that the page shows, if it shows one."""
    assert image.digest
    del state
    here = tmp_path / "here"  # what they write goes below build/, which is the test's own
    (here / "build").mkdir(parents=True)
    for name in (".venv", "examples", "scripts"):
        (here / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", commands],
        cwd=here,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"
    if output is not None:
        assert done.stdout == output
