"""What a program can and cannot do, by default and under its policy.

Most tests run under `os`, where the same agent sets up the same filters and Landlock rules as in a VM. In VMs run those
of the guest's kernel, of the waiting interpreter, and one of each kind of policy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import FULL, need
from tests.vm.conftest import PROGRAMS, Artifacts
from x07_sandbox.kernel import landlock_version

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.conftest import Ran, Sandbox
    from x07_sandbox.images.store import Image

pytestmark = pytest.mark.vm

ESCAPE: Final = PROGRAMS / "escape.c"
WRITABLE: Final = ("/opt/x07", "/tmp", "/dev/shm")  # noqa: S108 - the guest's own
NO_EXEC: Final[dict[str, object]] = {"process.allow_exec": False}
LISTED: Final[dict[str, object]] = {
    "process.allow_execs": ["/usr/bin/env"],
    "process.allow_exec_prefixes": ["/usr/bin/tru", "/usr/sbin/"],
}
# Attempts that do not fail with EPERM: missing calls, socket families, and names or modes that deny access.
OTHERS: Final = {
    **dict.fromkeys(("clone3", "x32-getpid", "int80-getpid"), "ENOSYS"),
    **dict.fromkeys(("packet", "vsock", "vsock-high", "alg", "key"), "EAFNOSUPPORT"),
    **dict.fromkeys(("open-init-mem", "open-init-environ", "open-port", "oom-score"), "ENOENT"),
    **dict.fromkeys(("setpriority", "sysctl"), "EACCES"),
}
PYTHON: Final = """
import asyncio, ctypes, json, multiprocessing, os, subprocess, sys, threading

def tried(call, *args):
    try:
        return call(*args)
    except (OSError, RuntimeError) as exc:
        return getattr(exc, "strerror", None) or str(exc)

def thread():
    one = threading.Thread(target=int)
    one.start()
    one.join()
    return "done"

def child():
    if (pid := os.fork()) == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def own():
    queue = multiprocessing.get_context("fork").Queue()
    queue.put(5)
    return queue.get(timeout=60)

def run(*argv):
    return subprocess.run(argv, stdout=subprocess.DEVNULL).returncode

def execve():
    os.execv("/usr/bin/true", ["true"])

print(json.dumps({
    "thread": tried(thread),
    "fork": tried(child),
    "queue": tried(own) if "queue" in sys.argv else None,
    "true": tried(run, "/usr/bin/true"),
    "cat": tried(run, "/usr/bin/cat", "/dev/null"),
    "python": tried(run, sys.executable, "-c", "pass"),
    "execve": tried(execve) if "exec" in sys.argv else None,
    "loop": asyncio.run(asyncio.sleep(0, "done")),
    "callback": ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)(),
}))
"""
REFUSED: Final = "Operation not permitted"


@pytest.fixture(autouse=True)
def under_os(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run under `os`."""
    able = "in_vms" in request.fixturenames or landlock_version() >= 2
    need(able, "this host's kernel has no Landlock to confine programs", installable=False)
    monkeypatch.setenv("X07_SANDBOX_BACKEND", "os")
    monkeypatch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")


