"""What runtimes and tools look for in a machine: memory limit, terminals, Python's defaults, file times."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.vm.conftest import Sandbox

pytestmark = pytest.mark.vm

MIB = 1 << 20


def seen(sandbox: Sandbox, text: str, **options: object) -> object:
    """Run a Python program and return what it prints as JSON."""
    ran = sandbox.run_text("look.py", text, cache=True, **options)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    return json.loads(ran.stdout)


# the control group

GROUP = """
import json, os
group = "/sys/fs/cgroup"
read = lambda path: open(path).read().strip()
print(json.dumps({
    "own": read("/proc/self/cgroup"),
    "mounted": [line.split()[3:5] for line in open("/proc/self/mountinfo") if " cgroup2 " in line],
    "memory": read(f"{group}/memory.max"),
    "tasks": read(f"{group}/pids.max"),
    "cpu": read(f"{group}/cpu.max").split()[0],
    "in it": read(f"{group}/cgroup.procs").split() == [str(os.getpid())],
    "other": [os.listdir("/sys"), os.listdir("/sys/fs"), [name for name in os.listdir(group) if "." not in name]],
}))
"""


def test_a_runtime_finds_the_memory_limit_of_the_policy(sandbox: Sandbox) -> None:
    """The program finds its control group with the policy's limits at /sys/fs/cgroup, and nothing else in /sys."""
    policy = {"limits.mem_bytes": 512 * MIB, "limits.procs": 7}
    assert seen(sandbox, GROUP, policy=policy) == {
        "own": "0::/",
        "mounted": [["/", "/sys/fs/cgroup"]],
        "memory": str(512 * MIB),
        "tasks": "8",  # the program itself, too
        "cpu": "max",
        "in it": True,
        "other": [["fs"], ["cgroup"], []],
    }


GROUP_ATTACKS = """
import ctypes, errno, json, os
group, done, tried = "/sys/fs/cgroup", [], 0
def attempt(what, *words):
    global tried
    tried += 1
    try:
        what(*words)
        done.append(repr((what, words)))
    except OSError as exc:
        assert exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV), (what, words, exc)
def syscall(number, *words):
    if ctypes.CDLL(None, use_errno=True).syscall(number, *words) < 0:
        raise OSError(ctypes.get_errno(), "")
for name in sorted(os.listdir(group)):
    path = f"{group}/{name}"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        attempt(os.open, path, flags)
    attempt(os.chmod, path, 0o666)
    attempt(os.chown, path, os.getuid(), -1)
    attempt(os.rename, path, "/tmp/x")
    attempt(os.unlink, path)
attempt(os.mkdir, f"{group}/mine")
attempt(os.rmdir, group)
attempt(os.unshare, os.CLONE_NEWCGROUP)
attempt(os.unshare, os.CLONE_NEWUSER | os.CLONE_NEWCGROUP)
attempt(os.setns, os.open("/proc/self/ns/cgroup", os.O_RDONLY), 0)
if os.uname().machine == "x86_64":
    attempt(syscall, 165, b"none", b"/tmp", b"cgroup2", 0, None)
    attempt(syscall, 165, None, b"/sys/fs/cgroup", None, 32 | 4096, None)
    attempt(syscall, 166, b"/sys/fs/cgroup", 2)
    attempt(syscall, 430, b"cgroup2", 0)
print(json.dumps([done, tried > 200]))
"""


def test_the_control_group_cannot_be_changed_or_left(sandbox: Sandbox) -> None:
    """The program cannot change, create, remount or leave a control group."""
    assert seen(sandbox, GROUP_ATTACKS) == [[], True]


# terminals

TERMINALS = """
import errno, json, os, pty, termios, fcntl
found = {}
pid, fd = pty.fork()
if pid == 0:
    with open("/dev/tty", "w") as tty:
        print(os.ttyname(0), os.isatty(1), file=tty)
    os._exit(3)
said = b""
try:
    while piece := os.read(fd, 1000):
        said += piece
except OSError:  # its other end was closed
    pass
found["child"] = [said.decode().split(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
os.close(fd)
pairs = []
try:
    while True:
        pairs.append(pty.openpty())
except OSError:
    found["most"] = len(pairs)
try:
    os.open("/dev/ptmx", os.O_RDWR)
except OSError as exc:
    found["refused"] = [errno.errorcode[exc.errno]]
os.write(pairs[0][0], b"word\\n")
found["line"] = os.read(pairs[0][1], 100).decode()
for number, word in ((termios.TIOCSTI, b"x"), (termios.TIOCSETD, (3).to_bytes(4, "little"))):
    try:
        fcntl.ioctl(pairs[0][1], number, word)
    except OSError as exc:
        found["refused"].append(errno.errorcode[exc.errno])
found["there"] = sorted(os.listdir("/dev/pts"), key=len)[-1]
try:
    open("/dev/tty")
except OSError as exc:
    found["own"] = errno.errorcode[exc.errno]
print(json.dumps(found))
"""


