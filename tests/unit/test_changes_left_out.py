"""Left-out changes: the rest is applied, they are saved and named, and can be applied later."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.unit.apply_driver import STRIDE, at_call, die
from tests.unit.test_run_host_files import RUN, Run, messages
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.cli.main import main
from x07_sandbox.errors import UsageError
from x07_sandbox.files.changes import Change, Node, RootChanges, unmet, with_dependents
from x07_sandbox.host.paths import private_dir
from x07_sandbox.sessions.patches import patch_chunks
from x07_sandbox.sessions.saved_changes import find_saved, recover_all, undo_saved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = Node(kind="folder", mode=0o755)
EMPTY = Node(kind="file", mode=0o644, size=0, sha256="e" * 64)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run with a state folder of its own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    monkeypatch.chdir(tmp_path)
    private_dir(tmp_path / "vm")
    with contextlib.ExitStack() as stack:
        yield Run(tmp_path / "root", stack)


def folder(name: str) -> Entry:
    """A new folder."""
    return Entry(Kind.FOLDER, name.encode(), mode=0o755)


def file(name: str) -> Entry:
    """A new empty file."""
    return Entry(Kind.FILE, name.encode(), mode=0o644)


def gone(name: str) -> Entry:
    """A removed entry."""
    return Entry(Kind.DELETED, name.encode())


def link(name: str, target: str) -> Entry:
    """A new link."""
    return Entry(Kind.LINK, name.encode(), target=target.encode())


def there(run: Run) -> set[str]:
    """All names below the root."""
    return {str(path.relative_to(run.root)) for path in run.root.rglob("*")}


def command_of(text: str) -> list[str]:
    """The arguments of the command at the end of a line."""
    return shlex.split(text.partition("; to apply: x07 ")[2])


# excluded entries


def test_protected_entries_are_left_out_and_named(run: Run) -> None:
    """Protected entries are left out, the rest is applied, and the printed command applies them later."""
    files = run.files()
    changes, denials, _ = run.back(files, file("appveyor.yml"), folder("src"), folder("src/.envrc"), file("src/a"))
    assert (changes.state, changes.reason, changes.added, changes.left_out) == ("applied", "", 2, 2)
    assert there(run) == {"src", "src/a"}
    assert [(denial.field, denial.subject) for denial in denials] == [
        ("protected", "appveyor.yml"),
        ("protected", "src/.envrc"),
    ]
    left, closing = messages(changes, denials)
    why = "protected: other tools execute or trust it"
    assert left.startswith(f"left out: appveyor.yml ({why}), src/.envrc (protected); to apply: x07 apply ")
    assert closing == "2 added: applied; see x07 diff, revert with x07 undo"
    assert main(command_of(left)) == 0
    assert there(run) == {"src", "src/a", "src/.envrc", "appveyor.yml"}


def test_each_applied_part_can_be_undone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `x07 undo` reverts the last applied part, which can then be applied again."""
    run.back(run.files(), file("a"), file(".envrc"), file("AGENTS.md"))
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    printed = capsys.readouterr().err
    assert f"1 added in {run.root}: applied; revert with x07 undo" in printed
    why = "protected: other tools execute or trust it"
    assert f"left out: AGENTS.md ({why}); to apply: x07 apply {RUN} --allow-protected AGENTS.md" in printed
    assert there(run) == {"a", ".envrc"}
    assert main(["undo"]) == 0
    assert "reverted; to revert the earlier changes too: x07 undo" in capsys.readouterr().err
    assert there(run) == {"a"}
    assert main(["undo"]) == 0
    assert there(run) == set()
    assert main(["apply", "--allow-protected", "*"]) == 0  # both at once
    assert there(run) == {"a", ".envrc", "AGENTS.md"}
    assert main(["undo"]) == 0
    assert there(run) == set()


