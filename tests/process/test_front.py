"""The front: a process that carries out command lines for clients with its own rights, and for nobody else."""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.conftest import need
from tests.process.conftest import LAUNCHER, PYTHON, running_front, wait_until
from tests.vm.conftest import marked, owners
from x07_sandbox.backends.lease import FRONT, pool_dir
from x07_sandbox.cli.front import _rights as rights
from x07_sandbox.host.linux import children_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
ALONE: Final = "the client itself"
# Restricts itself as a service may, even as root and without no_new_privs, and executes a command.
RESTRICT: Final = """
import ctypes, os, struct, sys
call = ctypes.CDLL(None, use_errno=True).syscall
if sys.argv[1] == "landlock":
    rules = call(444, struct.pack("Q", 1 << 12), 8, 0)  # no new symbolic links
    failed = rules < 0 or call(446, rules, 0)
else:
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    failed = call(317 if os.uname().machine == "x86_64" else 277, 1, 0, struct.pack("H6xQ", 1, ctypes.addressof(allow)))
if failed:
    sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
RESTRICTED: Final = (sys.executable, "-c", RESTRICT)
# A server in the place of the front, which says whether it was sent a request.
PLANTED: Final = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("ready", flush=True)
link, _ = server.accept()
pid = int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
name = "x07-front-" + "0" * 32
fd = os.memfd_create(name)
link.send(b".")
assert link.recv(99) == name.encode()
place = f"/proc/{pid}/fd"
try:
    names = [os.readlink(f"{place}/{one}") for one in os.listdir(place)]
    name = [one[7:].partition(" ")[0] for one in names if "x07-front-" in one][0]
except OSError:
    pass
link.send(name.encode())
data, fds, _, _ = socket.recv_fds(link, 65536, 20)
print(bool(data or fds), flush=True)
if data:  # accept the request, and end before the start of the command
    link.send(b".")
    link.recv(1)
"""
NONE: Final = ("--backend", "none", "--i-accept-weaker-isolation")


def client() -> list[str]:
    """Return the words that start the client of the front, which prints ALONE instead of carrying a command out."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src/x07_sandbox/cli')!r}); import x07_front_client as client;"
        f" client.hand_over(sys.argv[1], sys.argv[2:]); print({ALONE!r})"
    )
    return [str(PYTHON), "-I", "-S", "-c", code, "main"]


def said(
    prefix: Sequence[str] = (),
    words: Sequence[str] = ("--version",),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> bytes:
    """Return what the client, started by *prefix*, prints."""
    argv = [*prefix, *client(), *words]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False, env=env, cwd=cwd)
    return done.stdout


def served(prefix: Sequence[str] = ()) -> bool:
    """Return whether the front carries out a command for a client that *prefix* starts."""
    found = said(prefix)
    assert found in {b"x07-sandbox 0.1.0.dev0\n", f"{ALONE}\n".encode()}
    return found != f"{ALONE}\n".encode()


@pytest.mark.usefixtures("front")
def test_a_command_has_the_place_and_the_limits_of_its_client(tmp_path: Path) -> None:
    """A command gets the client's folder, umask, variables, arguments, limits, priority and processors."""
    assert served()
    show = (
        "import os, resource, sys; print(os.environ['A'], sys.argv[1:], resource.getrlimit(resource.RLIMIT_STACK)[0],"
        " os.getpriority(0, 0), os.sched_getaffinity(0))"
    )
    env = dict(os.environ) | {"A": "\udcff"}
    words = ["/bin/sh", "-c", 'umask 027; ulimit -s 4096; exec nice -n 3 taskset -c 0 "$@"', "sh"]
    program = [*NONE, "--env", "A", "--toolchain", "python", "-c", show, "--", "\udcfe", ""]
    seen = [said(words, ["run", "--raw", *program], env=env | {"X07_NO_FRONT": on}) for on in ("", "1")]
    assert seen == [b"\xff ['\\udcfe', ''] 4194304 3 {0}\n", f"{ALONE}\n".encode()]
    (tmp_path / "main.py").write_text("", encoding="ascii")
    assert said(words, ["init", "--toolchain", "python"], cwd=tmp_path) != f"{ALONE}\n".encode()
    assert (tmp_path / "x07-sandbox.toml").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("front")
