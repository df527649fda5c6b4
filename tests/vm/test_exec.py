"""`x07 exec`, --workdir and files of calls, in machines."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from tests.command import X07, Done, x07
from tests.vm.conftest import left_behind
from x07_sandbox import exec_command, exec_command_async, load_policy, run_program, run_program_async
from x07_sandbox.policy.guest import WORK

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.vm, pytest.mark.usefixtures("under_os")]

MAKEFILE = """\
all:
\tcp in.txt out.txt
test:
\ttest "$(cat in.txt)" = data && pwd
"""
LEAVES = """
import os
print(open("data.csv").read(), sorted(os.listdir()))
import helper
open("new.csv", "w").write("made")
os.mkdir("d")
open("d/e.bin", "wb").write(bytes(9))
open("/x07/out/c.png", "w").write("png")
open("large", "wb").truncate(1 << 40)
os.symlink("/etc/passwd", "link")
"""


@pytest.fixture
def project(state: Path, tmp_path: Path) -> Path:
    """A project with a Makefile."""
    assert state.is_absolute()
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE.replace("$(", "$$("))
    (folder / "in.txt").write_text("data\n")
    (folder / ".hidden").write_text("")
    return folder


def result(done: Done) -> dict[str, Any]:
    """Return the result that a command with --json has printed."""
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.usefixtures("in_vms")
def test_a_command_of_the_image_runs_in_a_copy_of_a_folder(project: Path, state: Path) -> None:
    """`x07 exec --workdir . -- make` works on a copy, its changes can be undone, and what was left out is named."""
    (project / "big.bin").write_bytes(bytes(2000))
    (project / ".git").mkdir()
    script = "make test all && test ! -e big.bin && head -c 3000 /dev/zero > new.bin"
    done = x07(project, "exec", "--workdir", ".", "--max-file-size", "1K", "--", "sh", "-c", script)
    assert done.code == 0, done.err
    assert f"{WORK}\n" in done.out.decode()
    assert "1 added: applied" in done.err
    for start in (
        "denied: copying big.bin into the VM (larger than 1K, fs.max_read_bytes)",
        "left out: new.bin (larger than 1K, fs.max_write_bytes)",
    ):
        assert f"x07: {start}. To allow it, use --max-file-size 1M\n" in done.err
    assert "x07: denied: copying .git into the VM. To allow it, use --git\n" in done.err
    assert "x07: denied: copying .hidden into the VM (hidden name, fs.deny_hidden). " in done.err
    assert (project / "out.txt").read_text() == "data\n"
    assert x07(project, "undo").code == 0
    assert not (project / "out.txt").exists()
    assert left_behind(state) == []


@pytest.mark.usefixtures("in_vms")
def test_a_read_only_folder_stays_unchanged(project: Path) -> None:
    """With --read a command cannot write to the folder, except to a write root inside that is named too."""
    (project / "build").mkdir()
    script = "ls -A; touch x; cp in.txt build/out.txt"
    words = ("--workdir", "project", "--read", "--allow-write-root", "build")
    done = x07(project.parent, "exec", "--json", *words, "--", "sh", "-c", script)
    found = result(done)
    assert (found["outcome"], found["stdout"]["text"]) == ("ok", "Makefile\nbuild\nin.txt\n"), found["reason"]
    (denial,) = [denial for denial in found["denials"] if denial["action"] == "write"]
    assert denial["subject"].startswith(f"{WORK}/")
    assert (project / "build/out.txt").read_text() == "data\n"


def test_exec_exits_with_the_commands_code(project: Path) -> None:
    """`x07 exec` exits with the command's own code, and with 127 and the reason if there is no such command."""
    done = x07(project, "exec", "--workdir", ".", "--", "sh", "-c", "exit 2")
    assert done.code == 2, done.err
    done = x07(project, "exec", "--json", "--workdir", ".", "--", "./missing")
    assert (done.code, result(done)["outcome"]) == (127, "failed")
    assert "the command ./missing is not installed on this host" in result(done)["reason"]


