"""What does not need Linux works without it: imports and tests without the calls that only Linux has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCE: Final = ROOT / "src" / "x07_sandbox"
HELPER: Final = ROOT / "tests" / "vz_helper.py"
# Of the modules that use the system. Not the tests of commands: these start processes that have all calls.
TESTS: Final = ("channel_carrier", "channel_connection", "policy_hints")
WITHOUT: Final = """
import builtins, ctypes, os, select, signal, socket, sys, time
absent = {
    os: ("eventfd", "eventfd_read", "eventfd_write", "memfd_create", "O_PATH", "O_TMPFILE", "pidfd_open", "pipe2",
         "sched_getaffinity"),
    select: ("epoll",),
    signal: ("pidfd_send_signal",),
    socket: ("SO_PEERCRED",),
    time: ("CLOCK_BOOTTIME",),
}
for place, names in absent.items():
    for name in names:
        delattr(place, name)
find = ctypes.CDLL.__getattr__
def of_any_system(library, name):
    if name in {"renameat2", "syncfs", "syscall"}:
        raise AttributeError(name)
    return find(library, name)
ctypes.CDLL.__getattr__ = of_any_system
def in_proc(path):
    return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith("/proc")
def refuse(path):
    if in_proc(path):
        raise FileNotFoundError(2, "No such file or directory", path)
def without_proc(call):
    return lambda path, *words, **names: refuse(path) or call(path, *words, **names)
sys.addaudithook(lambda event, words: event in {"open", "os.listdir", "os.scandir"} and refuse(words[0]))
for name in ("readlink", "stat", "lstat"):
    setattr(os, name, without_proc(getattr(os, name)))
"""
IMPORT: Final = """
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
CALL: Final = """
from pathlib import Path
from x07_sandbox.errors import HostError
from x07_sandbox.host import linux
from x07_sandbox.host.processes import Identity, identify, is_alive
near, _far = socket.socketpair()
for call, words in (
    (linux.require_linux, ()), (linux.path_flag, ()),
    (linux.new_memory_file, ()), (linux.new_unnamed_file, (Path("/tmp"),)), (linux.boot_ms, ()),
    (linux.cores, ()), (linux.peer_of, (near,)), (linux.open_pidfd, (1,)), (linux.send_signal, (0, 0)),
    (linux.boot_id, ()), (linux.require_own_proc, ()), (linux.of_process, (1, "stat")), (linux.sync, (0,)),
    (linux.openat2, (0, "x", 0, 0)), (linux.renameat2, (0, "x", 0, "y", 0)), (linux.children_of, (1,)),
    (identify, (1,)), (is_alive, (Identity(pid=1, start_ticks=0),)),
):
    try:
        print(call.__name__, "returned", call(*words))
    except HostError as exc:
        assert exc.why and exc.fix
"""


ON_A_MAC: Final = """
import platform
from types import SimpleNamespace
machine = os.uname().machine
os.uname = lambda: SimpleNamespace(sysname="Darwin", machine=machine)
platform.mac_ver = lambda: ("13.6", ("", "", ""), machine)
from x07_sandbox.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code without what only Linux has."""
    env = {name: value for name, value in os.environ.items() if name != "CI"} | variables
    argv = [sys.executable, "-c", WITHOUT + code, *words]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", ["sessions", "policy", "channel", "reports"])
def test_a_room_is_imported_without_linux(room: str) -> None:
    """The runner and the pure parts can be imported on a system without the calls that only Linux has."""
    names = [f"x07_sandbox.{room}.{path.stem}" for path in (SOURCE / room).glob("*.py") if path.stem != "__init__"]
    done = run(IMPORT, *names)
    assert (len(names) > 1, done.returncode) == (True, 0), done.stderr


def test_a_call_that_only_linux_has_is_an_error_with_a_reason() -> None:
    """On another system, each call that only Linux has raises an error with a reason and advice."""
    done = run(CALL)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "words", [("run", "prog.py"), ("exec", "--", "true"), ("run", "--dry-run", "prog.py"), ("image", "list")]
)
def test_on_a_mac_a_run_is_refused_with_the_call_that_is_missing(tmp_path: Path, words: tuple[str, ...]) -> None:
    """On a Mac, the runner names a call that only Linux has, instead of failing with a traceback."""
    (tmp_path / "prog.py").write_text("print(1)\n", encoding="ascii")
    words = tuple(str(tmp_path / word) if word == "prog.py" else word for word in words)
    folders = {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_CACHE_DIR": str(tmp_path / "cache")}
    done = run(ON_A_MAC, *words, **folders)
    assert done.returncode not in {0, 70}
    assert done.stderr.count("\n") == 1
    assert "cannot run programs on this system: it lacks " in done.stderr


def test_on_a_mac_the_doctor_says_why_vz_cannot_run(tmp_path: Path) -> None:
    """On a Mac, `x07 doctor` finds the helper, and reports the call that x07's runner lacks."""
    variables = {"X07_VM_STATE_DIR": str(tmp_path / "jobs"), "X07_VM_VZ_HELPER_BIN": str(HELPER)}
    done = run(ON_A_MAC, "doctor", "--json", **variables)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr, report["good"]) == (1, "", False)
    (vz,) = (state for state in report["backends"] if state["name"] == "vz")
    assert (vz["state"], vz["looks"][0]["good"]) == ("failed", True)
    assert "it lacks pidfd_open, which Linux has" in vz["text"]


def test_the_pure_parts_pass_their_tests_without_linux() -> None:
    """The tests of policy, channel and reports pass without the calls that only Linux has."""
    files = [f"tests/unit/test_{name}.py" for name in TESTS]
    code = "import pytest\nsys.exit(pytest.main(sys.argv[1:]))\n"
    done = run(code, "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
