"""`x07 diff`, `apply` and `undo`: the run that they take in a folder, and parts of its changes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from typing import TYPE_CHECKING

import msgspec
import pytest

import x07_sandbox
from tests.command import X07
from x07_sandbox.cli.main import main
from x07_sandbox.errors import UsageError
from x07_sandbox.files.changes import Change, ChangeSet, Node, Refused, RootChanges, encode
from x07_sandbox.host.paths import private_dir
from x07_sandbox.library.cleanup import prune
from x07_sandbox.records.runs import all_runs, known_run
from x07_sandbox.sessions.result import draft_result
from x07_sandbox.sessions.saved_changes import command, find_saved, is_here, undo_saved

if TYPE_CHECKING:
    from pathlib import Path

    from x07_sandbox.records.pruning import Part


FOLDER = Node(kind="folder", mode=0o755)
EMPTY = Node(kind="file", mode=0o644, sha256=hashlib.sha256().hexdigest())


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder of its own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(private_dir(tmp_path / "vm") / "jobs"))


def saved_run(
    number: int,
    root: Path,
    *names: str,
    gone: tuple[str, ...] = (),
    more: tuple[Change, ...] = (),
) -> str:
    """Save the changes of a run that made files, or folders (names that end with a slash), and removed *gone*.

    more: further changes.
    """
    root.mkdir(exist_ok=True)
    data, changes = b"", [*more]
    for name in names:
        text = f"{name}\n".encode()
        node = Node(kind="file", mode=0o644, size=len(text), sha256=hashlib.sha256(text).hexdigest(), at=len(data))
        changes.append(Change(name=name.rstrip("/"), before=None, after=FOLDER if name.endswith("/") else node))
        data += text
    for name in gone:
        (root / name).write_bytes(b"")
        node = Node(kind="file", mode=(root / name).stat().st_mode & 0o777, sha256=hashlib.sha256().hexdigest())
        changes.append(Change(name=name, before=node, after=None))
    changes.sort(key=lambda change: change.name)
    part = RootChanges(root=str(root), guest="/g", missing=False, changes=tuple(changes))
    run = f"1700000000000-1-{number}"
    place = private_dir(private_dir(all_runs() / run) / "changes")
    (place / "data").write_bytes(data)
    (place / "changes.json").write_bytes(encode(ChangeSet(run=run, roots=(part,), all_or_nothing=False)))
    return run


def there(root: Path) -> set[str]:
    """All names below a root."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_commands_take_the_latest_run_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a run, `x07 apply` and `x07 undo` take the latest run that changed this folder, and name the folder."""
    one, other = tmp_path / "one", tmp_path / "other"
    saved_run(1, one, "a")
    saved_run(2, other, "b")
    for root in (one, other):
        monkeypatch.chdir(root)
        assert main(["apply"]) == 0
    monkeypatch.chdir(one)
    capsys.readouterr()
    assert main(["undo"]) == 0
    assert f"x07: 1 added in {one}: reverted; apply again with x07 apply" in capsys.readouterr().err
    assert (there(one), there(other)) == (set(), {"b"})


def test_undo_takes_the_latest_run_that_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a run, `x07 undo` passes over runs whose changes are not applied, or were in effect before."""
    run = saved_run(1, tmp_path / "one", "a")
    later = saved_run(2, tmp_path / "one", "b")
    monkeypatch.chdir(tmp_path / "one")
    assert main(["apply", run]) == 0
    assert find_saved(None).run == later
    assert find_saved(None, "undo").run == run
    assert main(["undo"]) == 0
    unapplied = find_saved(None, "undo")
    with pytest.raises(UsageError, match="they are not applied"):
        undo_saved(unapplied, lambda _path: None)
    again = saved_run(3, tmp_path / "one", "a")
    assert main(["apply", run]) == main(["apply", again]) == 0
    assert main(["undo"]) == 0
    assert there(tmp_path / "one") == set()


def test_elsewhere_a_run_needs_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that no run changed, the error names the newest runs and their folders, and its command works."""
    runs = [saved_run(number, tmp_path / f"d{number}", "a") for number in range(5)]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for verb in ("diff", "apply", "undo"):
        assert main([verb]) == 2
        printed = capsys.readouterr().err
        named = "; ".join(f"{runs[number]} in {tmp_path}/d{number}" for number in (4, 3, 2))
        assert f"Runs elsewhere: {named}, and 2 earlier runs. " in printed
        assert printed.endswith(f"Give the id of the run: x07 {verb} {runs[4]}\n")
    assert main(["apply", runs[4]]) == 0
    printed = capsys.readouterr().err
    assert printed == f"x07: 1 added in {tmp_path}/d4: applied; revert with x07 undo {runs[4]}\n"
    assert main(shlex.split(printed.rpartition("x07 ")[2])) == 0
    assert there(tmp_path / "d4") == set()


