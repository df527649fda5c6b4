"""Denials: each names what was refused and what would allow it, and their number is bounded."""

from __future__ import annotations

import json
import os
import shlex
from typing import TYPE_CHECKING, Final

import pytest

from tests.command import x07
from tests.conftest import sample

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.conftest import Ran, Sandbox

pytestmark = pytest.mark.vm

THREAD: Final = "import threading\nthreading.Thread(target=int).start()\n"
FORK: Final = "import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)\n"
EXEC: Final = "import os\nos.execv('/usr/bin/true', ['true'])\n"
SPAWN: Final = "import subprocess\nsubprocess.run(['/usr/bin/env', 'true'], check=True)\n"
LINKED: Final = """
import os, subprocess
os.symlink("/usr/bin", "/tmp/bin")
os.symlink("bin/nl", "/tmp/made")
subprocess.run(["/tmp/made", "/dev/null"], check=True)
"""
MADE: Final = """
import os, subprocess
os.mkdir("/tmp/made")
with open("/tmp/made/it", "w") as file:
    file.write("#!/usr/bin/sh\\nexit 0\\n")
os.chmod("/tmp/made/it", 0o755)
subprocess.run(["/tmp/made/it"], check=True)
"""
LIBRARY: Final = """
import ctypes, glob, shutil
shutil.copy(glob.glob("/usr/lib/*/libm.so.6")[0], "own.so")
ctypes.CDLL("./own.so")
"""
CHILDREN: Final = """
import subprocess
for one in [subprocess.Popen(["/usr/bin/cat"], stdin=subprocess.PIPE) for _ in range(3)]:
    one.communicate()
"""
FILES: Final = "held = [open('/dev/null') for _ in range(40)]\n"
DUPLICATES: Final = "import os\nheld = [os.dup(0) for _ in range(40)]\n"  # by fcntl
WATCHERS: Final = """
import ctypes
for _ in range(180):
    if ctypes.CDLL(None, use_errno=True).inotify_init1(0) < 0:
        raise OSError(ctypes.get_errno(), "no more")
"""
# As scripts do at their start.
LIMITS: Final = """
import subprocess
subprocess.run(["/usr/bin/bash", "-c", "ulimit -n 300 && ulimit -c unlimited"], check=True)
"""
SCRIPT: Final = "import subprocess\nsubprocess.run(['/usr/bin/ldd', '--version'], check=True)\n"
# Reserved memory, however much, is not memory use.
MEMORY: Final = """
import mmap
reserved = mmap.mmap(-1, 8 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held = bytearray(100 << 20)
"""
SHARED: Final = """
from multiprocessing import shared_memory
held = shared_memory.SharedMemory(create=True, size=30 << 20)
for start in range(0, 30 << 20, 1 << 20):
    held.buf[start : start + (1 << 20)] = bytes(1 << 20)
held.unlink()
"""
Policy = dict[str, object]


def only(program: str, *prefixes: str) -> Policy:
    """Return what a policy allows to execute: one program, and those with these prefixes."""
    return {"process.allow_execs": [program], "process.allow_exec_prefixes": [*prefixes]}


def until_it_passes(sandbox: Sandbox, text: str, policy: Policy) -> tuple[list[str], list[Ran]]:
    """Run again and again, each time applying the first denial's or hint's advice; return the advice and all runs."""
    policy = dict(policy)
    said: list[str] = []
    runs: list[Ran] = []
    while len(runs) < 6:
        runs.append(ran := sandbox.run_text("it.py", text, policy=policy, cache=True))
        result = ran.result
        if ran.outcome == "ok" and result.changes.state in {"none", "applied"}:
            return said, runs
        allowing = [denial.how_to_allow for denial in result.denials] + [hint.how for hint in result.hints]
        how = next(how for how in allowing if how is not None and how.json_path is not None)
        assert how.json_path is not None
        field = how.json_path.removeprefix("$.")
        if field not in said:  # a paused host may use more of one limit
            said.append(field)
        policy[field] = how.value
    raise AssertionError((said, runs[-1].result))