def test_flags_that_allow_nothing_are_an_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that allow none of the left-out changes apply nothing and print the remaining reasons."""
    run.back(run.files({"deny_hidden": True}), file("a"), file(".envrc"))
    for words in (["--allow-protected", "b"], ["--allow-protected", ".envrc"], ["--allow-hidden"]):
        assert main(["apply", *words]) == 125
        assert ".envrc (" in capsys.readouterr().err
    assert main(["apply", "--allow-hidden", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {"a", ".envrc"}


def test_a_git_folder_comes_in_two_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """`--allow-protected .git` applies no hook; the next printed command does, and each step can be undone."""
    entries = [folder(name) for name in (".git", ".git/hooks", ".git/hooks/x", ".git/objects")]
    changes, denials, _ = run.back(run.files(), *entries)
    assert (changes.state, changes.reason, changes.added) == ("kept", "", 0)
    lines, states = messages(changes, denials), [there(run)]
    while command := next(filter(None, map(command_of, lines)), None):
        assert main(command) == 0
        lines = capsys.readouterr().err.splitlines()
        states.append(there(run))
    assert states == [set(), {".git", ".git/objects"}, {".git", ".git/hooks", ".git/hooks/x", ".git/objects"}]
    for state in (states[1], states[0]):
        assert main(["undo"]) == 0
        assert there(run) == state


def test_a_change_only_the_policy_can_allow(run: Run) -> None:
    """A change that only the policy can allow names the policy value and no apply command."""
    changes, denials, _ = run.back(run.files({"allow_mkdir": False}), folder("d"), file("a"))
    assert changes.apply_left_out == ""
    assert messages(changes, denials) == [
        "left out: d (new folder, and fs.allow_mkdir is false). To allow it, set fs.allow_mkdir to true in the policy.",
        "1 added: applied; see x07 diff, revert with x07 undo",
    ]


def test_a_refused_folder_is_one_line(run: Run) -> None:
    """A refused folder yields one denial with all its reasons, and its command applies everything."""
    names = ["HEAD", "objects", "refs", *(f"refs/{number}" for number in range(50))]
    files = run.files({"deny_hidden": True, "allow_symlinks": False})
    entries = [folder(".git"), *(folder(f".git/{name}") for name in sorted(names)), link(".git/refs/z", "1")]
    changes, (denial,), _ = run.back(files, *entries)
    assert (denial.field, denial.subject, denial.count) == ("protected", ".git", 55)
    assert "fs.deny_hidden is true" in denial.reason
    assert "fs.allow_symlinks is false" in denial.reason
    (line,) = messages(changes, [denial])
    assert "left out: .git (hidden, a symbolic link, protected: other tools execute or trust it)" in line
    assert main(command_of(line)) == 0
    assert (run.root / ".git/refs/z").is_symlink()


def test_diff_and_its_document_show_both_parts(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 diff` shows applied changes first, then left-out ones with their reasons, as does `--json`."""
    files = run.files({"allow_symlinks": True})
    run.back(files, link("l", ".envrc/x"), folder("a"), folder(".envrc"), link(".envrc/x", "y"))
    text = b"".join(patch_chunks(find_saved(RUN))).decode()
    assert text.index("new folder: a") < text.index("left out: .envrc (") < text.index("left out: l (depends on")
    assert main(["diff", "--json"]) == 0
    document = msgspec.json.decode(capsys.readouterr().out)
    (root,) = document["roots"]
    assert [[change["name"] for change in root[key]] for key in ("changes", "left_out")] == [
        ["a"],
        [".envrc", ".envrc/x", "l"],
    ]
    assert document["all_or_nothing"] is False
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert main(["diff"]) == 0
    text = capsys.readouterr().out
    assert (".envrc" in text, "left out" in text) == (True, False)  # they were applied later


def test_a_conflict_applies_nothing(run: Run) -> None:
    """A conflict applies nothing, and the left-out changes remain listed."""
    (run.root / "a").write_text("x")
    files = run.files()
    (run.root / "a").write_text("changed")
    changes, _, _ = run.back(files, gone("a"), file("b"), file(".envrc"))
    assert (changes.state, changes.left_out) == ("conflict", 1)
    assert there(run) == {"a"}


def test_a_created_root_is_no_conflict_later(run: Run) -> None:
    """A write root created by the first part is no conflict for the left-out part or its undo."""
    files = run.files({"write_roots": (f"{run.root}/new",)})
    changes, _, _ = run.back(files, file("a"), file(".envrc"))
    assert (changes.state, there(run)) == ("applied", {"new", "new/a"})
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {"new", "new/a", "new/.envrc"}
    for _ in range(2):
        assert main(["undo"]) == 0
    assert there(run) == set()


# changes that depend on excluded entries


def change(name: str, before: Node | None, after: Node | None) -> Change:
    """One change."""
    return Change(name=name, before=before, after=after)


def content(text: str) -> Node:
    """A file with a content."""
    return Node(kind="file", mode=0o644, size=len(text), sha256=text * 64, at=0)


def test_unselected_changes_that_a_selected_one_needs_are_found() -> None:
    """A removed folder needs the removals below it; a link needs replaced links and folders, but no files."""
    removed = [change("d", FOLDER, None), change("d/a", content("1"), None), change("f", content("1"), content("2"))]
    links = [change(name, None, Node(kind="link", target=target)) for name, target in (("l", "f"), ("m", "d/a"))]
    root = RootChanges(root="/r", guest="/g", missing=False, changes=(*removed, *links))
    found = {name: unmet(root, {name}) for name in ("d", "d/a", "f", "l", "m")}
    assert found == {"d": ("d", "d/a"), "d/a": None, "f": None, "l": None, "m": ("m", "d")}
    assert unmet(root, {"d", "d/a", "m"}) is None


