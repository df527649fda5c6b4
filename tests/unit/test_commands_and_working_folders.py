"""`x07 exec`, --workdir and Result.files without a VM: refusals, and hostile data from a guest."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from x07_sandbox import SandboxError, run_program
from x07_sandbox.channel.messages import CWD
from x07_sandbox.channel.trees import Entry, Kind, segment
from x07_sandbox.cli.main import main
from x07_sandbox.errors import PeerError, RefusedError, UsageError
from x07_sandbox.guest import trees
from x07_sandbox.guest.trees import Tree, left_files, stream_of
from x07_sandbox.host.waiting import Cancel
from x07_sandbox.policy.decode import default_policy
from x07_sandbox.policy.guest import WORK, guest_path
from x07_sandbox.policy.model import Policy
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.host_files import effective_roots
from x07_sandbox.sessions.private_files import FILES_MAX, LeftFiles, work_files
from x07_sandbox.sessions.request import RunCaller, RunRequest, loaded
from x07_sandbox.sessions.result import draft_result

if TYPE_CHECKING:
    from x07_sandbox.files.copy import Root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that is not the home folder, and an empty image cache."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("X07_VM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("X07_VM_STATE_DIR", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def policy_with(**fs: object) -> Policy:
    """The built-in policy with other file rules."""
    policy = default_policy()
    return replace(policy, fs=replace(policy.fs, **fs))


def roots(policy: Policy | None = None, **words: Any) -> tuple[Root, ...]:  # noqa: ANN401 - any of a request's
    """The roots of a command run with these arguments."""
    with contextlib.ExitStack() as stack:
        cancel = stack.enter_context(contextlib.closing(Cancel()))
        request, program = loaded(RunRequest(command=("make",), **words), RunCaller(cancel=cancel), stack)
        return effective_roots(request, program, policy or default_policy())


def reported(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that is used wrongly says."""
    assert main(words) == 2
    return capfd.readouterr().err


def test_a_working_folder_is_an_ordinary_root(here: Path) -> None:
    """--workdir is a write root, or with --read a read root, and relative policy roots lie in it."""
    (here / "proj").mkdir()
    policy = policy_with(write_roots=("build",))
    inner, whole = roots(policy, workdir=Path("proj"), read_only=True)
    assert (whole.host, whole.guest, whole.write) == (str(here / "proj"), WORK, False)
    assert (inner.host, inner.guest, inner.write) == (str(here / "proj/build"), f"{WORK}/build", True)
    assert roots(workdir=Path())[0].write


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/", "it is the root of the file system"),
        ("../home", "it is or contains your home folder"),
        ("to-home", "it is or contains your home folder"),
        ("nothing", r"it does not exist.*mkdir -p nothing"),
        ("file", "it does not exist"),
    ],
)
def test_dangerous_working_folders_are_refused(here: Path, name: str, why: str) -> None:
    """A --workdir that is `/`, the home folder, one above it or no folder is refused with the reason."""
    (here / "to-home").symlink_to(here.parent / "home")
    (here / "file").touch()
    with pytest.raises(UsageError, match=why):
        roots(workdir=Path(name))


def test_a_policy_decides_about_working_folders_too(here: Path) -> None:
    """--workdir needs fs.enabled, and a hidden folder needs fs.deny_hidden = false."""
    (here / ".hidden").mkdir()
    with pytest.raises(RefusedError, match=r"fs\.enabled is false"):
        roots(policy_with(enabled=False), workdir=Path())
    with pytest.raises(RefusedError, match="it is hidden"):
        roots(workdir=Path(".hidden"))
    assert roots(policy_with(deny_hidden=False), workdir=Path(".hidden"))[0].host == str(here / ".hidden")


def test_an_escaping_root_suggests_its_absolute_path() -> None:
    """The refusal of a root such as ../dir suggests its absolute path."""
    where, why = guest_path("../dir", CWD, deny_hidden=True)
    assert where is None
    assert "use an absolute path" in why


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["make", "test"], "x07 exec --workdir . -- make test\n"),
        (["make", "--", "a b", "$(x)"], "x07 exec --workdir . -- make 'a b' '$(x)'"),
    ],
)
def test_run_suggests_exec_for_a_command(words: list[str], fix: str, capfd: pytest.CaptureFixture[str]) -> None:
    """`x07 run make test` prints the `x07 exec` command to use instead."""
    said = reported(capfd, "run", *words)
    assert fix.strip() in said
    assert f"there is no file named {words[0]!r} in this folder" in said


@pytest.mark.parametrize("words", [["prog.py", "--", "x"], ["./make", "x"], ["nothing-of-that-name"]])
def test_a_program_that_is_missing_is_no_command(
    here: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A misspelt source, a path or an unknown single name is reported as a missing file."""
    assert here.is_dir()
    assert "exec" not in reported(capfd, "run", *words)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no command given"),
        (["--read", "--", "ls"], "--read requires --workdir"),
        (["--", ""], "its name is empty"),
        (["--workdir", "", "--", "ls"], "the name of the folder is empty"),
        (["ls", "-l"], "arguments after --"),
    ],
)
def test_wrong_usage_of_exec_is_reported(words: list[str], why: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Invalid arguments of `x07 exec` are a usage error with the reason."""
    assert why in reported(capfd, "exec", *words)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"command": "make"}, "command is str, not a list of str"),
        ({"command": ["make", 5]}, "command is not a list of str"),
        ({"command": ["make"], "source": "x"}, "exactly one of program, source and command"),
        ({"command": ["make"], "read_only": True}, "Pass workdir too"),
        (
            {"command": ["make"], "max_files_bytes": -1},
            "max_files_bytes is -1, but must be at least 0 and at most 1073741824",
        ),
    ],
)
def test_a_wrong_call_names_its_argument(words: dict[str, Any], why: str) -> None:
    """An invalid argument of a library call is an error before anything runs."""
    with pytest.raises(SandboxError, match=why):
        run_program(**words)


