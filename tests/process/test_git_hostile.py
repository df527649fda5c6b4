"""Git with hostile repositories and programs: nothing of theirs runs on the host, and what is invalid is refused."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.repositories import commit, git, new_repository, state_of
from x07_sandbox import Result, Sandbox, SandboxError, apply, diff, exec_command, undo
from x07_sandbox.errors import HostError
from x07_sandbox.files.changes import Node
from x07_sandbox.files.incoming import ReportedEntry
from x07_sandbox.files.repository import BUNDLE, BUNDLE_MAX_BYTES, Repository, is_ref_name

pytestmark = pytest.mark.usefixtures("only_os")

# The id of a tree that contains a folder .git
BAD_TREE = (
    "git rev-parse HEAD^{tree} | python3 -c 'import sys; id = bytes.fromhex(sys.stdin.read());"
    ' sys.stdout.buffer.write(b"40000 .git\\0" + id)\' | git hash-object -t tree -w --literally --stdin'
)
HOOKS = (
    "post-checkout",
    "post-index-change",
    "pre-auto-gc",
    "reference-transaction",
    "fsmonitor-watchman",
    "pre-commit",
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit."""
    return new_repository(tmp_path / "repo")


def run(folder: Path, script: str, **options: Any) -> Result:  # noqa: ANN401 - of a run
    """Run a script with the history of *folder*."""
    return exec_command(["sh", "-c", script], workdir=folder, git=True, **options)


def test_nothing_that_a_repository_names_runs_on_the_host(repository: Path, tmp_path: Path) -> None:
    """Hooks, fsmonitor, included files and helpers that a hostile repository configures never start."""
    marker, program = tmp_path / "ran", tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 $@ >> {marker}\n", encoding="utf-8")
    program.chmod(0o755)
    include = tmp_path / "included"
    include.write_text(f"[core]\n\tfsmonitor = {program}\n\tpager = {program}\n", encoding="utf-8")
    for hook in HOOKS:
        shutil.copy(program, repository / ".git/hooks" / hook)
    with (repository / ".git/config").open("a", encoding="utf-8") as config:
        config.write(
            f"[include]\n\tpath = {include}\n[core]\n\tfsmonitor = {program}\n\thooksPath = {repository}/.git/hooks\n"
        )
        config.write(f"\tsshCommand = {program}\n\talternateRefsCommand = {program}\n[gc]\n\tauto = 1\n")
        config.write(f"[uploadpack]\n\tpackObjectsHook = {program}\n[diff]\n\texternal = {program}\n")
    assert git(repository, "status", "--porcelain") == ""
    assert marker.exists(), "with these settings, git runs the program"
    marker.unlink()
    result = run(repository, "echo 2 > a.txt; git commit -qam 2; git log --oneline; cat .git/config")
    assert result.outcome == "ok"
    assert str(program) not in (result.stdout.text or "")
    assert diff(result).changes.commits
    undo(result)
    apply(result)
    assert not marker.exists()


def _gitlink(folder: Path) -> None:
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{git(folder, 'rev-parse', 'HEAD')},sub")


def _worktree(folder: Path) -> None:
    git(folder, "worktree", "add", "-q", str(folder.parent / "tree"))
    shutil.rmtree(folder)
    (folder.parent / "tree").rename(folder)


def _linked(folder: Path) -> None:
    (folder / ".git").rename(folder.parent / "elsewhere")
    (folder / ".git").symlink_to(folder.parent / "elsewhere")


def _borrowed(folder: Path) -> None:
    (folder / ".git/objects/info/alternates").write_text("/elsewhere\n", encoding="utf-8")


def _partial(folder: Path) -> None:
    (folder / ".git/objects/pack/pack-1.promisor").touch()


def _filtered(folder: Path) -> None:
    commit(folder, "lfs", {"data/.gitattributes": b"# none\n*.bin filter=lfs diff=lfs\n"})


def _formatted(folder: Path, *words: str) -> None:
    shutil.rmtree(folder)
    new_repository(folder, *words)