def test_a_command_has_the_descriptors_of_its_client(tmp_path: Path) -> None:
    """A command has the client's descriptors under their numbers, and no standard input if the client has none."""
    (tmp_path / "hello").write_text("hello", encoding="ascii")
    words = ["run", *NONE, "-c", "echo; cat", "--toolchain", "shell", "--input"]
    for number in (7, 3, 4):  # the client itself gets the lowest free number
        prefix = ["bash", "-c", f'exec {number}<hello; "$@"', "bash"]
        assert said(prefix, [*words, f"/dev/fd/{number}"], cwd=tmp_path).startswith(b"\nhello")
    assert served(["sh", "-c", '"$@" <&-', "sh"])
    assert said(["sh", "-c", '"$@" >&-', "sh"]) == b""
    assert said(["sh", "-c", '"$@" 3>&1 >&2 2>&3', "sh"], ["no-such-verb"]).startswith(b"x07: wrong usage")


@pytest.mark.parametrize(
    "prefix",
    [
        ["setpriv", "--no-new-privs"],
        ["setpriv", "--bounding-set=-net_raw"],
        ["setpriv", "--reuid=65534", "--clear-groups"],
        ["setpriv", "--groups=65534"],
        ["unshare", "--mount"],
        ["unshare", "--net"],
        ["unshare", "--pid", "--fork"],
        ["unshare", "--uts"],
        ["unshare", "--user"],
        ["setarch", "--addr-no-randomize"],
        ["choom", "-n", "500", "--"],
        ["chrt", "--idle", "0"],
        ["bwrap", "--dev-bind", "/", "/"],
        ["env", "X07_NO_FRONT=1"],
        ["env", "LD_LIBRARY_PATH=/nowhere"],
        [*RESTRICTED, "landlock"],
        [*RESTRICTED, "seccomp"],
        ["bash", "-c", '"$@" 600</dev/null', "bash"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("front")
def test_a_client_with_other_rights_is_on_its_own(prefix: Sequence[str]) -> None:
    """A client whose rights or place differ, or who would lose something, carries its command out itself."""
    need(os.geteuid() == 0, "only root may make processes with other rights", installable=False)
    assert not served(prefix)
    assert served()


@pytest.mark.usefixtures("front")
def test_another_python_is_on_its_own(tmp_path: Path) -> None:
    """A client of another installation carries its command out itself."""
    other = tmp_path / "python3"
    other.symlink_to(PYTHON)
    done = subprocess.run([other, *client()[1:], "--version"], capture_output=True, check=True)
    assert done.stdout == f"{ALONE}\n".encode()
    assert served()


def test_after_an_upgrade_a_client_is_on_its_own(tmp_path: Path) -> None:
    """Once a file that the front has loaded is replaced, clients carry their commands out themselves."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, '{tmp_path}/src'); from x07_sandbox.cli.front import main; main(sys.argv[1:])"
    )
    with running_front("-c", code):
        assert served()
        os.utime(tmp_path / "src/x07_sandbox/errors.py")
        assert not served()


@pytest.mark.parametrize(
    ("prefix", "trusted"),
    [
        ([], True),
        ([*RESTRICTED, "landlock"], False),
        ([*RESTRICTED, "seccomp"], False),
        (["setpriv", "--no-new-privs"], False),
        (["setpriv", "--bounding-set=-net_raw"], False),
        (["setpriv", "--inh-caps=-all", "--bounding-set=-all"], False),
        (["unshare", "--net"], False),
    ],
    ids=str,
)
def test_a_client_sends_nothing_to_a_server_with_other_rights(prefix: Sequence[str], trusted: bool) -> None:  # noqa: FBT001
    """A server in the front's place gets a request only if it has the client's rights, and may end before the start."""
    need(os.geteuid() == 0, "only root may make processes with other rights", installable=False)
    path = pool_dir() / FRONT
    path.unlink(missing_ok=True)
    with subprocess.Popen([*prefix, sys.executable, "-c", PLANTED, str(path)], stdout=subprocess.PIPE) as planted:
        assert planted.stdout is not None
        assert planted.stdout.readline() == b"ready\n"
        assert said() == f"{ALONE}\n".encode()
        assert planted.stdout.read() == f"{trusted}\n".encode()
    path.unlink()


@pytest.mark.usefixtures("front")
def test_a_client_does_not_use_a_folder_that_others_can_open() -> None:
    """If the folder of the socket is open to others, clients carry their commands out themselves."""
    folder = pool_dir()
    folder.chmod(0o755)
    try:
        assert not served()
    finally:
        folder.chmod(0o700)
    assert served()


def test_equally_many_filters_are_not_equal_rights() -> None:
    """A front under a filter that process 1 does not have serves nobody, since filters cannot be compared."""
    need(os.geteuid() == 0, "only root may load a filter without no_new_privs", installable=False)
    with running_front(prefix=[*RESTRICTED, "seccomp"]):
        assert not served([*RESTRICTED, "seccomp"])


def test_another_root_folder_is_another_place(tmp_path: Path) -> None:
    """Two processes have equal rights only if they see the same files."""
    need(os.geteuid() == 0, "only root may change the root folder", installable=False)
    code = "import os, sys, time; os.chroot(sys.argv[1]); print(1, flush=True); time.sleep(600)"
    for folder, equal in (("/", True), (tmp_path, False)):
        with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline()
            found = rights(other.pid)
            other.kill()
        assert (found == rights(os.getpid())) == equal


@pytest.mark.usefixtures("front")
def test_a_command_stays_in_the_control_group_of_its_client() -> None:
    """A client in another control group keeps its limits: by itself, or in version 2 by a worker in that group."""
    need(os.geteuid() == 0, "only root may make control groups", installable=False)
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup" if unified else "/sys/fs/cgroup/memory") / f"x07-test-{os.getpid()}"
    group.mkdir()
    try:
        prefix = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        assert served(prefix) == unified
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def answer(name: str, front: subprocess.Popen[bytes], *, forked: bool) -> bytes:
    """Connect, and send *name*, or the right one if it is empty. Return the answer. forked: another process sends."""
    with connected() as link:
        assert link.recv(1) == b"."
        links = [str(path.readlink()) for path in Path(f"/proc/{worker_of(front)}/fd").iterdir()]
        (right,) = [one[7:].partition(" ")[0] for one in links if "x07-front-" in one]
        own = os.memfd_create("x07-front-ours")
        if not forked:
            link.send((name or right).encode())
        elif os.fork() == 0:
            link.send(right.encode())
            os._exit(0)
        else:
            os.wait()
        found = link.recv(99)
        os.close(own)
    wait_until(lambda: not children_of(front.pid))
    return found


def test_the_worker_speaks_only_with_the_process_that_connected(front: subprocess.Popen[bytes]) -> None:
    """A worker answers only the process that has connected, and only if that may inspect the worker."""
    assert answer("", front, forked=False) == b"x07-front-ours"
    assert answer("x07-front-" + "0" * 32, front, forked=False) == b""
    assert answer("", front, forked=True) == b""


def connected() -> socket.socket:
    """Connect to the front without being a client of it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{pool_dir()}/{FRONT}")
    return connection


def test_junk_and_idle_connections_cost_others_nothing(front: subprocess.Popen[bytes]) -> None:
    """Malformed requests and 512 connections that send nothing stop nobody, and leave no process behind."""
    for data in (b"", b"\0", b"\0\0\0\1\0", b"\xff" * 70_000, b"\0\0\0\x06" + b"\0" * 6):
        with connected() as connection:
            connection.send(data)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected()) for _ in range(512)]
        assert said() in {b"x07-sandbox 0.1.0.dev0\n", f"{ALONE}\n".encode()}
        assert all(connection.recv(1) in {b".", b""} for connection in idle)
    wait_until(lambda: not children_of(front.pid))
    assert served()


def test_a_front_that_is_stopped_or_dead_prevents_no_command(front: subprocess.Popen[bytes]) -> None:
    """While the front is stopped, and after it was killed, clients carry their commands out, a second later."""
    front.send_signal(signal.SIGSTOP)
    assert not served()
    front.send_signal(signal.SIGCONT)
    wait_until(lambda: not children_of(front.pid))
    assert served()
    front.kill()
    front.wait()
    assert (pool_dir() / FRONT).exists()  # a stale socket
    assert not served()


def started(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a client."""
    pipe = subprocess.PIPE
    # In a group of its own: the kernel discards SIGTSTP for a group whose parents are all outside of its session.
    return subprocess.Popen([*client(), *words], stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)


LONG: Final = ("exec", *NONE, "--", "sh", "-c", "echo begun; read line; echo got $line; exit 7")


def worker_of(front: subprocess.Popen[bytes]) -> int:
    """Return the pid of the only worker."""
    (pid,) = children_of(front.pid)
    return pid


def test_a_command_outlives_the_front(front: subprocess.Popen[bytes]) -> None:
    """A command that has started goes on if the front is killed."""
    with started(LONG) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        front.kill()
        front.wait()
        assert running.communicate(b"more\n", 60)[0] == b"got more\n"
        assert running.returncode == 7


@pytest.mark.parametrize("who", ["client", "worker"])
def test_client_and_worker_die_together(front: subprocess.Popen[bytes], who: str) -> None:
    """If the client or the worker is killed, the other one is killed too, and with it the program."""
    words = ["sh", "-c", 'trap "" IO; exec "$@"', "sh", *client(), *LONG]  # SIGIO is what ends the worker by default
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        os.kill(running.pid if who == "client" else worker_of(front), signal.SIGKILL)
        assert running.wait(60) == -signal.SIGKILL
        wait_until(lambda: not children_of(front.pid))
        assert running.stdout.read() == b""  # nobody has it any more


def test_a_client_may_be_killed_at_any_time(front: subprocess.Popen[bytes]) -> None:
    """A client that is killed at any point leaves no worker behind."""
    for step in range(40):
        with started(LONG) as running:
            time.sleep(step * 0.003)  # at a random step
            running.kill()
    wait_until(lambda: not children_of(front.pid))
    assert served()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.usefixtures("front")
def test_signals_reach_the_command(number: int, code: int) -> None:
    """A signal to the client cancels the command as if it had got the signal itself."""
    with started(LONG) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(number)
        assert running.wait(60) == code
        assert b"cancelled" in running.communicate()[1]


def test_ignored_signals_stay_ignored(front: subprocess.Popen[bytes]) -> None:
    """A client that ignores SIGINT and SIGHUP, as in the background of a script, is not cancelled by them."""
    words = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *client(), *LONG]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        for pid in (running.pid, worker_of(front)):
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        assert running.communicate(b"\n", 60)[0] == b"got\n"
        assert running.returncode == 7


def test_a_suspended_client_suspends_the_command(front: subprocess.Popen[bytes]) -> None:
    """SIGTSTP stops client and worker, and SIGCONT lets both go on."""

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]

    with started(LONG) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        worker = worker_of(front)
        running.send_signal(signal.SIGTSTP)
        wait_until(lambda: {state(running.pid), state(worker)} == {"T"})
        running.send_signal(signal.SIGCONT)
        assert running.communicate(b"x\n", 60)[0] == b"got x\n"
        assert running.returncode == 7


@pytest.mark.usefixtures("front")
def test_a_client_that_reads_nothing_hinders_nobody() -> None:
    """A command whose output nobody reads waits alone; others are carried out meanwhile."""
    with started(["exec", *NONE, "--", "sh", "-c", "echo begun; head -c 4M /dev/zero"]) as running:
        assert running.stdout is not None
        select.select([running.stdout], [], [])
        assert served()
        assert len(running.communicate()[0]) == (4 << 20) + len("begun\n")


@pytest.mark.usefixtures("front")
def test_a_hundred_at_once() -> None:
    """A hundred commands at once each get their own exit code and output."""
    with contextlib.ExitStack() as stack:
        words = ["exec", *NONE, "--queue-timeout", "300", "--", "sh", "-c", "echo $0; exit $0"]
        commands = []
        for number in range(100):
            argv = [str(LAUNCHER), *words, str(number)]  # which does itself what the front is too busy for
            commands.append(stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE)))
        for number, command in enumerate(commands):
            assert command.communicate()[0] == f"{number}\n".encode()
            assert command.returncode == number


@pytest.mark.usefixtures("front")
def test_a_removed_folder_is_the_same_error(tmp_path: Path) -> None:
    """In a folder that was removed, a command says what it says without the front."""
    (tmp_path / "gone").mkdir()
    words = ["sh", "-c", f'cd {tmp_path}/gone; rmdir ../gone 2>/dev/null; "$@" 2>&1', "sh", str(LAUNCHER)]
    words += ["run", *NONE, "x.py"]
    results = set()
    for off in ("0", "1"):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = subprocess.run(words, capture_output=True, check=False, env=os.environ | {"X07_NO_FRONT": off})
        results.add((done.stdout, done.returncode))
    assert len(results) == 1, results


def test_resource_limits_of_the_front_are_its_own() -> None:
    """A front under a lower hard limit than its client serves that client only if it may raise the limit."""
    with contextlib.ExitStack() as stack:
        before = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_CORE, before)
        stack.enter_context(running_front())
        resource.setrlimit(resource.RLIMIT_CORE, before)
        assert served()


@pytest.mark.usefixtures("launcher")
def test_a_terminal_suspends_resumes_and_ends_a_command(tmp_path: Path) -> None:
    """In an interactive shell, Ctrl-Z and fg work, Ctrl-C cancels, and the end of the terminal ends the command."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv("/bin/bash", ["bash", "--norc", "--noprofile", "-i"])  # noqa: S606 - no shell is needed
    seen = bytearray()

    def until(end: bytes) -> None:
        while end not in seen:
            seen.extend(os.read(master, 65536))
        del seen[: seen.index(end) + len(end)]

    os.write(master, b"PS1=; stty -echo; echo set''up\n")
    until(b"setup\r\n")
    program = "echo begun; while read line; do echo got $line; done; echo end; echo x > ended"
    command = f"{LAUNCHER} exec {' '.join(NONE)} -- sh -c '{program}'; echo code=$?\n".encode()
    os.write(master, command)
    until(b"begun\r\n")
    os.write(master, b"one\n")
    until(b"got one\r\n")
    os.write(master, b"\x1a")
    until(b"Stopped")
    os.write(master, b"echo he''re; fg\n")
    until(b"here\r\n")
    until(b"sh -c")
    os.write(master, b"two\n")
    until(b"got two\r\n")
    os.write(master, b"\x03")
    until(b"cancelled")
    os.write(master, b"echo code=$?\n" + command)
    until(b"code=130\r\n")
    until(b"begun\r\n")
    job = owners(Path(os.environ["X07_VM_STATE_DIR"]))[-1]
    assert marked(str(job["instance"]))
    os.close(master)
    wait_until(lambda: not marked(str(job["instance"])))
    os.waitpid(pid, 0)