def test_a_damaged_run_does_not_hide_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose changes are damaged is passed over, and named only if there is no other run."""
    runs = [saved_run(number, tmp_path / "root", "a") for number in range(2)]
    for run in reversed(runs):
        monkeypatch.chdir(tmp_path / "root")
        place = all_runs() / run / "changes/changes.json"
        os.truncate(place, place.stat().st_size // 2)
        assert main(["diff"]) == (2 if run == runs[0] else 0)
        (tmp_path / "empty").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "empty")
        assert main(["diff"]) == 2
        said = capsys.readouterr().err
        assert ("they are damaged" in said) == (run == runs[0])
        assert said.endswith(f"x07 diff {runs[0]}\n") == (run == runs[1])


def test_the_whole_id_of_a_run_names_no_other_run(tmp_path: Path) -> None:
    """The whole id of a run is not the start of another id, whether that run changed files or is gone."""
    other = saved_run(10, tmp_path / "one", "a")
    assert find_saved(other[:-2]).run == known_run(other[:-2]) == other
    with pytest.raises(UsageError, match=f"no run has the id {other[:-1]}"):
        known_run(other[:-1])
    private_dir(all_runs() / other[:-1])
    with pytest.raises(UsageError, match=f"no run with the id {other[:-1]} has changed any files"):
        find_saved(other[:-1])
    for change in (x07_sandbox.diff, x07_sandbox.apply, x07_sandbox.undo):
        with pytest.raises(UsageError):
            change(draft_result(other[:-1]))
    assert there(tmp_path / "one") == set()


def test_changes_applied_or_undone_lately_are_not_pruned(tmp_path: Path) -> None:
    """An old run stays for 7 days after its changes were last applied or undone, whole or in part."""
    run, root = saved_run(1, tmp_path / "root", "a", "b"), tmp_path / "root"
    folder = all_runs() / run

    only_runs: tuple[Part, ...] = ("runs",)

    def age() -> None:
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (1_700_000_000, 1_700_000_000))

    def is_kept() -> bool:
        prune(only_runs, progress=lambda _text: None, dry_run=False)
        return folder.exists()

    for step in (["apply", "--only", "a"], ["apply"], ["undo"], ["undo"]):
        age()
        assert main([step[0], run, *step[1:]]) == 0
        assert is_kept()
    assert there(root) == set()
    age()
    assert not is_kept()


def test_which_runs_belong_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run belongs to its folders, and to those in and around them, also through links; none belongs to `/`."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "root2").mkdir()
    found = {}
    for name in ("", "root", "root/sub", "link", "link/sub", "root2", "/"):
        monkeypatch.chdir(tmp_path / name)
        found[name] = is_here([str(root)]), is_here([str(tmp_path / "link")])
    assert found == {
        **dict.fromkeys(("", "root", "root/sub", "link", "link/sub"), (True, True)),
        **dict.fromkeys(("root2", "/"), (False, False)),
    }
    (root / "gone").mkdir()
    monkeypatch.chdir(root / "gone")
    (root / "gone").rmdir()
    assert not is_here([str(root)])


def test_advice_names_the_run_unless_it_is_chosen_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in a message has the run's id, unless x07 would choose this run in the current folder."""
    root = tmp_path / "root"
    older, newer = (saved_run(number, root, "a.py") for number in (1, 2))
    assert command("apply", newer, [str(root)]) == f"x07 apply {newer}"
    monkeypatch.chdir(root)
    assert command("apply", newer, [str(root)]) == "x07 apply"
    assert command("apply", older, [str(root)]) == f"x07 apply {older}"
    assert main(["apply", older]) == 0
    assert command("undo", older, [str(root)]) == "x07 undo"
    assert command("undo", newer, [str(root)]) == f"x07 undo {newer}"


