"""Git: a program gets a repository's history, and its commits come back without any change to branch, index or HEAD."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.command import X07
from tests.repositories import commit, git, history, new_repository, state_of
from x07_sandbox import Sandbox, SandboxError, apply, diff, exec_command, undo

pytestmark = pytest.mark.usefixtures("only_os")

COMMIT = (
    "echo new > new.txt; git add new.txt; git commit -qm 'add new.txt'; "
    "git checkout -qb fix; git commit -q --allow-empty -m fix"
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit."""
    return new_repository(tmp_path / "repo")


def shell(folder: Path, script: str, **options: object) -> str:
    """Run a script in a sandbox with the history of *folder*, discard its changes, and return its output."""
    with Sandbox(workdir=folder, git=True, **options) as sandbox:  # type: ignore[arg-type]
        done = sandbox.shell(script, merge=True)
        sandbox.close("discard")
    return done.stdout.decode()


def refs(folder: Path) -> dict[str, str]:
    """The references of runs, by the last part of their names."""
    rows = git(folder, "for-each-ref", "--format=%(refname) %(objectname)", "refs/x07").splitlines()
    return {name.rpartition("/")[2]: oid for name, oid in map(str.split, rows)}


def test_a_program_gets_the_whole_history_and_the_index(repository: Path) -> None:
    """2,000 commits with merges, tags and a binary arrive intact, and git status shows what it shows on the host."""
    history(repository, 2000)
    git(repository, "branch", "older", "HEAD~100")
    commit(repository, "dotfiles", {".gitignore": b"*.log\n", ".hidden/config": b"x\n"})
    (repository / "staged.txt").write_bytes(b"staged\n")
    git(repository, "add", "staged.txt")
    (repository / "a.txt").write_bytes(b"changed\n")
    (repository / "many/1.txt").unlink()
    (repository / "untracked.txt").touch()
    (repository / "ignored.log").touch()
    commands = (
        "status --porcelain",
        "rev-list --count HEAD",
        "describe --tags",
        "branch",
        "log -3 --merges --format=%H",
    )
    expected = [git(repository, *words.split()) for words in commands]
    script = "; echo ==; ".join([*(f"git {words}" for words in commands), "git fsck --strict 2>&1"])
    *found, fsck = [part.strip() for part in shell(repository, script).split("==\n")]
    assert found == expected
    assert "rror" not in fsck


def test_nothing_but_the_history_reaches_a_program(repository: Path) -> None:
    """Configuration, credentials, remotes, hooks, the stash and unreachable commits stay on the host."""
    git(repository, "remote", "add", "origin", "https://user:token@example.org/repo")
    git(repository, "config", "user.email", "me@example.org")
    (repository / ".git/hooks/pre-commit").write_text("#!/bin/sh\n")
    git(repository, "checkout", "-q", "-b", "other")
    other = commit(repository, "not on main", {"secret.txt": b"a secret\n"})
    git(repository, "checkout", "-q", "main")
    (repository / "a.txt").write_bytes(b"stashed secret\n")
    git(repository, "stash")
    script = f"cat .git/config; find .git -type f; git branch; git cat-file -e {other} || echo absent"
    found = shell(repository, f"{script}; git log --all --oneline")
    assert "absent" in found
    assert [word for word in ("token", "me@", "hooks", "other", "stash", "logs/", "not on main") if word in found] == []


def test_commits_come_back_as_references_and_are_undone(repository: Path) -> None:
    """Only refs/x07/RUN/BRANCH is added, and removed by undo; diff lists the commits; git fsck finds no fault."""
    before = state_of(repository)
    result = exec_command(["sh", "-c", COMMIT], workdir=repository, git=True, changes="keep")
    assert refs(repository) == {}
    assert {one.branch for one in result.changes.commits} == {"main", "fix"}
    assert b": add new.txt (x07-sandbox)\n" in diff(result).patch
    assert len(apply(result).commits) == 2
    assert apply(result).commits == ()  # they are there
    found = refs(repository)
    assert found == {one.branch: one.commit for one in result.changes.commits}
    assert git(repository, "show", f"{found['fix']}:new.txt") == "new"
    assert git(repository, "fsck", "--strict", "--no-dangling", check=False) == ""
    assert state_of(repository) == before
    assert len(undo(result).commits) == 2
    assert refs(repository) == {}
    assert not (repository / "new.txt").exists()
    assert not (repository / ".git/refs/x07").exists()
    with pytest.raises(SandboxError, match="they are not applied"):
        undo(result)