@pytest.mark.parametrize(
    ("text", "policy", "said"),
    sample(
        [
            (THREAD, {"threads.enabled": False}, ["threads.enabled"]),
            (FORK, {"process.allow_spawn": False}, ["process.allow_spawn"]),
            (EXEC, {"process.allow_exec": False}, ["process.allow_exec"]),
            (SPAWN, {"process.enabled": False}, ["process.enabled"]),
            (SPAWN, only("/usr/bin/env"), ["process.allow_execs"]),
            (LINKED, only("/usr/bin/env"), ["process.allow_execs"]),
            (SCRIPT, only("/usr/bin/ldd"), ["process.allow_execs"]),
            (MADE, only("/usr/bin/sh"), ["process.allow_exec_prefixes"]),
            (MADE, only("/usr/bin/sh", "/tmp/made/"), ["process.allow_exec_prefixes"]),  # noqa: S108
            (LIBRARY, only("/usr/bin/env"), ["process.allow_exec_prefixes"]),
            (CHILDREN, {"process.max_live": 2}, ["process.max_live"]),
            (CHILDREN, {"limits.procs": 2}, ["limits.procs"]),
            (FILES, {"limits.fds": 30}, ["limits.fds"]),
            (DUPLICATES, {"limits.fds": 30}, ["limits.fds"]),
            (WATCHERS, {"limits.fds": 150}, ["limits.fds"]),
            (LIMITS, {"limits.fds": 150}, ["limits.fds", "limits.core_dumps"]),
            (MEMORY, {"limits.mem_bytes": 96 << 20}, ["limits.mem_bytes"]),
            (SHARED, {"limits.mem_bytes": 96 << 20}, ["limits.mem_bytes"]),
        ],
        4,
    ),
)
def test_following_the_advice_leads_to_a_passing_run(
    sandbox: Sandbox, text: str, policy: Policy, said: list[str]
) -> None:
    """Following the result's advice leads to a run that passes, with no more permissions than it needs."""
    found, runs = until_it_passes(sandbox, text, policy)
    assert found == said
    assert [denial for denial in runs[-1].result.denials if denial.field != "permissions"] == []