@pytest.mark.usefixtures("in_vms")
def test_a_command_that_the_image_lacks_gets_advice(project: Path) -> None:
    """If the image lacks a command, the error says so and names the package to include."""
    done = x07(project, "exec", "--workdir", ".", "--", "rg", "x")
    assert done.code == 127
    assert "the command rg is not in the image" in done.err
    assert "x07 image build" in done.err
    assert " --include ripgrep\n" in done.err
    done = x07(project, "exec", "--json", "--workdir", ".", "--", "./missing")
    assert (done.code, result(done)["outcome"]) == (127, "failed")
    assert "./missing or its interpreter does not exist in the VM" in result(done)["reason"]


def test_a_command_is_under_the_policy(project: Path) -> None:
    """With process.allow_exec false a command starts, but can start no other program."""
    policy = load_policy()
    alone = replace(policy, process=replace(policy.process, allow_spawn=False, allow_exec=False))
    found = exec_command(["sh", "-c", "echo here; /bin/ls"], project, policy=alone)
    assert (found.outcome, found.stdout.text) == ("failed", "here\n"), found.reason
    assert (found.digests.source, found.digests.artifact, found.artifact_from) == (None, None, None)


def test_a_program_works_in_a_folder_of_the_users(project: Path) -> None:
    """With --workdir, files that a program writes by relative names are stored in that folder."""
    (project.parent / "prog.py").write_text("open('data.csv', 'w').write(open('in.txt').read())")
    done = x07(project.parent, "run", "--workdir", "project", "prog.py")
    assert done.code == 0, done.err
    assert (project / "data.csv").read_text() == "data\n"


def test_files_go_in_and_come_out_of_a_call(state: Path) -> None:
    """files= are in the working folder beside the source; Result.files holds new files, bounded and counted."""
    files = {"data.csv": b"1,2", "helper.py": b"", "kept": b""}
    found = run_program(source=LEAVES, toolchain="python", files=files)
    assert (found.outcome, found.stdout.text) == ("ok", "1,2 ['data.csv', 'helper.py', 'kept']\n"), found.reason
    assert found.files == {"c.png": b"png", "d/e.bin": bytes(9), "new.csv": b"made"}
    assert (found.files_discarded.count, found.files_discarded.bytes) == (2, 1 << 40)
    failed = run_program(source="open('part', 'w').write('1'); raise SystemExit(3)", toolchain="python")
    assert (failed.outcome, failed.files) == ("failed", {"part": b"1"})
    none = run_program(source=LEAVES.replace("/x07/out/", ""), toolchain="python", files=files, max_files_bytes=0)
    assert (none.outcome, none.files, none.files_discarded.count) == ("ok", {}, 5)
    assert left_behind(state) == []


def test_other_calls_have_files_too(state: Path) -> None:
    """An asynchronous call and a command without a folder return the files that a program left."""
    words: dict[str, Any] = {"command": ["sh", "-c", "cat a > b"], "files": {"a": b"1"}}
    assert asyncio.run(run_program_async(**words)).files == {"b": b"1"}
    assert exec_command(words["command"], files=words["files"]).files == {"b": b"1"}
    found = asyncio.run(exec_command_async(["sh", "-c", "cat a - > b"], input=b"2", files=words["files"]))
    assert found.files == {"b": b"12"}
    assert left_behind(state) == []


def test_a_terminal_shows_discarded_files_once(project: Path) -> None:
    """Files left in the private working folder are counted in the result, and a terminal shows one note."""
    ours, theirs = pty.openpty()
    words = [*X07, "exec", "--", "sh", "-c", "touch a b .c"]
    done = subprocess.run(words, cwd=project, stdin=subprocess.DEVNULL, stderr=theirs, check=False)
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, said
    assert said.count("discarded: 2 files") == 1
    assert "--workdir DIR" in said
    quiet = x07(project, "exec", "--json", "--", "sh", "-c", "echo 12 > a")
    assert (result(quiet)["files_discarded"], quiet.err) == ({"count": 1, "bytes": 3}, "")