def test_commits_without_changed_files_are_applied_at_the_end(repository: Path) -> None:
    """A commit, a detached one and a new branch without commits: what is new arrives, also if no file changes."""
    new = "git commit -q --allow-empty -m"
    script = f"{new} empty; git branch idle HEAD~1; git checkout -q --detach; {new} apart"
    result = exec_command(["sh", "-c", script], workdir=repository, git=True)
    assert result.changes.state == "applied"
    assert set(refs(repository)) == {"main", "HEAD"}
    assert exec_command(["git", "status"], workdir=repository, git=True).changes.state == "none"
    undo(result)
    assert refs(repository) == {}


def test_a_second_sandbox_continues_where_the_first_one_ended(repository: Path) -> None:
    """After git reset to the new commit, the work tree is clean, and the next program sees the commit."""
    exec_command(["sh", "-c", "echo 2 > a.txt; git commit -qam second"], workdir=repository, git=True)
    git(repository, "reset", "-q", refs(repository)["main"])
    assert git(repository, "status", "--porcelain") == ""
    assert "second" in shell(repository, "git log --oneline")


def test_files_that_stay_outside_are_not_deleted_by_a_commit(repository: Path) -> None:
    """A commit of everything keeps files that were not copied in, and deletes those that the user has deleted."""
    commit(repository, "more", {".dot": b"1\n", ".env": b"secret\n", "gone.txt": b"1\n"})
    (repository / "gone.txt").unlink()
    exec_command(["git", "commit", "-qam", "all"], workdir=repository, git=True)
    changed = git(repository, "diff", "--name-status", "HEAD", refs(repository)["main"])
    assert changed.split() == ["D", "gone.txt"]
    everything = shell(repository, "ls -A; git status --porcelain", allow_hidden=True, reveal=[".env"])
    assert everything.split() == [".dot", ".env", ".git", "a.txt", "D", "gone.txt"]


def test_a_read_only_folder_has_a_history_that_cannot_be_changed(repository: Path) -> None:
    """With read_only, git log and git status work, and git commit fails."""
    commit(repository, "dot", {".dot": b"1\n"})
    found = shell(
        repository,
        "git log --oneline | wc -l; git status --porcelain; git commit -q --allow-empty -m no || echo failed",
        read_only=True,
    )
    assert found.split()[0] == "2"
    assert found.endswith("failed\n")
    assert "D .dot" not in found


def test_undo_after_git_gc_or_a_change_of_the_reference(repository: Path) -> None:
    """References that git has packed are deleted too, and nothing else in that file; one that was moved is not."""
    commit = ["git", "commit", "-q", "--allow-empty", "-m", "1"]
    git(repository, "tag", "-m", "annotated", "v1")
    result = exec_command(["sh", "-c", "echo 2 > a.txt; git commit -qam 2"], workdir=repository, git=True)
    git(repository, "gc", "-q")
    before = git(
        repository, "for-each-ref", "refs/heads", "refs/tags", "--format=%(refname) %(objectname) %(*objectname)"
    )
    assert undo(result).changed == 1
    assert refs(repository) == {}
    after = git(repository, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)")
    assert after == before
    assert git(repository, "fsck", "--strict", "--no-dangling", check=False) == ""
    moved = exec_command(commit, workdir=repository, git=True)
    (name,) = (one.ref for one in moved.changes.commits)
    git(repository, "update-ref", name, "HEAD")
    with pytest.raises(SandboxError, match="not applied"):
        undo(moved)
    assert refs(repository)["main"] == git(repository, "rev-parse", "HEAD")