# files that go in, and that are left


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """A stack that closes files."""
    with contextlib.ExitStack() as one:
        yield one


def test_only_new_and_changed_files_come_out(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Result.files holds new and changed files, not input files that stayed the same."""
    file = work_files({"a/b.txt": b"one", "kept": b"", "changed": b"1"}, stack)
    tree = Tree(str(tmp_path), None)
    tree.write(os.pread(file.fd, file.size, 0))
    tree.finish()
    tree.wait()
    assert (tmp_path / "a/b.txt").read_bytes() == b"one"
    (tmp_path / "changed").write_bytes(b"2")
    (tmp_path / "a/new").write_bytes(bytes(70_000))
    for hidden in (".cache", "a"):
        (tmp_path / hidden).mkdir(exist_ok=True)
        (tmp_path / hidden / ".x").write_bytes(b"3")
    (tmp_path / "link").symlink_to("changed")
    left = left_files([str(tmp_path)], tree, 10, 1 << 20)
    assert (left.files, left.size) == (4, 70_002)  # the link too, which is not handed over
    taken = LeftFiles(stack, 1 << 20)
    assert all(taken.take(piece) for piece in stream_of(left))
    assert taken.files() == {"a/.x": b"3", "a/new": bytes(70_000), "changed": b"2"}


def test_excess_files_are_counted_but_not_sent(tmp_path: Path) -> None:
    """Files beyond the size limits are counted but not sent; the others are sent."""
    for name, size in (("a", 10), ("b", 1 << 40), ("c", 10), ("d", 1)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    left = left_files([str(tmp_path)], None, 2, 20)
    assert (left.files, left.size) == (4, (1 << 40) + 21)
    assert [name for _, _, name, _ in left.sent] == [b"a", b"c"]


def test_the_agent_examines_bounded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent examines a bounded number of files."""
    assert trees.LOOKED_AT_MAX <= 100_000
    monkeypatch.setattr(trees, "LOOKED_AT_MAX", 20)
    for number in range(25):
        (tmp_path / str(number)).touch()
    assert left_files([str(tmp_path)], None, 0, 0).files == 20


def test_mounted_host_folders_are_not_returned(tmp_path: Path) -> None:
    """Files in mounted host folders are not in Result.files."""
    (tmp_path / "work/a").mkdir(parents=True)
    for name in ("work/a/b", "work2", "other"):
        (tmp_path / name).write_bytes(b"1")
    left = left_files([str(tmp_path)], None, 9, 9, [b"work", b"not/there"])
    assert [name for _, _, name, _ in left.sent] == [b"other", b"work2"]


def sent(*entries: tuple[bytes, bytes], root: bytes = b"0") -> bytes:
    """A stream of files from a guest."""
    parts = [Entry(Kind.ROOT, root).encoded()]
    for name, data in entries:
        parts += [Entry(Kind.FILE, name, mode=0o644, size=len(data)).encoded(), segment(len(data)) + data]
    return b"".join([*parts, Entry(Kind.END, b"").encoded()])


@pytest.mark.parametrize("name", [b"../x", b"/x", b"a//b", b"a/../../x", b"x\0y", b"."])
def test_an_escaping_file_name_is_a_violation(name: bytes, stack: contextlib.ExitStack) -> None:
    """A guest that sends a file name outside its folder breaks the protocol."""
    with pytest.raises(PeerError):
        LeftFiles(stack, 100).take(sent((name, b"1")))


def test_excess_data_is_discarded(stack: contextlib.ExitStack) -> None:
    """If a guest sends more bytes or files than requested, all are discarded."""
    for data in (sent((b"x", bytes(101))), sent(*[(b"%d" % n, b"1") for n in range(FILES_MAX + 1)])):
        taken = LeftFiles(stack, 100 if len(data) < 1000 else 1 << 20)
        assert not taken.take(data)
        assert taken.files() == {}


def test_an_incomplete_stream_yields_no_files(stack: contextlib.ExitStack) -> None:
    """An incomplete stream of files yields none."""
    taken = LeftFiles(stack, 100)
    assert taken.take(sent((b"a", b"1"))[:-3])
    assert taken.files() == {}


def test_non_utf8_names_are_left_out(stack: contextlib.ExitStack) -> None:
    """Files whose names are not UTF-8 are left out of Result.files."""
    taken = LeftFiles(stack, 100)
    assert taken.take(sent((b"\xff", b"1"), ("ü".encode(), b"2")))
    assert taken.files() == {"ü": b"2"}


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_any_bytes_are_files_or_an_error_of_the_guests(data: bytes, cut: int) -> None:
    """Any bytes from a guest yield files with plain names, or PeerError."""
    with contextlib.ExitStack() as stack:
        taken = LeftFiles(stack, 1000)
        with contextlib.suppress(PeerError):
            for piece in (sent((b"a", b"1"))[:cut], data):
                taken.take(piece)
        assert all(name and ".." not in name.split("/") for name in taken.files())


def test_a_result_keeps_its_files_when_it_is_copied() -> None:
    """A pickled or changed result keeps its files, and its JSON document does not have them."""
    result = replace(draft_result("1-2-3"), files={"a": b"1"})
    again = pickle.loads(pickle.dumps(result))  # noqa: S301 - our own
    assert (again, again.files) == (result, {"a": b"1"})
    assert replace(result, reason="changed").files == {"a": b"1"}
    assert draft_result("1-2-3").files == {}
    for full in (True, False):
        assert "files" not in json.loads(render_result(result, full=full))
