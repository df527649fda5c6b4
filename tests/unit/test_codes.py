"""Messages have codes, docs/reference/codes.md lists the codes, and no code looks for words in a message."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.make_pages import DOCS
from x07_sandbox.backends.base import NOT_IMPORTED, SLOW_IMPORT
from x07_sandbox.errors import PeerError
from x07_sandbox.policy.outcomes import REASONS, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).resolve().parents[2] / "src" / "x07_sandbox"
TREES = {path.relative_to(SOURCES).as_posix(): ast.parse(path.read_bytes()) for path in SOURCES.rglob("*.py")}
# Methods and functions that look for a text in another, or change it.
SEARCHES = {"count", "endswith", "find", "findall", "fullmatch", "index", "match", "partition", "removeprefix"}
SEARCHES |= {"removesuffix", "replace", "rpartition", "search", "split", "startswith", "sub"}
WORDS = re.compile(r"[A-Za-z]+(?:: | )|\A\W* [A-Za-z]{2,}")
# The words of other programs.
FOREIGN = {
    "cli/parser.py": "argparse",
    "host/documents.py": "msgspec",
    "images/base.py": "debootstrap and dpkg",
    "images/pip.py": "pip",
    "jail/forms.py": "ldd",
    "network/settings.py": "PEM",
    "policy/outcomes.py": "the kernel and setpriv",
    "sessions/html.py": "a patch in git's format",
    "backends/qemu/start.py": "bubblewrap",
    "guest/firewall.py": "a table of our own",
}


def codes(of: str) -> Iterator[str]:
    """The codes in calls of a class."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.search(of, getattr(node.func, "id", "")):
                yield from (ast.literal_eval(word.value) for word in node.keywords if is_code(word))


def is_code(word: ast.keyword) -> bool:
    """Whether a keyword of a call gives a code, as a constant."""
    return word.arg == "code" and isinstance(word.value, ast.Constant)


def class_codes() -> Iterator[str]:
    """The codes of the classes of errors."""
    for tree in TREES.values():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if not any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases):
                continue
            for line in node.body:
                match line:
                    case (
                        ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code)))
                        | ast.AnnAssign(target=ast.Name(id="code"), value=ast.Constant(value=str(code)))
                    ):
                        yield code
                    case _:
                        pass


def listed(section: str) -> list[str]:
    """The codes in a section of the page."""
    text = (
        (DOCS / "reference/codes.md").read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    )
    return re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)


def test_the_page_of_codes_is_current() -> None:
    """docs/reference/codes.md lists every code of a reason, an error and a finding."""
    errors = {*codes("Error$"), *class_codes(), NOT_IMPORTED, SLOW_IMPORT}
    assert listed("Errors") == sorted(errors)
    assert listed("Findings of x07 doctor") == sorted({*codes("^Finding$")})


def test_every_refusal_has_a_code() -> None:
    """Each refusal has a code, and no error has the code of another reason."""
    calls = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    refusals = [node for node in calls if getattr(node.func, "id", "") == "RefusedError"]
    assert [node.lineno for node in refusals if not any(word.arg == "code" for word in node.keywords)] == []
    shared = {"bug", "cancelled", "rolled-back", PeerError.code}
    assert {*listed("Errors")} & {*REASONS} == shared


def test_a_sentence_leaves_out_what_is_unknown() -> None:
    """Words in brackets are left out without their parameter, and a value is never taken for a template."""
    hostile = {"problem": "{x} [ {y}]"}
    assert sentence("protocol", hostile) == "the guest violated the channel protocol: {x} [ {y}]"
    assert " while " in sentence("protocol", hostile | {"doing": "booting"})


def phrases(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and text of each constant with words that the code looks for in another text, or replaces there."""
    constants = {
        target.id: line.value.value
        for line in tree.body
        if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(line.value, ast.Constant)
        for target in (line.targets if isinstance(line, ast.Assign) else [line.target])
        if isinstance(target, ast.Name)
    }
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.expr)):
        searched: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEARCHES:
            searched = node.args[:1]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            searched = [node.left]
        for one in searched:
            for leaf in ast.walk(one):
                text = constants.get(leaf.id) if isinstance(leaf, ast.Name) else getattr(leaf, "value", None)
                if isinstance(text, str) and WORDS.search(text):
                    yield node.lineno, text


def test_no_decision_depends_on_the_words_of_a_message() -> None:
    """The sources look for no words in a text, except in the output of other programs."""
    found = {
        f"{path}:{line}": text for path, tree in TREES.items() for line, text in phrases(tree) if path not in FOREIGN
    }
    assert found == {}
    assert [path for path in FOREIGN if path not in TREES or not any(phrases(TREES[path]))] == []