def test_a_state_that_a_program_can_also_have(repository: Path) -> None:
    """Unmerged and hidden files, names of any characters, detached tags and intent-to-add arrive as they are."""
    commit(repository, "odd", {".gitignore": b"1\n", "a b\n\xff.txt": b"1\n", "run.sh": b"#!/bin/sh\n"})
    (repository / "run.sh").chmod(0o755)
    git(repository, "commit", "-q", "-a", "-m", "mode")
    git(repository, "checkout", "-q", "-b", "other")
    commit(repository, "other", {".gitignore": b"2\n"})
    git(repository, "checkout", "-q", "main")
    commit(repository, "main", {".gitignore": b"3\n"})
    git(repository, "merge", "-q", "other", check=False)
    (repository / "later.txt").touch()
    git(repository, "add", "-N", "later.txt")
    script = "git status --porcelain; git ls-files | cat"
    found = shell(repository, script, allow_hidden=True).splitlines()
    assert found == [*git(repository, "status", "--porcelain").splitlines(), *git(repository, "ls-files").splitlines()]
    assert "UU .gitignore" in shell(repository, script) or "UD .gitignore" in shell(repository, script)


def test_neither_files_nor_commits_are_applied_if_files_conflict(repository: Path) -> None:
    """A conflict leaves no reference behind."""
    result = exec_command(
        ["sh", "-c", "echo 2 > a.txt; git commit -qam 2"], workdir=repository, git=True, changes="keep"
    )
    (repository / "a.txt").write_bytes(b"mine\n")
    with pytest.raises(SandboxError, match=r"conflict|changed"):
        apply(result)
    assert refs(repository) == {}
    assert not (repository / ".git/refs/x07").exists()


def test_an_open_sandbox_shows_its_commits(repository: Path) -> None:
    """changes() lists the commits so far; close applies them; a sandbox without commits has none."""
    with Sandbox(workdir=repository, git=True) as sandbox:
        assert sandbox.changes().changes.commits == ()
        sandbox.shell("git commit -q --allow-empty -m 'so far'", check=True)
        assert b"so far" in sandbox.changes().patch
        assert refs(repository) == {}
    assert set(refs(repository)) == {"main"}


def test_the_command_says_what_it_did(repository: Path, tmp_path: Path) -> None:
    """x07 exec names the branches and how to look at them, apply --only leaves commits out, and JSON has all of it."""

    def x07(*words: str) -> subprocess.CompletedProcess[str]:
        flags = ("--sandbox-backend", "os", "--i-accept-weaker-isolation") if words[0] == "exec" else ()
        return subprocess.run(
            [*X07, words[0], *flags, *words[1:]], cwd=repository, text=True, capture_output=True, check=False
        )

    done = x07("exec", "--workdir", ".", "--git", "--", "sh", "-c", COMMIT)
    assert "commits on fix: git log refs/x07/" in done.stderr
    assert "1 added, commits on main, fix: applied" in done.stderr
    assert "branch fix: " in x07("diff", "--stat").stdout
    assert "commits on main, fix in" in x07("undo").stderr
    assert "commits" not in x07("apply", "--only", "new.txt").stderr.split("more saved")[0]
    assert "commits on main, fix in" in x07("apply").stderr
    assert set(json.loads(x07("diff", "--json").stdout)["commits"]["branches"]) == {"main", "fix"}
    without = x07("exec", "--workdir", ".", "--", "true")
    assert "copying .git into the VM. To allow it, use --git" in without.stderr
    refused = x07("exec", "--git", "--", "true")
    assert "Add --workdir ." in refused.stderr
    (repository / ".git").rename(tmp_path / "moved")
    assert "it contains no .git" in x07("exec", "--workdir", ".", "--git", "--", "true").stderr