@pytest.mark.usefixtures("under_os")
def test_the_advice_passes_a_variable_in(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host variable that three policy fields keep out is passed in by following the advice."""
    name = f"TOKEN_{os.urandom(8).hex()}"
    monkeypatch.setenv(name, "here")
    policy: Policy = {"env.enabled": False, "env.deny_keys": [name]}
    text = f"import os\nprint(os.environ[{name!r}])\n"
    said, runs = until_it_passes(sandbox, text, policy)
    assert said == ["env.enabled", "env.deny_keys", "env.allow_keys"]
    assert (runs[-1].stdout, runs[-1].result.hints) == (b"here\n", [])
    assert all(ran.result.denials == [] for ran in runs)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of the host with an unpredictable name."""
    folder = tmp_path / f"data-{os.urandom(8).hex()}"
    folder.mkdir()
    (folder / "in.txt").write_text("here\n")
    return folder


def test_the_advice_for_files_works(sandbox: Sandbox, root: Path) -> None:
    """Denials of reads and writes have advice that works; a write of a name in an open folder names that folder."""
    writes = f"import os; os.open('out.txt', os.O_CREAT | os.O_WRONLY, dir_fd=os.open('{root}', os.O_RDONLY))"
    writes += f"; open('{root}/out.txt', 'w').write(open('{root}/in.txt').read())"
    said, runs = until_it_passes(sandbox, writes, {})
    assert said == ["fs.read_roots", "fs.write_roots"]
    assert f"{root}/" in [denial.subject for denial in runs[1].result.denials]
    assert (root / "out.txt").read_text() == "here\n"


@pytest.mark.parametrize(
    ("root", "text"),
    sample(
        [
            ("kept.json", "import os; open('new', 'w').write('new'); os.replace('new', 'kept.json')"),
            ("kept.json", "import subprocess; subprocess.run(['sed', '-i', 's/old/new/', 'kept.json'], check=True)"),
            ("{}/one/two", "import shutil, os; shutil.rmtree('{0}/one/two'); os.mkdir('{0}/one/two')"),
            ("one/two", "import os; os.rename('one/two', 'one/three'); os.makedirs('one/two')"),
            (
                "one/two",
                "import os; [os.unlink(e) for e in os.scandir('one/two')]; os.rmdir('two', dir_fd=os.open('one', 0))",
            ),
            ("missing", "import shutil, os; shutil.rmtree('missing'); os.mkdir('missing'); open('missing/x', 'w')"),
        ],
        2,
    ),
)
def test_replacing_a_root_needs_the_folder_around_it(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: str, text: str
) -> None:
    """Replacing a root by rename, or removing it, is advised to use the containing folder as a root."""
    (tmp_path / "one/two").mkdir(parents=True)
    (tmp_path / "one/two/file").touch()
    (tmp_path / "kept.json").write_text("old")
    monkeypatch.chdir(tmp_path)
    said, runs = until_it_passes(sandbox, text.format(tmp_path), {"fs.write_roots": [root.format(tmp_path)]})
    assert said == ["fs.write_roots"]
    assert runs[0].result.denials[0].action == "replace"
    if root == "kept.json":
        assert (tmp_path / root).read_text() == "new"
    elif root == "missing":
        assert (tmp_path / "missing/x").exists()
    else:
        assert not (tmp_path / "one/two/file").exists()


def test_a_new_top_level_folder_needs_a_write_root(sandbox: Sandbox) -> None:
    """A program that makes a top-level folder is advised to add a write root, and passes with it."""
    name = f"made-{os.getpid()}"
    text = f"mkdir -p /{name}/new && rmdir /{name}/new\n"
    ran = sandbox.run_text("make.sh", text)
    allowing = [denial.how_to_allow for denial in ran.result.denials]
    assert (ran.outcome, [how and how.flag for how in allowing]) == ("failed", ["--allow-write-root /FOLDER"])
    ran = sandbox.run_text("make.sh", text, policy={"fs.write_roots": [f"/{name}"]})
    assert (ran.outcome, ran.result.denials) == ("ok", [])


def test_a_denied_path_appears_by_name(sandbox: Sandbox) -> None:
    """Denied paths of files and programs are reported by name, each once with its count."""
    text = """
import os, sys
name = os.urandom(8).hex()
print(name)
closed = "/etc/ssl/private"
for path in (f"{closed}/{name}", f"{closed}/{name} b", f"/usr/{name}"):
    for _ in range(3):
        try:
            open(path, "r" if closed in path else "w")
        except OSError:
            pass
open(f"/root/{name}")
"""
    ran = sandbox.run_text("tries.py", text)
    name = ran.lines()[0]
    found = {denial.subject: (denial.count, denial.how_to_allow) for denial in ran.result.denials}
    closed = "/etc/ssl/private"
    assert found == {f"{closed}/{name}": (3, None), f"{closed}/{name} b": (3, None), "/usr/": (3, None)}
    assert [hint.subject for hint in ran.result.hints] == [f"/root/{name}"]


def test_ordinary_programs_cause_no_denials(sandbox: Sandbox) -> None:
    """Searches of ordinary interpreters and compilers for missing files do not count as denials."""
    text = (
        "import json, subprocess, threading, sqlite3, ssl, email, asyncio, multiprocessing, shutil, socket, tempfile\n"
        "subprocess.run(['/usr/bin/true'])\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "socket.create_server(('127.0.0.1', 0)).close()\n"
        "multiprocessing.Pool(2).map(abs, [1])\n"
        "shutil.copytree(json.__path__[0], tempfile.mkdtemp() + '/copy')\n"
    )
    ran = sandbox.run_text("usual.py", text)
    assert (ran.outcome, ran.result.denials, ran.result.denials_lost, ran.result.hints) == ("ok", [], 0, [])
    ran = sandbox.run_text("usual.sh", "gcc --version >/dev/null && ls / >/dev/null && env true\n")
    assert (ran.outcome, ran.result.denials, ran.result.denials_lost) == ("ok", [], 0)


def test_a_successful_audited_call_is_no_denial(sandbox: Sandbox) -> None:
    """A successful call that the audit records, such as setting the login uid, is not reported as a denial."""
    ran = sandbox.run_text("login.sh", "echo 7 > /proc/self/loginuid && cat /proc/self/loginuid\n")
    assert (ran.outcome, ran.stdout, ran.result.denials) == ("ok", b"7", [])


def test_a_flood_of_refusals_is_counted_and_bounded(sandbox: Sandbox) -> None:
    """Of two thousand denied paths 64 are reported and the rest counted; the program ends as usual."""
    text = """
import os
for number in range(2000):
    try:
        os.open(f"/etc/ssl/private/{number}", os.O_RDONLY)
    except PermissionError:
        pass
print("done")
"""
    ran = sandbox.run_text("flood.py", text)
    assert (ran.outcome, ran.stdout) == ("ok", b"done\n")
    assert len(ran.result.denials) == 64
    assert ran.result.denials_lost > 1000


def test_the_command_prints_advice_below_an_error(state: Path, tmp_path: Path, root: Path) -> None:
    """Below the program's error the command names the flag or the policy line, and what no setting allows."""
    assert state.parent.is_dir()
    text = f"try: open('/etc/x', 'w')\nexcept OSError: pass\nopen('{root}/in.txt').read()\nimport nothing_like_it\n"
    (tmp_path / "it.py").write_text(text)
    done = x07(tmp_path, "run", "it.py")
    assert done.code == 1
    assert "x07: denied: writing to the folder /etc. It cannot be allowed.\n" in done.err
    flags = ["--allow-read-root", f"{root}/in.txt"]
    assert (
        f"x07: {root}/in.txt is not in the sandbox. To allow it, use {' '.join(flags)} "
        f"(to write: --allow-write-root {root})\n" in done.err
    )
    assert "run x07 image build --name default --pip PACKAGE" in x07(tmp_path, "run", *flags, "it.py").err


@pytest.mark.usefixtures("state", "under_os")
def test_a_missing_module_beside_the_program_gets_advice(tmp_path: Path) -> None:
    """A program that misses a module beside it gets the command that makes a project, and that project runs."""
    (tmp_path / "it s.py").write_text("import helper\nprint(helper.NUMBER)\n")
    (tmp_path / "helper.py").write_text("NUMBER = 5\n")
    said = x07(tmp_path, "run", "it s.py").err.splitlines()[-1]
    first, then = said.partition(", run ")[2].split(", then use ")
    assert (first.split()[0], then.split()[0]) == ("x07", "x07")
    x07(tmp_path, *shlex.split(first)[1:])
    assert x07(tmp_path, *shlex.split(then)[1:])[:2] == (0, b"5\n")


@pytest.mark.usefixtures("state", "under_os")
def test_a_folder_whose_name_is_not_utf8_gives_no_hint(tmp_path: Path) -> None:
    """A missing module in a folder whose name is no UTF-8 gives an ordinary result."""
    folder = tmp_path / "fo\udcff"
    folder.mkdir()
    (folder / "it.py").write_text("import helper\n")
    (folder / "helper.py").touch()
    assert json.loads(x07(tmp_path, "run", "--json", str(folder / "it.py")).out)["outcome"] == "failed"