def test_a_part_is_applied_and_the_rest_stays_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`x07 apply --only` applies names and patterns with their new folders; the rest follows later; each is undone."""
    root = tmp_path / "root"
    saved_run(1, root, "a.py", "new/", "new/b.py", "new/c.txt", "d.txt", gone=("old",))
    monkeypatch.chdir(root)
    assert main(["apply", "--only", "new/b.py"]) == 0
    printed = capsys.readouterr().err
    assert f"x07: 2 added in {root}: applied; revert with x07 undo\n" in printed
    assert printed.endswith("x07: 4 more saved; apply with x07 apply\n")
    assert there(root) == {"new", "new/b.py", "old"}
    assert main(["apply", "--only", "*.txt", "--only", str(root / "new")]) == 0
    assert there(root) == {"new", "new/b.py", "new/c.txt", "d.txt", "old"}
    (root / "a.py").write_text("mine")
    assert main(["apply"]) == 125
    (root / "a.py").unlink()
    assert main(["apply"]) == 0
    assert there(root) == {"new", "new/b.py", "new/c.txt", "d.txt", "a.py"}
    capsys.readouterr()
    assert main(["apply"]) == 0
    assert capsys.readouterr().err == f"x07: already applied in {root}\n"
    for left in ({"new", "new/b.py", "new/c.txt", "d.txt", "old"}, {"new", "new/b.py", "old"}, {"old"}):
        assert main(["undo"]) == 0
        assert there(root) == left
    assert main(["apply", "--only", "missing"]) == 2
    assert "cannot apply missing: no change has this name" in capsys.readouterr().err


def link(name: str, target: str, before: Node | None = None) -> Change:
    """A change that makes a link."""
    return Change(name=name, before=before, after=Node(kind="link", target=target))


def test_links_among_selected_changes_select_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`x07 apply --only` changes nothing outside what was selected: the targets of selected links stay as they are."""
    root = tmp_path / "root"
    (root / "src").mkdir(parents=True)
    (root / "src/main.py").write_bytes(b"")
    (root / "src/main.py").chmod(0o644)
    links = link("docs/example.py", "../src/main.py"), link("docs/notes", "../precious"), link("docs/new", "../made")
    changed = Change(name="src/main.py", before=EMPTY, after=msgspec.structs.replace(EMPTY, mode=0o755))
    run = saved_run(1, root, "docs/", "made/", "made/x", gone=("precious",), more=(*links, changed))
    monkeypatch.chdir(root)
    assert main(["apply", "--only", "docs"]) == 0
    new = {"docs", "docs/example.py", "docs/notes", "docs/new"}
    assert there(root) == {"src", "src/main.py", "precious", *new}
    assert (root / "src/main.py").stat().st_mode & 0o777 == 0o644
    undo_saved(find_saved(run), lambda _path: None)
    assert x07_sandbox.apply(run, only=["docs/notes"]).added == 2
    assert there(root) == {"src", "src/main.py", "precious", "docs", "docs/notes"}


@pytest.mark.parametrize("name", ["a", "d/a"])
def test_a_change_that_needs_an_unselected_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A link through a replaced link, or a name in it, is not applied alone, and the message names flags that work."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "d").symlink_to("old")
    replaced = Change(name="d", before=Node(kind="link", target="old"), after=FOLDER)
    links = (link("a", "d/b"), replaced, link("d/a", "b"))
    saved_run(1, root, "z", more=links)
    monkeypatch.chdir(root)
    for flags, advice in (["--only", name], f"Add --only d or --skip {name}"), (["--skip", "d"], "Add --skip a"):
        before = there(root)
        assert main(["apply", *flags]) == 125
        said = capsys.readouterr().err
        assert "it depends on the change of d, which is not selected" in said
        assert said.endswith(f"{advice}.\n")
        assert (there(root), (root / "d").is_symlink()) == (before, True)
    assert main(["apply", "--skip", "d", "--skip", "a"]) == 0
    assert (there(root), (root / "d").is_symlink()) == ({"d", "z"}, True)
    assert main(["apply", "--only", name, "--only", "d"]) == 0
    assert (root / "d").is_dir()
    assert main(["apply", "--only", "a"]) == 0  # d is applied already
    assert there(root) == {"d", "z", "d/a", "a"}


