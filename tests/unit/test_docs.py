"""Generated documents are current, and every command in the README is tested."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from x07_sandbox.backends.base import SLOWDOWN

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


def readme_commands() -> list[str]:
    """The command lines in the README's ``sh`` blocks, without comments, with continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```$", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    bare = (re.sub(r"\s+#\s.*$", "", line).strip() for line in lines)
    return [" ".join(line.split()) for line in bare if line and not line.startswith("#")]


def tested_commands() -> set[str]:
    """The string constants of tests/vm/test_readme.py, which include each README command that it runs."""
    tree = ast.parse((ROOT / "tests" / "vm" / "test_readme.py").read_bytes())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_promise_names_tests_that_exist() -> None:
    """The specification has eight promises, each names test files that exist, and no file proves two promises."""
    text = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
    promises = [re.findall(r"`(tests/[^`]+)`", part) for part in re.split(r"(?m)^## \d\. ", text)[1:]]
    assert len(promises) == 8
    assert all(promises)
    found = {pattern: [*ROOT.glob(pattern)] for patterns in promises for pattern in patterns}
    assert [pattern for pattern, files in found.items() if not files] == []
    files = [file for patterns in promises for pattern in patterns for file in found[pattern]]
    assert len(files) == len(set(files))


def test_every_command_of_the_readme_is_tested() -> None:
    """Every command line in the README is run by a test."""
    commands = readme_commands()
    assert commands, "the README shows no command"
    untested = [command for command in commands if command not in tested_commands()]
    assert not untested, f"not in tests/vm/test_readme.py: {untested}"


def test_readme_links_lead_somewhere() -> None:
    """Every relative link in the documents leads to an existing file."""
    dead = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert not dead, dead


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of the fenced and indented blocks of a page, without those for Sphinx."""
    fence, before = "", ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip()
        indented = line.startswith("    ") and (not before or before.startswith("    "))
        if (fence or indented) and not fence.startswith("```{"):
            yield line
        before = line.strip() and line


def test_code_fits_into_80_columns() -> None:
    """No block of code on a page is wider than 80 columns, so that none scrolls sideways."""
    wide = [
        f"{path.name}: {line}"
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for line in code_lines(path.read_text(encoding="utf-8"))
        if len(line) > 80
    ]
    assert not wide, "\n".join(wide)


def test_all_pages_state_the_same_slowdown_of_emulation() -> None:
    """Every page that says how much longer CPU work takes under emulation has the factor of the messages."""
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pages = {path: " ".join(path.read_text(encoding="utf-8").split()) for path in paths}
    stated = {
        path.relative_to(ROOT): words
        for path, text in pages.items()
        for words in re.findall(r"CPU(?:-bound)? work [^.]{0,40}?takes ([^.]{1,40}?) as long", text)
    }
    assert len(stated) >= 8
    assert set(stated.values()) == {SLOWDOWN}, stated


@pytest.mark.parametrize("listed", ["runtime", "dev"])
def test_every_dependency_has_its_reason(listed: str) -> None:
    """CONTRIBUTING.md explains every Python dependency."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    wanted = re.findall(r"(?m)^([a-z][a-z0-9-]+)", (ROOT / "requirements" / f"{listed}.in").read_text(encoding="utf-8"))
    assert wanted
    assert [name for name in wanted if f"`{name}`" not in text] == []


def test_every_debian_package_has_its_reason() -> None:
    """CONTRIBUTING.md explains every Debian package that the scripts install."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ask = ["bash", "-c", "source scripts/lib.sh && runtime_packages && optional_packages && test_packages"]
    names = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {"bubblewrap", "ca-certificates", "sudo"} <= set(names)
    assert [name for name in names if f"`{name}`" not in text] == []