def _empty_sha256(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    git(folder, "init", "-q", "--object-format=sha256")


def _split_index(folder: Path) -> None:
    git(folder, "update-index", "--split-index")


def _private(folder: Path) -> None:
    (folder / ".git/objects").chmod(0o700)


def _linked_refs(folder: Path) -> None:
    shutil.rmtree(folder / ".git/refs")
    (folder / ".git/refs").symlink_to("/etc")


def _linked_objects(folder: Path) -> None:
    (folder / ".git/objects").rename(folder.parent / "objects")
    (folder / ".git/objects").symlink_to(folder.parent / "objects")


def _odd_head(folder: Path) -> None:
    (folder / ".git/HEAD").write_text("ref: refs/heads/../../config\n", encoding="utf-8")


def _piped_index(folder: Path) -> None:
    (folder / ".git/index").unlink()
    os.mkfifo(folder / ".git/index")


def _broken(folder: Path) -> None:
    shutil.rmtree(folder / ".git/objects")
    (folder / ".git/objects").mkdir()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_gitlink, "it has a submodule, sub"),
        (_worktree, "it is a worktree or a submodule"),
        (_linked, "it is a worktree or a submodule"),
        (_borrowed, "it uses objects of another repository"),
        (_partial, "it is a partial clone"),
        (_filtered, "the filter lfs"),
        (lambda folder: _formatted(folder, "--ref-format=reftable"), "reftable"),
        (lambda folder: _formatted(folder, "--object-format=sha256"), "another format"),
        (_empty_sha256, "another format"),
        (_split_index, "its index is split"),
        (_linked_refs, "git/refs/heads cannot be opened"),
        (_linked_objects, "git/objects cannot be opened"),
        pytest.param(_private, "which may not read", marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
        (_odd_head, "its HEAD is neither"),
        (_piped_index, "git/index is no file"),
        (_broken, "git for-each-ref failed"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(repository: Path, change: Callable[[Path], None], why: str) -> None:
    """Submodules, worktrees, alternates, partial clones, filters and other formats are refused before anything runs."""
    change(repository)
    with pytest.raises(SandboxError, match=why):
        run(repository, "true")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 0123456789012345678901234567890123456789 > .git/refs/heads/main", "its last commit is missing"),
        ("id=$(git rev-parse HEAD:a.txt); echo $id > .git/refs/heads/main", "its last commit is missing"),
        ("echo ../../etc/passwd > .git/refs/heads/main", "it points to no commit"),
        ("mv .git/refs/heads/main '.git/refs/heads/a..b'; git symbolic-ref HEAD refs/heads/c", "its name is invalid"),
        (
            f"git update-ref refs/heads/main $(git commit-tree -p HEAD -m bad $({BAD_TREE}))",
            r"git index-pack failed: error: object .*hasDotgit.*fsck error",
        ),
        ("printf broken | git hash-object -t commit -w --literally --stdin > .git/refs/heads/main", "git .* failed"),
        ("chmod -R u+w .git; for f in .git/objects/??/*; do echo > $f; done", "its last commit is missing"),
    ],
)
def test_invalid_commits_are_left_out_with_the_reason(repository: Path, script: str, why: str) -> None:
    """Missing, broken and forbidden objects and names stay outside; changes of files are applied all the same."""
    before = state_of(repository)
    prepare = "git commit -q --allow-empty -m 1; echo 2 > a.txt; "
    result = run(repository, prepare + script)
    assert result.changes.state == "applied"
    (denied,) = (one for one in result.denials if one.field == "git")
    assert re.search(why, denied.reason), denied
    assert result.changes.commits == ()
    assert not (repository / ".git/refs/x07").exists()
    assert state_of(repository) == before
    assert b"# commits left out: " in diff(result).patch


@pytest.mark.parametrize(
    "script",
    [
        "rm -rf .git/* .git/.??*",
        "cd .git; rm -r objects HEAD; ln -s / objects; ln -sf /etc/passwd refs/heads/main; mkfifo HEAD",
        "printf '0123456789012345678901234567890123456789 refs/heads/../../config\\n' > .git/packed-refs",
        "rm .git/packed-refs; git gc --quiet --prune=now; true",
        "echo '[core] fsmonitor = /bin/false' >> .git/config; mkdir .git/hooks; echo exit 1 > .git/hooks/post-commit",
    ],
)
def test_a_damaged_repository_inside_changes_nothing_outside(repository: Path, script: str) -> None:
    """Whatever a program does to its own .git, the repository of the host stays as it is."""
    before = state_of(repository)
    result = run(repository, script)
    assert result.changes.state == "none"
    assert state_of(repository) == before


def test_a_program_that_packs_the_whole_history_brings_back_only_new_commits(repository: Path) -> None:
    """After git gc and pack-refs inside, the new commits arrive, and the pack holds nothing else."""
    commit(repository, "large", {"large.bin": os.urandom(2 << 20)})
    result = run(
        repository, "git commit -q --allow-empty -m 1; rm .git/objects/pack/*.keep; git gc -q; git pack-refs --all"
    )
    assert [one.branch for one in result.changes.commits] == ["main"]
    (pack,) = (repository / ".git/objects/pack").glob("*.pack")
    assert pack.stat().st_size < 1000
    assert git(repository, "fsck", "--strict", "--no-dangling", check=False) == ""


