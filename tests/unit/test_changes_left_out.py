"""Promises of changes that are left out: the rest is applied, they are kept and named, and can be applied later."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.unit.test_run_host_files import RUN, Run, die_at, said
from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.cli.changes_text import patch_chunks
from x07_sandbox.cli.main import main
from x07_sandbox.errors import UsageError
from x07_sandbox.files.changes import Change, Node, decode, encode
from x07_sandbox.files.dependencies import with_dependents
from x07_sandbox.host.paths import private_dir
from x07_sandbox.runs.saved_changes import find_saved, recover_all, undo_saved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = Node(kind="folder", mode=0o755)
EMPTY = Node(kind="file", mode=0o644, size=0, sha256="e" * 64)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run with a state of its own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    private_dir(tmp_path / "vm")
    with contextlib.ExitStack() as stack:
        yield Run(tmp_path / "root", stack)


def folder(name: str) -> Entry:
    """A new folder that a guest tells of."""
    return Entry(Kind.FOLDER, name.encode(), mode=0o755)


def file(name: str) -> Entry:
    """A new empty file."""
    return Entry(Kind.FILE, name.encode(), mode=0o644)


def gone(name: str) -> Entry:
    """Something that was removed."""
    return Entry(Kind.DELETED, name.encode())


def link(name: str, target: str) -> Entry:
    """A new link."""
    return Entry(Kind.LINK, name.encode(), target=target.encode())


def there(run: Run) -> set[str]:
    """All names below the root."""
    return {str(path.relative_to(run.root)) for path in run.root.rglob("*")}


def command_of(text: str) -> list[str]:
    """The arguments of the command that a line ends with."""
    return shlex.split(text.partition("; to apply: x07 ")[2])


# what is left out


def test_the_rest_is_applied_and_one_line_names_what_is_not(run: Run) -> None:
    """A protected name stays out with all below it, the others come, and the line's command brings it afterwards."""
    files = run.files()
    changes, denials, _ = run.back(files, file("appveyor.yml"), folder("src"), folder("src/.envrc"), file("src/a"))
    assert (changes.state, changes.reason, changes.added, changes.left_out) == ("applied", "", 2, 2)
    assert there(run) == {"src", "src/a"}
    assert [(denial.field, denial.subject) for denial in denials] == [
        ("protected", "appveyor.yml"),
        ("protected", "src/.envrc"),
    ]
    left, closing = said(changes, denials)
    assert left.startswith("left out: appveyor.yml (protected), src/.envrc (protected); to apply: x07 apply ")
    assert closing == "2 added: applied; x07 diff, x07 undo"
    assert main(command_of(left)) == 0
    assert there(run) == {"src", "src/a", "src/.envrc", "appveyor.yml"}