@pytest.fixture(scope="module")
def built_here(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Programs that are built by this host's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("X07_SANDBOX_BACKEND", "os")
        patch.setenv("X07_I_ACCEPT_WEAKER_ISOLATION", "1")
        patch.setenv("X07_VM_STATE_DIR", str(tmp_path_factory.mktemp("building") / "jobs"))
        made = Artifacts(tmp_path_factory.mktemp("built"), image)
        made.built(ESCAPE)
    return made


@pytest.fixture
def escape(artifacts: Artifacts, built_here: Artifacts) -> bytes:
    """programs/escape.c, built for where it runs."""
    return (built_here if "X07_SANDBOX_BACKEND" in os.environ else artifacts).built(ESCAPE)


@dataclasses.dataclass(frozen=True)
class Escapes:
    """Runs programs/escape.c."""

    sandbox: Sandbox
    artifact: bytes

    def __call__(self, *args: str, **policy: object) -> dict[str, str]:
        """Return the result of each attempt. policy: by path, dots written as two underscores."""
        ran = self.run(*args, **policy)
        return dict(line.rsplit(" ", 1) for line in ran.lines())

    def run(self, *args: str, **policy: object) -> Ran:
        """Return the whole run."""
        changes = {name.replace("__", "."): value for name, value in policy.items()}
        ran = self.sandbox.run(ESCAPE, *args, artifact=self.artifact, policy=changes)
        assert ran.outcome == "ok", (ran.reason, ran.stderr)
        return ran


@pytest.fixture
def attempt(sandbox: Sandbox, escape: bytes) -> Escapes:
    """Run it and return its results."""
    return Escapes(sandbox, escape)


def fields(changes: dict[str, object]) -> dict[str, object]:
    """Return a policy's fields as `Escapes` takes them."""
    return {name.replace(".", "__"): value for name, value in changes.items()}


def python(sandbox: Sandbox, *args: str, policy: dict[str, object], **options: object) -> dict[str, object]:
    """Return the report of PYTHON."""
    ran = sandbox.run_text("tries.py", PYTHON, *args, policy=policy, cache=True, **options)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    report: dict[str, object] = json.loads(ran.stdout)
    return report


# every program


@pytest.mark.usefixtures("in_vms")
@pytest.mark.parametrize("cold", [False, True] if FULL else [False])
def test_known_escape_attempts_fail(sandbox: Sandbox, escape: bytes, *, cold: bool) -> None:
    """Under the most permissive policy, over 90 escape attempts of a C program fail with the expected errno."""
    ran = sandbox.run(ESCAPE, "base", artifact=escape, cold=cold)
    assert ran.outcome == "ok", ran.reason
    found = [line.split() for line in ran.lines()]
    assert len(found) > 90
    for name, error in found:
        family = name.removeprefix("socket-")
        expected = OTHERS.get(family, "EPERM")
        if name in {"socket-audit", "socket-netfilter"}:
            expected = "EPROTONOSUPPORT"
        elif name == "socketpair-tipc":
            expected = "EAFNOSUPPORT"
        assert (name, error) == (name, expected)
    assert ran.program_ms < 20_000


@pytest.mark.usefixtures("in_vms")
def test_ordinary_c_programs_work(attempt: Escapes) -> None:
    """Threads, children, sockets, shared memory, semaphores, executable memory and the like work."""
    found = attempt("usual")
    assert len(found) > 25
    assert set(found.values()) == {"OK"}


@pytest.mark.usefixtures("in_vms")
def test_ordinary_python_programs_work(sandbox: Sandbox) -> None:
    """Threads, children, queues between processes, callbacks from C and other programs work in Python."""
    assert python(sandbox, "queue", policy={}) == {
        "thread": "done",
        "fork": 7,
        "queue": 5,
        "true": 0,
        "cat": 0,
        "python": 0,
        "execve": None,
        "loop": "done",
        "callback": 3,
    }


@pytest.mark.usefixtures("in_vms")
def test_the_result_names_the_filters_by_their_digests(attempt: Escapes, image: Image) -> None:
    """The result lists name and sha256 of each filter that the program ran under."""
    known = image.manifest.filters
    ran = attempt.run("tasks", process__allow_spawn=False, process__allow_exec=False)
    refused = dict.fromkeys((*TASKS, "posix_spawn", "clone-vm"), "EPERM")
    assert dict(line.rsplit(" ", 1) for line in ran.lines()) == {"thread": "OK", **refused}
    names = ("base", "quiet", "no-spawn-no-exec", "no-spawn-no-exec-once")
    assert ran.result.filters == {name: f"sha256:{known[name].sha256}" for name in names}
    for part in known.values():
        assert (image.folder / part.file).stat().st_size == part.bytes


# tasks

TASKS: Final = {"fork", "clone", "clone-parent", "clone-high", "fork-call"}


def test_children_work_without_threads(attempt: Escapes) -> None:
    """With threads.enabled false a second thread fails with EPERM, and every kind of child works."""
    found = attempt("tasks", threads__enabled=False)
    assert found == {"thread": "EPERM", "posix_spawn": "OK", **dict.fromkeys(TASKS, "OK")}


def test_threads_work_without_children(attempt: Escapes) -> None:
    """With process.allow_spawn false every kind of child fails with EPERM, and threads work."""
    refused = dict.fromkeys((*TASKS, "posix_spawn", "clone-vm"), "EPERM")
    assert attempt("tasks", process__allow_spawn=False) == {"thread": "OK", **refused}
    assert attempt("exec", "/usr/bin/nothing", process__allow_spawn=False) == {"/usr/bin/nothing": "ENOENT"}


def test_process_enabled_false_denies_children_and_exec(attempt: Escapes) -> None:
    """With process.enabled false neither children nor exec work, whatever other fields say; threads still work."""
    refused = dict.fromkeys((*TASKS, "posix_spawn", "clone-vm"), "EPERM")
    assert attempt("tasks", process__enabled=False) == {"thread": "OK", **refused}
    assert set(attempt("exec", "/usr/bin/true", process__enabled=False).values()) == {"EPERM"}


@pytest.mark.usefixtures("in_vms")
def test_process_limits_hold_in_python(sandbox: Sandbox) -> None:
    """Limits on threads, children and exec hold in Python, in the interpreter that waited for the program."""
    policy: dict[str, object] = {"threads.enabled": False, "process.enabled": False}
    report = python(sandbox, "exec", policy=policy)
    assert re.search("start new thread", str(report.pop("thread")))
    assert report.pop("loop") == "done"
    assert report.pop("callback") == 3
    assert report.pop("queue") is None
    assert set(report.values()) == {REFUSED}


@pytest.mark.usefixtures("in_vms")
def test_max_live_limits_children_by_name(attempt: Escapes, sandbox: Sandbox) -> None:
    """process.max_live limits the number of further tasks, and excess ones are denied in its name."""
    ran = sandbox.behave("spawn", "20", policy={"process.max_live": 3})
    assert ran.lines() == ["made 3", "refused 17"]
    (denial,) = ran.result.denials
    assert denial.how_to_allow is not None
    assert (denial.field, denial.count, denial.how_to_allow.json_path) == ("process.max_live", 17, "$.process.max_live")
    # Without children it limits nothing: limits.procs covers threads.
    assert attempt("tasks", process__allow_spawn=False, process__max_live=0)["thread"] == "OK"


# executing


def test_allow_exec_false_starts_only_the_program(attempt: Escapes) -> None:
    """With process.allow_exec false the program starts, and every later exec fails with EPERM."""
    found = attempt("exec", "/usr/bin/true", "/bin/sh", "/proc/self/exe", "/x07/in/artifact", **fields(NO_EXEC))
    assert set(found.values()) == {"EPERM"}


@pytest.mark.parametrize("place", ["under_os", "in_vms"])
def test_allow_exec_false_starts_only_the_interpreter(
    request: pytest.FixtureRequest, sandbox: Sandbox, place: str
) -> None:
    """With process.allow_exec false an interpreter starts, new or waiting, and no later exec works, nor in children."""
    request.getfixturevalue(place)
    report = python(sandbox, "exec", policy=NO_EXEC)
    assert (report["thread"], report["fork"]) == ("done", 7)
    assert {report[name] for name in ("true", "cat", "python", "execve")} == {REFUSED}


@pytest.mark.usefixtures("in_vms")
def test_the_start_permission_cannot_be_reused(attempt: Escapes) -> None:
    """The start secret cannot be guessed, no other exec works after the start, and the filter cannot be read back."""
    found = attempt("again", **fields(NO_EXEC))
    assert found == dict.fromkeys(("guess 0", "guess 1", "guess 2", "execveat", "self", "get-filter"), "EPERM")


@pytest.mark.parametrize("policy", [NO_EXEC, LISTED], ids=["no execution", "a list"])
def test_written_files_cannot_be_executed(attempt: Escapes, policy: dict[str, object]) -> None:
    """Files that a program writes cannot be executed or mapped as executable, wherever they are."""
    found = attempt("write", *WRITABLE, **fields(policy))
    error = "EPERM" if policy is NO_EXEC else "EACCES"
    for folder in WRITABLE:
        assert (found.pop(f"{folder}/copy"), found.pop(f"fd {folder}")) == (error, error)
        assert (found.pop(f"map {folder}"), found.pop(f"protect {folder}")) == ("EPERM", "EACCES")
    assert found == {}


def test_written_files_can_be_executed_with_the_prefix_root(attempt: Escapes) -> None:
    """With the prefix "/" a program can run what it compiles or copies."""
    assert set(attempt("write", *WRITABLE).values()) == {"OK"}


@pytest.mark.usefixtures("in_vms")
def test_only_listed_programs_can_be_executed(attempt: Escapes) -> None:
    """With a list of programs and prefixes, only those and the program itself can be executed."""
    wanted = dict.fromkeys(("/usr/bin/true", "/bin/true", "/proc/self/exe", "/bin/env"), "OK")
    wanted |= dict.fromkeys(("/usr/bin/ls", "/bin/sh", "/usr/bin/python3", "/usr/bin/gcc"), "EACCES")
    wanted |= {"/usr/bin/tru": "ENOENT"}
    # env executes its argument, which is missing: 127 stands for an errno.
    found = attempt("exec", *wanted, **fields(LISTED))
    assert found.pop("/bin/env") not in {"EACCES", "EPERM"}
    wanted.pop("/bin/env")
    assert found == wanted


@pytest.mark.usefixtures("in_vms")
def test_the_loader_cannot_bypass_a_list_of_programs(attempt: Escapes) -> None:
    """Under a list, unlisted programs cannot be read, loaded or copied; libraries and data can."""
    found = attempt("loader", "/usr/bin/true", "/usr/bin/ls", "/usr/bin/python3", **fields(LISTED))
    assert found == {"ld.so /usr/bin/true": "0", "ld.so /usr/bin/ls": "127", "ld.so /usr/bin/python3": "127"}
    programs = ("/usr/bin/ls", "/bin/bash", "/usr/bin/perl", "/usr/bin/python3")
    data: tuple[str, ...] = (
        "/usr/bin/true",
        "/usr/sbin/ldconfig",
        "/etc/passwd",
        "/x07/in/policy.json",
        "/proc/self/status",
    )
    data += ("/dev/zero", "/usr/lib/os-release", "/lib64/ld-linux-x86-64.so.2")
    found = attempt("read", *programs, *data, **fields(LISTED))
    assert found == {f"read {path}": "EACCES" if path in programs else "OK" for path in (*programs, *data)}


def test_a_list_of_programs_affects_only_exec(attempt: Escapes) -> None:
    """Under a list, files can be moved between folders, and everything without exec works as usual."""
    found = attempt("usual", process__allow_execs=["/usr/bin/true"], process__allow_exec_prefixes=[])
    assert found.pop("system") == "EACCES"
    assert set(found.values()) == {"OK"}


@pytest.mark.usefixtures("in_vms")
def test_a_list_of_programs_holds_in_python(sandbox: Sandbox) -> None:
    """A Python program can run only the listed programs, its own interpreter not included."""
    report = python(sandbox, "queue", policy=LISTED)
    assert (report["true"], report["cat"], report["python"]) == (0, "Permission denied", "Permission denied")
    assert (report["thread"], report["fork"], report["queue"], report["callback"]) == ("done", 7, 5, 3)


def test_files_written_below_a_listed_prefix_can_be_executed(attempt: Escapes) -> None:
    """With a listed prefix that covers a writable folder, a program can run what it writes there, and only there."""
    found = attempt("write", *WRITABLE, process__allow_exec_prefixes=["/opt/x07/"])
    assert {found[name] for name in found if "/opt/x07" in name} == {"OK"}
    assert {found[name] for name in found if "/opt/x07" not in name} == {"EACCES", "EPERM"}


HOST_FILES: Final = """
import json, os, shutil, subprocess, sys

def tried(*argv):
    try:
        return subprocess.run(argv).returncode
    except OSError as exc:
        return exc.strerror

given, written = sys.argv[1:]
shutil.copy("/usr/bin/true", f"{written}/copy")
print(json.dumps({
    "given": tried(f"{given}/tool"),
    "read": open(f"{given}/tool").readline(),
    "written": tried(f"{written}/copy"),
    "there": tried(f"{written}/tool"),
}))
"""


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
def test_a_list_of_programs_holds_for_host_files(sandbox: Sandbox, tmp_path: Path, *, listed: bool) -> None:
    """Files of a read root can be executed only if the list says so; files of a write root by default not."""
    folders = [tmp_path / name for name in ("given", "written")]
    for folder in folders:
        folder.mkdir()
        (folder / "tool").write_text("#!/bin/sh\nexit 3\n")
        (folder / "tool").chmod(0o755)
    given, written = map(str, folders)
    policy: dict[str, object] = {
        "fs.read_roots": [given],
        "fs.write_roots": [written],
        "process.allow_execs": ["/usr/bin/true", "/bin/sh"],
        "process.allow_exec_prefixes": [f"{given}/"] if listed else [],
    }
    ran = sandbox.run_text("files.py", HOST_FILES, given, written, policy=policy)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    assert json.loads(ran.stdout) == {
        "given": 3 if listed else "Permission denied",
        "read": "#!/bin/sh\n",
        "written": "Permission denied",
        "there": "Permission denied",
    }


TWICE: Final = """
import json, subprocess, sys

def tried(call, *args):
    try:
        return call(*args)
    except OSError as exc:
        return exc.strerror

def written(path):
    with open(path, "r+b") as file:
        file.write(b"#!/bin/sh\\nexit 4\\n")
    return "written"

places = sys.argv[1:]
print(json.dumps([
    *(tried(written, f"{place}/tool") for place in places),
    *(tried(written, f"{place}/other") for place in places),
    tried(subprocess.call, [f"{places[0]}/tool"]),
]))
"""


@pytest.mark.parametrize("around", [True, False], ids=["in another root", "two roots"])
def test_a_listed_file_cannot_be_changed_at_any_path(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, around: bool
) -> None:
    """A listed file cannot be changed at any path of its folder, even if the folder is visible at two paths."""
    folder = tmp_path / "own tools"
    folder.mkdir()
    for name in ("tool", "other"):
        (folder / name).write_text("#!/bin/sh\nexit 3\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    places = [f"/opt/x07/{folder.name}", str(folder)]
    policy: dict[str, object] = {
        "fs.read_roots": [folder.name] if around else [],
        "fs.write_roots": [str(tmp_path)] if around else [folder.name, places[1]],
        "process.allow_execs": [f"{places[0]}/tool", "/bin/sh"],
        "process.allow_exec_prefixes": [],
    }
    ran = sandbox.run_text("twice.py", TWICE, *places, policy=policy)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    assert json.loads(ran.stdout) == ["Read-only file system"] * 2 + ["written"] * 2 + [3]


LOADED: Final = """
import json, mmap, shutil, subprocess, sys

def loaded(path):
    words = ["/lib64/ld-linux-x86-64.so.2", path, "exec-done"]
    return subprocess.run(words, stderr=subprocess.DEVNULL).returncode

def tried(call, *args):
    try:
        call(*args)
        return 0
    except OSError as exc:
        return exc.strerror

def mapped(path):
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()

given, written = sys.argv[1:]
paths = {"given": f"{given}/tool", "written": f"{written}/tool", "copy": "/tmp/copy", "listed": f"{written}/listed"}
shutil.copy(paths["given"], paths["copy"])
print(json.dumps({
    "mapped": {name: tried(mapped, path) for name, path in paths.items()},
    "loaded": None if "no" in sys.argv[0] else {name: loaded(path) for name, path in paths.items()},
    "changed": tried(open, paths["listed"], "ab"),
    "moved": tried(shutil.move, paths["written"], f"{written}/moved"),
}))
"""


@pytest.mark.parametrize("listed", [True, False], ids=["a list", "no execution"])
def test_the_loader_runs_only_programs_of_the_image(
    sandbox: Sandbox, escape: bytes, tmp_path: Path, *, listed: bool
) -> None:
    """Programs in roots or written ones cannot be loaded or mapped, except a named one, which stays unchanged."""
    folders = [tmp_path / name for name in ("given", "written")]
    for folder in folders:
        folder.mkdir()
        for name in ("tool", "listed"):
            (folder / name).write_bytes(escape)
            (folder / name).chmod(0o755)
    given, written = map(str, folders)
    policy: dict[str, object] = {
        "fs.read_roots": [given],
        "fs.write_roots": [written],
        "process.allow_exec": listed,
        "process.allow_execs": [f"{written}/listed"],
        "process.allow_exec_prefixes": [],
    }
    ran = sandbox.run_text("loads.py" if listed else "no.py", LOADED, given, written, policy=policy)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    report = json.loads(ran.stdout)
    names = ("given", "written", "copy", "listed")
    if listed:
        assert report["loaded"] == {name: 0 if name == "listed" else 127 for name in names}
        assert report["changed"] == "Read-only file system"
    assert report["mapped"] == {name: 0 if listed and name == "listed" else REFUSED for name in names}
    assert report["moved"] == 0


BESIDE: Final = """
import json, mmap, subprocess
path = "/x07/in/program/tool"
words = ["/lib64/ld-linux-x86-64.so.2", path, "exec-done"]
try:
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    mapped = 0
except OSError as exc:
    mapped = exc.strerror
print(json.dumps([mapped, subprocess.run(words, stderr=subprocess.DEVNULL).returncode]))
"""


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_a_list_of_programs_holds_for_project_files(sandbox: Sandbox, escape: bytes, *, named: bool) -> None:
    """A project file beside its program cannot be loaded or mapped unless a list entry names it."""
    folder = sandbox.work / "p"
    folder.mkdir()
    (folder / "main.py").write_text(BESIDE)
    (folder / "tool").write_bytes(escape)
    (folder / "x07-sandbox.toml").write_text(
        'schema_version = "x07.sandbox.project@0.1.0"\ntoolchain = "python"\nentry = "main.py"\n'
        'files = ["main.py", "tool"]\n'
    )
    entries = ["/x07/in/program/tool"] if named else ["/usr/bin/true"]
    policy = {"process.allow_execs": entries, "process.allow_exec_prefixes": []}
    ran = sandbox.run(folder, policy=policy)
    assert ran.outcome == "ok", (ran.reason, ran.stderr)
    assert json.loads(ran.stdout) == ([0, 0] if named else [REFUSED, 127])