def test_commits_over_the_limit_are_left_out(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, full: bool
) -> None:
    """A bundle of more than 256 MiB is not stored, and git is stopped at that size."""
    assert BUNDLE_MAX_BYTES == 256 << 20
    most = BUNDLE_MAX_BYTES if full else BUNDLE_MAX_BYTES // 32  # the files are written four times
    monkeypatch.setattr("x07_sandbox.files.repository.BUNDLE_MAX_BYTES", most)
    with Repository(str(repository)) as opened, (tmp_path / "tree").open("wb") as out:
        known = opened.copy_history(tmp_path / "store", out, lambda _name: False)
    inside = tmp_path / "inside"
    git(tmp_path, "clone", "-q", str(repository), str(inside))
    git(inside, "config", "core.compression", "0")
    git(inside, "config", "pack.compression", "0")
    for number in range(3):
        commit(inside, str(number), {f"{number}.bin": os.urandom(most // 3 + 1024)})
    git(
        inside, "repack", "-q", "-a", "-d", "--window=0", f"--max-pack-size={most // 2}"
    )  # so that git need not compress again
    entries, data = [], tmp_path / "data"
    with data.open("wb") as file:
        for path in (path for path in (inside / ".git").rglob("*") if path.is_file()):
            node = Node(kind="file", mode=0o644, size=path.stat().st_size, at=file.tell())
            entries.append(ReportedEntry(root=1, name=str(path.relative_to(inside / ".git")), node=node))
            file.write(path.read_bytes())
    with Repository(str(repository)) as opened, data.open("rb") as file:
        found = opened.bundle(known, entries, file.fileno(), tmp_path)
    assert found is not None
    assert found.left_out == {"main": f"they are larger than {most >> 20} MiB"}
    assert not (tmp_path / BUNDLE).exists()


def test_links_in_the_repository_are_not_followed_when_commits_are_applied(repository: Path, tmp_path: Path) -> None:
    """If refs/x07 or objects/pack is a link, nothing is written behind it, and the reason is an error."""
    outside = tmp_path / "outside"
    outside.mkdir()
    result = run(repository, "git commit -q --allow-empty -m 1", changes="keep")
    (repository / ".git/refs/x07").symlink_to(outside)
    with pytest.raises(HostError, match="Too many levels of symbolic links"):
        apply(result)
    (repository / ".git/refs/x07").unlink()
    shutil.rmtree(repository / ".git/objects/pack")
    (repository / ".git/objects/pack").symlink_to(outside)
    with pytest.raises(HostError, match="git/objects/pack cannot be opened"):
        apply(result)
    assert [*outside.iterdir()] == []


def test_a_history_that_is_gone_from_the_repository_is_noticed(repository: Path) -> None:
    """Commits whose parents the user has deleted in the meantime are kept, and the files can be applied alone."""
    parent = commit(repository, "second", {"b.txt": b"2\n"})
    with Sandbox(workdir=repository, git=True) as sandbox:
        sandbox.shell("echo new > new.txt; git commit -q --allow-empty -m third", check=True)
        git(repository, "reset", "-q", "--hard", "HEAD~1")
        git(repository, "reflog", "expire", "--expire=now", "--all")
        git(repository, "gc", "-q", "--prune=now")
        result = sandbox.close()
    assert parent[:7] not in git(repository, "log", "--all", "--oneline")
    assert (result.changes.state, "git index-pack failed" in result.changes.reason) == ("kept", True)
    assert not (repository / ".git/refs/x07").exists()
    with pytest.raises(SandboxError, match=f"x07 apply {result.run} --only ."):
        apply(result)
    assert apply(result, only=["."]).added == 1


def test_one_bad_branch_does_not_cost_the_others(repository: Path) -> None:
    """Good branches come back beside bad ones, with one denial each; lock files and symbolic references are none."""
    script = (
        "git commit -q --allow-empty -m 1; echo garbage > .git/refs/heads/zz; touch .git/refs/heads/main.lock;"
        "git symbolic-ref refs/heads/alias refs/heads/main; cp .git/refs/heads/main '.git/refs/heads/a..b'"
    )
    result = run(repository, script)
    assert [one.branch for one in result.changes.commits] == ["main"]
    reasons = {one.subject: one.reason for one in result.denials if one.field == "git"}
    assert reasons == {
        "the commits on zz": "it points to no commit",
        r"the commits on a..b": "its name is invalid",
    }
    many = "i=0; while [ $i -lt 102 ]; do i=$((i+1)); git branch b$i main~0; done; git commit -q --allow-empty -m 2"
    result = run(repository, f"git commit -q --allow-empty -m 1; {many}")
    assert len(result.changes.commits) == 100
    assert {one.reason for one in result.denials if one.field == "git"} == {"there are more than 100 branches"}


def test_all_or_nothing_holds_for_commits(repository: Path) -> None:
    """With `all-or-nothing`, no file is changed if a branch cannot be used."""
    script = "echo 2 > a.txt; echo garbage > .git/refs/heads/zz"
    result = run(repository, script, changes="all-or-nothing")
    assert (result.changes.state, "zz cannot be used" in result.changes.reason) == ("kept", True)
    assert (repository / "a.txt").read_bytes() == b"one\n"


def test_commits_cannot_refer_to_what_the_program_never_got(repository: Path) -> None:
    """A commit whose parent or file is an object of the host's other branches is left out: it would reveal that."""
    git(repository, "checkout", "-q", "-b", "secret")
    secret = commit(repository, "secret", {"secret.txt": b"TOP\n"})
    blob = git(repository, "rev-parse", "HEAD:secret.txt")
    git(repository, "checkout", "-q", "main")
    body = "author A <a@b> 1 +0000\\ncommitter A <a@b> 1 +0000\\n\\nx\\n"
    new = "git hash-object -w --literally --stdin -t"
    for script in (
        f'id=$(printf "tree $(git rev-parse HEAD^{{tree}})\\nparent {secret}\\n{body}" | {new} commit)',
        f"t=$(printf '100644 blob {blob}\\tf\\n' | git mktree --missing); id=$(git commit-tree -m x -p HEAD $t)",
    ):
        result = run(repository, f"{script}; echo $id > .git/refs/heads/main; cat .git/refs/heads/main")
        assert len((result.stdout.text or "").strip()) == 40
        assert result.changes.commits == ()
        (reason,) = (one.reason for one in result.denials if one.field == "git")
        assert "git pack-objects failed" in reason


def test_a_huge_message_is_cut(repository: Path) -> None:
    """A commit whose subject has megabytes comes back, and only its beginning is listed."""
    result = run(repository, "head -c 5000000 /dev/zero | tr '\\0' x | git commit -q --allow-empty -F -")
    assert [one.branch for one in result.changes.commits] == ["main"]
    assert len(diff(result).patch) < 1000


@pytest.mark.parametrize("name", ["a", "a/b", "ä-1", "fix-👩\u200d💻", "a.b", "-", "a@b", "HEAD/x"])
def test_names_that_git_accepts(tmp_path: Path, name: str) -> None:
    """A branch name is valid if git says so."""
    assert is_ref_name(f"refs/heads/{name}")
    git(tmp_path, "check-ref-format", f"refs/heads/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".a",
        "a..b",
        "a.",
        "a/",
        "/a",
        "a//b",
        "a.lock",
        "a.lock/b",
        "a b",
        "a~",
        "a^",
        "a:",
        "a?",
        "a*",
        "a[",
        "a\\",
        "a@{b",
        "a\x7f",
        "a\n",
        "a/.b",
    ],
)
def test_names_that_git_refuses(tmp_path: Path, name: str) -> None:
    """A branch name that git refuses is invalid, and so is one that cannot be read."""
    assert not is_ref_name(f"refs/heads/{name}")
    assert git(tmp_path, "check-ref-format", f"refs/heads/{name}", check=False) == ""
    assert not any(map(is_ref_name, (f"refs/heads/{name}" for name in ("a\ufffd", "a\udc80", "x" * 300))))


def test_a_shallow_repository_stays_shallow(tmp_path: Path) -> None:
    """A clone of depth 1, as CI makes them, arrives as it is, and its new commits come back."""
    source = new_repository(tmp_path / "source")
    commit(source, "second", {"b.txt": b"2\n"})
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{source}", str(clone))
    result = run(clone, "git log --oneline | wc -l; git fsck; git commit -q --allow-empty -m 3")
    assert (result.stdout.text or "").split() == ["1"]
    assert [one.branch for one in result.changes.commits] == ["main"]
    assert git(clone, "fsck", "--no-dangling", check=False) == ""


def test_a_repository_without_commits(tmp_path: Path) -> None:
    """The first commit may be made inside."""
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q", "-b", "main")
    (empty / "a.txt").write_bytes(b"1\n")
    git(empty, "add", "a.txt")
    result = run(empty, "git status --porcelain; git commit -q -m first")
    assert result.stdout.text == "A  a.txt\n"
    assert [one.branch for one in result.changes.commits] == ["main"]