def test_what_was_left_out_has_an_undo_of_its_own(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """x07 undo takes back what was applied last, and a second one the rest; each can be applied again."""
    run.back(run.files(), file("a"), file(".envrc"), file("AGENTS.md"))
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    said = capsys.readouterr().err
    assert "1 added: applied; x07 undo" in said
    assert f"left out: AGENTS.md (protected); to apply: x07 apply {RUN} --allow-protected AGENTS.md" in said
    assert there(run) == {"a", ".envrc"}
    assert main(["undo"]) == 0
    assert "reverted; x07 undo reverts what was applied before" in capsys.readouterr().err
    assert there(run) == {"a"}
    assert main(["undo"]) == 0
    assert there(run) == set()
    assert main(["apply", "--allow-protected", "*"]) == 0  # both at once
    assert there(run) == {"a", ".envrc", "AGENTS.md"}
    assert main(["undo"]) == 0
    assert there(run) == set()


def test_what_is_applied_already_is_no_second_undo(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The command for what was left out can be given twice, and one x07 undo takes back all that it did."""
    run.back(run.files(), file("a"), file(".envrc"))
    for _ in range(2):
        assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert "nothing to apply" in capsys.readouterr().err
    for expected in ({"a"}, set()):
        assert main(["undo"]) == 0
        assert there(run) == expected
    with pytest.raises(UsageError, match="they are not applied"):
        undo_saved(find_saved(RUN), lambda _path: None)


def test_flags_that_let_nothing_of_what_was_left_out_are_an_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern for another name, or for one of two reasons, applies nothing, and says what is against it."""
    run.back(run.files({"deny_hidden": True}), file("a"), file(".envrc"))
    for words in (["--allow-protected", "b"], ["--allow-protected", ".envrc"], ["--allow-hidden"]):
        assert main(["apply", *words]) == 125
        assert ".envrc: " in capsys.readouterr().err
    assert main(["apply", "--allow-hidden", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {"a", ".envrc"}


def test_a_git_folder_comes_in_two_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """--allow-protected .git brings no hook; the line then printed brings that, and each step can be undone."""
    entries = [folder(name) for name in (".git", ".git/hooks", ".git/hooks/x", ".git/objects")]
    changes, denials, _ = run.back(run.files(), *entries)
    lines, states = said(changes, denials), [there(run)]
    while command := next(filter(None, map(command_of, lines)), None):
        assert main(command) == 0
        lines = capsys.readouterr().err.splitlines()
        states.append(there(run))
    assert states == [set(), {".git", ".git/objects"}, {".git", ".git/hooks", ".git/hooks/x", ".git/objects"}]
    for state in (states[1], states[0]):
        assert main(["undo"]) == 0
        assert there(run) == state


def test_all_or_nothing_applies_nothing(run: Run) -> None:
    """With --changes all-or-nothing one refused entry keeps the whole set, as a reason says."""
    changes, _, _ = run.back(run.files(changes="all-or-nothing"), file("a"), file(".envrc"))
    assert (changes.state, changes.reason, changes.left_out) == ("kept", "1 of them not allowed", 0)
    assert there(run) == set()
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {"a", ".envrc"}


def test_where_all_is_left_out_nothing_is_said_to_be_changed(run: Run) -> None:
    """A run of which nothing may be applied keeps it, gives no reason for another exit code, and names it."""
    changes, denials, _ = run.back(run.files(), file(".envrc"))
    assert (changes.state, changes.reason, changes.added, changes.left_out) == ("kept", "", 0, 1)
    (line,) = said(changes, denials)
    assert line.startswith("left out: .envrc (protected)")


def test_what_no_flag_of_apply_lets_says_what_would(run: Run) -> None:
    """A file that is too large has a line with the value of the policy, and no command that could not apply it."""
    changes, denials, _ = run.back(run.files({"allow_mkdir": False}), folder("d"), file("a"))
    assert changes.apply_left_out == ""
    assert said(changes, denials) == [
        "left out: d: new folder, and fs.allow_mkdir is false. To allow it, set fs.allow_mkdir to true in the policy.",
        "1 added: applied; x07 diff, x07 undo",
    ]


def test_an_uppermost_entry_has_one_line_with_all_reasons(run: Run) -> None:
    """Of a hidden, protected folder with links in it there is one denial and one line, and its command applies all."""
    names = ["HEAD", "objects", "refs", *(f"refs/{number}" for number in range(50))]
    files = run.files({"deny_hidden": True, "allow_symlinks": False})
    entries = [folder(".git"), *(folder(f".git/{name}") for name in sorted(names)), link(".git/refs/z", "1")]
    changes, (denial,), _ = run.back(files, *entries)
    assert (denial.field, denial.subject, denial.count) == ("protected", ".git", 55)
    assert "fs.deny_hidden is true" in denial.reason
    assert "fs.allow_symlinks is false" in denial.reason
    (line,) = said(changes, [denial])
    assert "left out: .git (protected, hidden, a link)" in line
    assert main(command_of(line)) == 0
    assert (run.root / ".git/refs/z").is_symlink()


def test_diff_and_its_document_show_both_parts(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A patch has what was applied first, then what was left out, each with its reason; so has --json."""
    files = run.files({"allow_symlinks": True})
    run.back(files, link("l", ".envrc/x"), folder("a"), folder(".envrc"), link(".envrc/x", "y"))
    text = b"".join(patch_chunks(find_saved(RUN))).decode()
    assert text.index("new folder: a") < text.index("left out: .envrc: ") < text.index("left out: l: depends on")
    assert main(["diff", "--json"]) == 0
    document = msgspec.json.decode(capsys.readouterr().out)
    (root,) = document["roots"]
    assert [[change["name"] for change in root[key]] for key in ("changes", "left_out")] == [
        ["a"],
        [".envrc", ".envrc/x", "l"],
    ]
    assert document["all_or_nothing"] is False


def test_diff_shows_what_was_applied_later_as_applied(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Once x07 apply has brought what was left out, x07 diff calls it left out no more."""
    run.back(run.files({"allow_symlinks": True}), link("c", "y"), link(".envrc", "x"))
    assert main(["diff"]) == 0
    assert "left out: .envrc" in capsys.readouterr().out
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert main(["diff"]) == 0
    text = capsys.readouterr().out
    assert "left out" not in text
    assert ".envrc" in text


def test_a_conflict_applies_nothing_and_what_is_left_out_stays_named(run: Run) -> None:
    """Where a file of the host's was changed meanwhile, neither part is applied."""
    (run.root / "a").write_text("x")
    files = run.files()
    (run.root / "a").write_text("changed")
    changes, _, _ = run.back(files, gone("a"), file("b"), file(".envrc"))
    assert (changes.state, changes.left_out) == ("conflict", 1)
    assert there(run) == {"a"}


def test_sets_of_before_stay_all_or_nothing(run: Run) -> None:
    """A set that says nothing of it, as older versions kept it, is applied only as a whole."""
    run.back(run.files(changes="all-or-nothing"), file("a"), file(".envrc"))
    document = msgspec.json.decode(encode(find_saved(RUN).changes))
    del document["all_or_nothing"]
    for root in document["roots"]:
        del root["left_out"]
    place = run.folder.path / "changes/changes.json"
    place.write_bytes(msgspec.json.encode(document))
    assert decode(place.read_bytes()).all_or_nothing
    assert main(["apply"]) == 125
    assert there(run) == set()


def test_a_root_that_is_made_for_the_rest_is_there_for_what_was_left_out(run: Run) -> None:
    """A missing write root that the first part makes is no conflict for the second, nor for undoing both."""
    files = run.files({"write_roots": (f"{run.root}/new",)})
    changes, _, _ = run.back(files, file("a"), file(".envrc"))
    assert (changes.state, there(run)) == ("applied", {"new", "new/a"})
    assert main(["apply", "--allow-protected", ".envrc"]) == 0
    assert there(run) == {"new", "new/a", "new/.envrc"}
    for _ in range(2):
        assert main(["undo"]) == 0
    assert there(run) == set()


# what depends on what is left out


def change(name: str, before: Node | None, after: Node | None) -> Change:
    """One change."""
    return Change(name=name, before=before, after=after)


def content(text: str) -> Node:
    """A file with a content."""
    return Node(kind="file", mode=0o644, size=len(text), sha256=text * 64, at=0)


DEPENDING: list[tuple[list[Change], set[str], set[str]]] = [
    ([change("d", None, FOLDER), change("d/a", None, content("1")), change("e", None, FOLDER)], {"d"}, {"d", "d/a"}),
    ([change("d", None, FOLDER), change("d/a", None, content("1"))], {"d/a"}, {"d/a"}),
    ([change("a", content("1"), None), change("b", None, content("1"))], {"b"}, {"a", "b"}),
    ([change("a", content("1"), None), change("b", None, content("1"))], {"a"}, {"a", "b"}),
    ([change("a", content("1"), content("2")), change("b", None, content("1"))], {"b"}, {"b"}),
    (
        [change("d", FOLDER, None), change("d/a", content("1"), None), change("d/b", content("2"), None)],
        {"d/a"},
        {"d", "d/a"},
    ),
    ([change("d", FOLDER, content("1")), change("d/a", content("2"), None)], {"d/a"}, {"d", "d/a"}),
    (
        [
            *(change(name, None, Node(kind="link", target=target)) for name, target in (("l", "m/x"), ("m", "d"))),
            *(change(name, None, FOLDER) for name in ("d", "n")),
        ],
        {"d"},
        {"d", "l", "m"},
    ),
    ([change("d/l", None, Node(kind="link", target="../e/x"))], {"e"}, {"d/l", "e"}),
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
def test_what_depends_on_a_refused_entry_is_left_out_with_it(
    changes: list[Change], refused: set[str], left: set[str]
) -> None:
    """What lies below it, the other half of a rename, a link through it, and a folder in which it stays; no more."""
    assert with_dependents(changes, refused) == left


def test_a_rename_to_a_protected_name_loses_nothing(run: Run) -> None:
    """A file that was moved to a name which may not come stays where it was, and moves when that is allowed."""
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
    """A chain of links and as many renames of one content, of which the first is left out, are followed once each."""
    many = 5000
    links = [change(f"l{n}", None, Node(kind="link", target=f"l{n + 1}/x")) for n in range(many)]
    moved = [change(f"a{n}", content("1"), None) for n in range(many)]
    moved += [change(f"b{n}", None, content("1")) for n in range(many)]
    assert len(with_dependents([*links, *moved], {f"l{many}", "a0"})) == many + 1 + 2


# after a kill


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_kill_while_the_second_part_is_applied_or_undone_leaves_one_state_or_the_other(run: Run, verb: str) -> None:
    """Killed before each name that it removes or changes, the next command has the old or the new, with its undo."""
    run.back(run.files(), folder("a"), folder("AGENTS.md"), folder("a/.envrc"))
    first, both = {"a"}, {"a", "AGENTS.md", "a/.envrc"}
    every = ["apply", "--allow-protected", "*"]
    killed = 0
    for number in itertools.count():
        if verb == "undo":
            assert main(every) == 0
        pid = os.fork()
        if pid == 0:
            die_at(number)
            main(every if verb == "apply" else ["undo"])
            os._exit(0)
        ended = os.waitpid(pid, 0)[1] == 0
        recover_all(pytest.fail)
        assert there(run) in (first, both)
        if there(run) == both or len(find_saved(RUN).undos) > 1:
            undo_saved(find_saved(RUN), lambda _path: None)
        assert there(run) == first
        assert find_saved(RUN).applied
        if ended:
            break
        killed += 1
    assert killed > 10
    undo_saved(find_saved(RUN), lambda _path: None)
    assert there(run) == set()