def test_a_program_can_open_pseudoterminals(sandbox: Sandbox) -> None:
    """A program starts without a terminal, can open 64 pseudoterminals, and cannot inject input into one."""
    assert seen(sandbox, TERMINALS) == {
        "child": [["/dev/pts/0", "True"], 3],
        "most": 64,
        "line": "word\n",
        "refused": ["ENOSPC", "EPERM", "EPERM"],
        "there": "ptmx",
        "own": "ENXIO",
    }


# Python


@pytest.mark.parametrize(
    ("policy", "env", "left"),
    [
        ({}, {"PYTHONUNBUFFERED": "", "PYTHONDONTWRITEBYTECODE": "x"}, ["", "x"]),
        ({"env.deny_keys": ["PYTHONUNBUFFERED"]}, {}, [None, "1"]),
    ],
)
def test_the_defaults_of_python_can_be_overridden(
    sandbox: Sandbox, policy: Mapping[str, object], env: Mapping[str, str], left: list[str | None]
) -> None:
    """--env overrides our Python defaults, and deny_keys removes them, for Python's start-up too."""
    text = (
        "import json, os, sys\n"
        "names = ('PYTHONUNBUFFERED', 'PYTHONDONTWRITEBYTECODE')\n"
        "print(json.dumps([[os.environ.get(name) for name in names], sys.stdout.write_through]))\n"
    )
    assert seen(sandbox, text, policy=policy, env=env) == [left, left[0] == "1"]


def test_importing_from_a_read_root_reports_no_denials(sandbox: Sandbox, tmp_path: Path) -> None:
    """Importing a package from a read root reports no denied write of byte code."""
    package = tmp_path / "lib/pkg"
    package.mkdir(parents=True)
    for name in ("__init__", "a", "b"):
        (package / f"{name}.py").write_text("WORD = 'here'\n")
    text = f"import sys\nsys.path.insert(0, {str(package.parent)!r})\nfrom pkg import a, b\nprint(a.WORD)\n"
    ran = sandbox.run_text("prog.py", text, policy={"fs.read_roots": [str(package.parent)]}, cache=True)
    assert (ran.outcome, ran.stdout) == ("ok", b"here\n"), ran.stderr
    assert ran.result.denials == []


# times of files


@pytest.mark.usefixtures("under_os")
def test_files_folders_and_links_keep_their_mtimes_on_the_way_in(sandbox: Sandbox, tmp_path: Path) -> None:
    """Files, folders and links in roots keep their mtimes to the nanosecond, even before 1970."""
    wanted = {}
    for root, base in (("in", 1_700_000_000_123_456_789), ("out", -86_400_000_000_001)):
        (tmp_path / root / "d/e").mkdir(parents=True)
        (tmp_path / root / "d/e/file").write_text(root)
        (tmp_path / root / "d/e").chmod(0o555)
        (tmp_path / root / "link").symlink_to("d/e/file")
        for number, name in enumerate(("d/e/file", "link", "d/e", "d", ".")):
            os.utime(tmp_path / root / name, ns=(0, base + number), follow_symlinks=False)
            wanted[f"{tmp_path}/{root}/{name}"] = base + number
    policy = {
        "fs.read_roots": [f"{tmp_path}/in"],
        "fs.write_roots": [f"{tmp_path}/out"],
        "fs.allow_symlinks": True,
    }
    text = f"import json, os\nprint(json.dumps({{p: os.lstat(p).st_mtime_ns for p in {list(wanted)!r}}}))\n"
    ran = sandbox.run_text("times.py", text, policy=policy, cache=True)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    assert json.loads(ran.stdout) == wanted
    changes = ran.result.changes
    assert changes is None or changes.names == ()