DEPENDING: list[tuple[list[Change], set[str], set[str]]] = [
    ([change("d", None, FOLDER), change("d/a", None, content("1")), change("e", None, FOLDER)], {"d"}, {"d", "d/a"}),
    ([change("d", None, FOLDER), change("d/a", None, content("1"))], {"d/a"}, {"d/a"}),
    ([change("a", content("1"), None), change("b", None, content("1"))], {"b"}, {"a", "b"}),
    (
        [change("d", FOLDER, None), change("d/a", content("1"), None), change("d/b", content("2"), None)],
        {"d/a"},
        {"d", "d/a"},
    ),
    (
        [
            *(change(name, None, Node(kind="link", target=target)) for name, target in (("l", "m/x"), ("m", "d"))),
            *(change(name, None, FOLDER) for name in ("d", "n")),
        ],
        {"d"},
        {"d", "l", "m"},
    ),
    (
        [
            *(change(f"old/{name}", content(name), None) for name in "123"),
            *(change(f"new/{name}", None, content(name)) for name in "123"),
        ],
        {"new/2"},
        {"old/2", "new/2"},
    ),
    (
        [
            *(change(name, FOLDER, None) for name in ("old", "old/empty")),
            *(change(f"old/{name}", EMPTY, None) for name in ("a", "b")),
            *(change(name, None, FOLDER) for name in ("new", "new/empty")),
            *(change(f"new/{name}", None, EMPTY) for name in ("a", "b")),
        ],
        {"new"},
        {"old", "old/a", "old/b", "old/empty", "new", "new/a", "new/b", "new/empty"},
    ),
    ([change("a", EMPTY, None), change("b", None, EMPTY)], {"b"}, {"b"}),
]


@pytest.mark.parametrize(("changes", "refused", "left"), DEPENDING)
def test_dependents_are_left_out_too(changes: list[Change], refused: set[str], left: set[str]) -> None:
    """Left-out entries take their dependents along: entries below, links, renames and folders, no others."""
    assert with_dependents(changes, refused) == left


def test_a_rename_to_a_protected_name_loses_nothing(run: Run) -> None:
    """A file moved to a protected name stays in place until that name is allowed."""
    (run.root / "a").symlink_to("x")
    (run.root / "d").mkdir()
    (run.root / "d/b").symlink_to("y")
    files = run.files({"allow_symlinks": True})
    entries = [gone("d/b"), gone("d"), gone("a"), link(".envrc", "x"), link("c", "y")]
    changes, _, _ = run.back(files, *entries)
    assert changes.state == "applied"
    assert there(run) == {"a", "c"}
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {".envrc", "c"}


def test_thousands_of_links_and_renames_take_no_time() -> None:
    """Dependents of thousands of links and renames are found in linear time."""
    many = 5000
    links = [change(f"l{n}", None, Node(kind="link", target=f"l{n + 1}/x")) for n in range(many)]
    moved = [change(f"a{n}", content("1"), None) for n in range(many)]
    moved += [change(f"b{n}", None, content("1")) for n in range(many)]
    assert len(with_dependents([*links, *moved], {f"l{many}", "a0"})) == many + 1 + 2


# after a kill


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_kill_of_a_later_apply_or_undo_is_recovered(run: Run, verb: str) -> None:
    """After a kill during apply or undo, the tree is entirely old or new, counts as what it is, and can be undone."""
    run.back(run.files(), folder("a"), folder("AGENTS.md"), folder("a/.envrc"))
    first, both = {"a"}, {"a", "AGENTS.md", "a/.envrc"}
    every = ["apply", "--allow-protected", "*"]
    killed = 0
    for number in itertools.count(1, STRIDE):
        if verb == "undo":
            assert main(every) == 0
        pid = os.fork()
        if pid == 0:
            at_call(number, die)
            main(every if verb == "apply" else ["undo"])
            os._exit(0)
        ended = os.waitpid(pid, 0)[1] == 0
        recover_all(pytest.fail)
        assert there(run) in (first, both)
        assert {name for _, name in find_saved(RUN).done()} == there(run)
        if there(run) == both or len(find_saved(RUN).undos) > 1:
            undo_saved(find_saved(RUN), lambda _path: None)
        assert there(run) == first
        assert find_saved(RUN).applied
        if ended:
            break
        killed += 1
    assert killed * STRIDE > 10
    undo_saved(find_saved(RUN), lambda _path: None)
    assert there(run) == set()


@pytest.mark.usefixtures("run")
def test_without_changes_the_error_names_the_command_that_makes_some() -> None:
    """x07 diff, apply and undo say how to let a program change files if no run has changed any."""
    with pytest.raises(UsageError) as caught:
        find_saved(None)
    assert str(caught.value) == (
        "cannot find changes to files: no run has changed any files. "
        "To let a program change a folder: x07 run --workdir DIR ..."
    )
    with pytest.raises(UsageError, match="no run with an id that starts with 123 has changed any files"):
        find_saved("123")
