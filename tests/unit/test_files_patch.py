"""The patch shown by `x07 diff`: exact, and bounded in time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.fuzz_patch import applied, lines
from tests.unit.apply_trees import NEW, OLD, Tree, difference, put
from x07_sandbox.files import patch as patches
from x07_sandbox.files.changes import ChangeSet, Refused, RootChanges
from x07_sandbox.files.patch import Work, hunks, patch, summarize

if TYPE_CHECKING:
    import pytest


# Lines that repeat, and after each match two halves in which they do again.
MANY = b"".join(b"a\na\n%d\n" % number for number in range(499))
OTHER = b"".join(b"a\n-%d\na\na\n" % number for number in range(370))


TEXTS = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n"]), max_size=30).map(b"".join)


@given(TEXTS, TEXTS, st.sampled_from([b"", b"end"]), st.integers(0, 300))
@example(MANY, OTHER, b"", 3_000_000)
def test_hunks_make_the_new_text_of_the_old_one(old: bytes, new: bytes, end: bytes, left: int) -> None:
    """The hunks turn the old text into the new one, however small the comparison budget."""
    work = Work(left)
    assert applied(lines(old), list(hunks(old, new + end, work))) == new + end
    assert 0 <= work.left <= left


def test_repeated_lines_cost_bounded_comparisons() -> None:
    """Texts of repeated lines cost a bounded number of comparisons."""
    work = Work(patches.PAIRS_MAX)
    list(hunks(MANY, OTHER, work))
    assert work.left >= patches.PAIRS_MAX - 5_000_000
    source = b"".join(b"def f%d():\n\n    return 1\n\n" % number for number in range(300))
    changed = source.replace(b"f7", b"g7").replace(b"f99():", b"f99(x):")
    output = b"".join(hunks(source, changed, Work(patches.PAIRS_MAX)))
    assert output.count(b"\n-") == output.count(b"\n+") == 12


def test_all_files_share_one_comparison_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of a set share one comparison budget."""
    monkeypatch.setattr(patches, "PAIRS_MAX", 1_500_000)
    old = b"".join(b"a\n%d\n" % number for number in range(100))
    new = b"".join(b"a\n-%d\n" % number for number in range(100))
    before: Tree = {f"{number:02}": ("file", 0o644, old) for number in range(30)}
    after: Tree = {f"{number:02}": ("file", 0o644, new) for number in range(30)}
    changes, _ = difference(Path("/r"), before, after)
    output = b"".join(patch(changes, lambda *_: old, lambda *_: new)).split(b"diff --git ")[1:]
    assert len(output) == 30
    kept = [text.count(b"\n a") for text in output]
    assert kept[0] > 50
    assert kept[-1] == 1  # their common beginning


def test_git_applies_the_patch(tmp_path: Path) -> None:
    """`git apply` accepts the patch, and changes that git cannot express are comments."""
    binary = ("file", 0o644, b"\0")
    loose = {name: (kind, mode | 0o600, content) for name, (kind, mode, content) in OLD.items()}  # git is no root
    old, new = {**loose, "binary": binary}, {**NEW, "binary": ("file", 0o644, b"\0\0"), "binary-new": binary}
    root = tmp_path / "root"
    put(root, old)
    changes, _ = difference(root, old, new)
    (one,) = changes.roots
    assert any(change.after and change.after.mode == 0o600 for change in one.changes)
    output = b"".join(patch(changes, lambda _root, name, _node: old[name][2], lambda _root, name, _node: new[name][2]))
    argv = ["/usr/bin/env", "git", "-c", "core.fileMode=true", "apply", "--unsafe-paths", "-"]
    subprocess.run(argv, input=output, cwd=root, check=True, capture_output=True)
    plain = {name: entry for name, entry in new.items() if entry[0] != "folder" and not name.startswith("binary")}
    for name, (kind, mode, content) in plain.items():
        path = root / name
        assert (os.fsencode(path.readlink()) if kind == "link" else path.read_bytes()) == content
        assert kind == "link" or bool(path.stat().st_mode & 0o100) == bool(mode & 0o100)
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}
    assert there == {*plain, "binary"}
    for line in (
        b"# new folder: added-tree",
        b"# folder: open, mode 0755 -> 0555",
        b"# binary-new: not shown, nothing",
    ):
        assert line in output
    assert b"# changed, mode 0644 -> 0600" in output


def test_a_summary_names_what_has_no_change() -> None:
    """The summary also names files that were refused and of which nothing can be saved, such as a pipe."""
    refused = (
        Refused(name="p", rule="kind", why="a pipe cannot be copied"),
        Refused(name="p", rule="fs.max_depth", why="too deep"),
    )
    root = RootChanges(root="/srv/x", guest="/work", missing=False, changes=(), refused=refused)
    lines = list(summarize(ChangeSet(run="1-1-1", roots=(root,)), lambda *_: None, lambda *_: None))
    assert lines == [b"# in /srv/x\n", b"left out: p (a pipe cannot be copied; too deep)\n"]