def test_left_out_changes_follow_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a part was applied, the printed command applies the left-out changes with the new folders around them."""
    root, missing = tmp_path / "root", tmp_path / "missing"
    run = saved_run(1, root, "docs/", "docs/a", "src/", "src/a")
    saved = find_saved(run).changes
    new = Change(name="docs/.cfg", before=None, after=FOLDER)
    hidden = Refused(name=new.name, rule="fs.deny_hidden", why="hidden name", flag="--allow-hidden")
    one = msgspec.structs.replace(saved.roots[0], left_out=(new,), refused=(hidden,))
    folder = Change(name="docs", before=None, after=FOLDER)
    other = msgspec.structs.replace(one, root=str(missing), missing=True, changes=(folder,))
    place = all_runs() / run / "changes/changes.json"
    place.write_bytes(encode(msgspec.structs.replace(saved, roots=(one, other))))
    monkeypatch.chdir(tmp_path)
    assert main(["apply", "--skip", "*"]) == 0
    assert find_saved(run).undos == []
    assert main(["apply", "--only", "src"]) == 0
    printed = capsys.readouterr().err
    assert main(shlex.split(printed.rpartition("x07 ")[2])) == 0
    assert there(root) == {"src", "src/a", "docs", "docs/.cfg"}
    assert there(missing) == {"docs", "docs/.cfg"}
    assert main(["undo"]) == 0
    assert (there(root), missing.exists()) == ({"src", "src/a"}, False)
    assert main(["apply", "--only", f"{root}/docs", "--allow-hidden"]) == 0
    assert there(root) == {"src", "src/a", "docs", "docs/a", "docs/.cfg"}


def test_diff_of_some_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`x07 diff` shows only the given paths, and with --stat one line for each file or new folder."""
    root = tmp_path / "root"
    names = [f"new/{number}" for number in range(300)]
    run = saved_run(1, root, "a.py", "new/", *names, "with\nbreak", gone=("old",))
    monkeypatch.chdir(root)
    assert main(["diff", "--stat"]) == 0
    size = sum(len(name) + 1 for name in names)
    assert capsys.readouterr().out.splitlines() == [
        f"# in {root}",
        "added: a.py (+1 -0)",
        f"added: new (300 files, {size} bytes)",
        "deleted: old (0 bytes)",
        'added: "with\\nbreak" (+2 -0)',
    ]
    for words in (["a.py", "old"], [run, "./a.py", "ol*"], ["--json", "[ao]*"]):
        assert main(["diff", *words]) == 0
        out = capsys.readouterr().out
        if "--json" in words:
            assert [change["name"] for change in json.loads(out)["roots"][0]["changes"]] == ["a.py", "old"]
        else:
            assert [line for line in out.splitlines() if line.startswith("diff")] == [
                "diff --git a/old b/old",
                "diff --git a/a.py b/a.py",
            ]
    assert main(["diff", "none"]) == 2


def test_a_long_diff_stops_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal, `x07 diff` stops after some thousand lines, and names the summary."""
    root = tmp_path / "root"
    saved_run(1, root, *(f"name {number:050}" for number in range(2000)))
    ends = os.openpty()
    argv = [*X07, "diff"]
    proc = subprocess.Popen(argv, cwd=root, stdout=ends[1], stderr=subprocess.PIPE, text=True)
    os.close(ends[1])
    lines = 0
    try:
        while data := os.read(ends[0], 1 << 16):
            lines += data.count(b"\n")
    except OSError:  # the other end is closed
        pass
    os.close(ends[0])
    said = proc.communicate(timeout=60)[1]
    assert 2000 < lines < 6000
    assert said == f"x07: stopped after {lines} lines; for a summary: x07 diff --stat; for all lines: x07 diff | less\n"


def test_the_library_shows_applies_and_reverts_parts(tmp_path: Path) -> None:
    """`diff`, `apply` and `undo` of the library return the changes of a run, and errors name keyword arguments."""
    root = tmp_path / "root"
    run = saved_run(1, root, "a.py", "new/", "new/b.py")
    shown = x07_sandbox.diff(run, ["*.py"])
    assert (shown.changes.state, [one.name for one in shown.changes.names]) == ("kept", ["a.py", "new/b.py"])
    assert shown.patch.count(b"\ndiff --git") == 2
    done = x07_sandbox.apply(run, only=["new"], skip=["new/b.py"])
    assert (done.state, [one.name for one in done.names], there(root)) == ("applied", ["new"], {"new"})
    assert x07_sandbox.apply(run).added == 2
    assert x07_sandbox.apply(run).added == 0
    undone = x07_sandbox.undo(run)
    assert (undone.state, undone.added, there(root)) == ("kept", 2, {"new"})
    assert x07_sandbox.diff(run).changes.state == "applied"
    with pytest.raises(x07_sandbox.SandboxError, match="cannot apply missing: no change has this name"):
        x07_sandbox.apply(run, only=["missing"])
    with pytest.raises(x07_sandbox.SandboxError, match="only is not a list of names"):
        x07_sandbox.apply(run, only="new")
    with pytest.raises(x07_sandbox.SandboxError, match="its id is empty"):
        x07_sandbox.undo("")
