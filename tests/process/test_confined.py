"""The backend `os`: what a confined process on this host can and cannot do, beyond the contract of backends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.process.conftest import run_on
from tests.process.conversation import Ended, Program, python
from x07_sandbox.channel.link import Stream
from x07_sandbox.channel.messages import Left, Mount
from x07_sandbox.channel.trees import Entry
from x07_sandbox.channel.trees import Kind as Record
from x07_sandbox.jail import resources

if TYPE_CHECKING:
    from x07_sandbox.backends.process import OsBackend

pytestmark = pytest.mark.user

VERSION_2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
# Prints the result of a statement: "no ERRNO" if the kernel refuses it.
TRY = """
import ctypes, errno, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(call, *words):
    try:
        return call(*words)
    except OSError as exc:
        return "no " + errno.errorcode[exc.errno]
"""


def run_with_try(backend: OsBackend, source: str, **how: Any) -> Ended:  # noqa: ANN401 - fields of Program
    """Run a program that begins with TRY."""
    return run_on(backend, python(TRY + source, **how))


def test_a_program_sees_only_its_own_processes(confined: OsBackend) -> None:
    """A program sees only its own processes, and can neither signal nor trace the process that started it."""
    ended = run_with_try(
        confined,
        "print(sorted(name for name in os.listdir('/proc') if name.isdigit()), os.getpid(), os.getppid())\n"
        "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGHUP): tried(os.kill, 1, number)\n"
        "print(tried(os.listdir, '/proc/1/fd'), tried(open, '/proc/1/environ'), tried(os.listdir, '/proc/1/root'))\n"
        "print(libc.ptrace(16, 1, 0, 0), errno.errorcode[ctypes.get_errno()])\n",
    )
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines() == ["['2'] 2 1", "no ENOENT no ENOENT no ENOENT", "-1 EPERM"]


def test_a_program_that_signals_its_init_ends_only_itself(confined: OsBackend) -> None:
    """SIGTERM to the first process of its namespace is reported as the program's own end."""
    ended = run_with_try(confined, "tried(os.kill, 1, signal.SIGTERM); signal.pause() if len(sys.argv) > 1 else None")
    assert ended.exited
    assert ended.code in {0, -signal.SIGKILL}


def test_a_program_cannot_read_the_callers_files(confined: OsBackend, tmp_path: Path) -> None:
    """A program finds no home folder, no sockets, none of the caller's folders, and none of their variables."""
    (tmp_path / "secret").write_text("x", encoding="ascii")
    folders = [os.environ.get("HOME", "/root"), "/run", "/var/run", "/var", "/home", "/tmp", "/sys", "/mnt", "/srv"]  # noqa: S108
    ended = run_on(
        confined,
        python(
            TRY + "print({name for f in sys.argv[2:] for name in (tried(os.listdir, f) or ()) if os.path.exists(f)})\n"
            "print(tried(os.stat, sys.argv[1]), sorted(os.environ))\n",
            str(tmp_path / "secret"),
            *folders,
            env={"LANG": "C.UTF-8"},
        ),
    )
    assert ended.stdout.splitlines() == ["{'x07'}", "no ENOENT ['LANG']"], ended.stderr


def test_a_program_has_terminals_of_its_own(confined: OsBackend) -> None:
    """A program can open terminals, and sees no terminals but its own."""
    ended = run_with_try(
        confined,
        "import pty\n"
        "print(tried(open, '/dev/tty'), os.listdir('/dev/pts'))\n"
        "first, other = pty.openpty()\n"
        "os.write(first, b'word\\n')\n"
        "print(os.ttyname(other), os.read(other, 9), sorted(os.listdir('/dev/pts')))\n",
    )
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines() == ["no ENXIO ['ptmx']", "/dev/pts/0 b'word\\n' ['0', 'ptmx']"]


def test_the_system_cannot_be_changed(confined: OsBackend) -> None:
    """Host files that a program sees are read-only; only its own folders are writable."""
    ended = run_with_try(
        confined,
        "for path in ('/usr/x', '/etc/x', '/x', '/run/x', '/x07/in/x', '/dev/x', '/proc/sys/kernel/hostname'):\n"
        "    print(tried(os.open, path, os.O_CREAT | os.O_WRONLY, 0o600))\n"
        "for path in ('/opt/x07/x', '/tmp/x', '/dev/shm/x'): open(path, 'w').write('x')\n",
    )
    assert ended.code == 0, ended.stderr
    assert set(ended.stdout.splitlines()) <= {"no EROFS", "no EACCES", "no ENOENT"}


def test_there_is_no_network(confined: OsBackend) -> None:
    """A program has its own loopback and no other network interface."""
    ended = run_with_try(
        confined,
        "print(socket.if_nameindex())\n"
        "one = socket.socket(); one.settimeout(5)\n"
        "print(tried(one.connect, ('192.0.2.1', 80)))\n"
        "print(tried(socket.socket, 17, socket.SOCK_RAW), tried(socket.socket, 40, socket.SOCK_STREAM))\n",
    )
    assert ended.stdout.splitlines() == ["[(1, 'lo')]", "no ENETUNREACH", "no EAFNOSUPPORT no EAFNOSUPPORT"]


def test_no_capability_is_left_and_no_namespace_can_be_made(confined: OsBackend) -> None:
    """A program has no capability, cannot gain one, and cannot create a user namespace to get one."""
    ended = run_with_try(
        confined,
        "print({line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')})\n"
        "print(libc.unshare(0x10000000), errno.errorcode[ctypes.get_errno()])\n"
        "print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), errno.errorcode[ctypes.get_errno()])\n"
        "print([line for line in open('/proc/self/status') if line.startswith(('NoNewPrivs', 'Seccomp:'))])\n",
    )
    assert ended.stdout.splitlines() == [
        "{'0000000000000000'}",
        "-1 EPERM",
        "-1 EPERM",
        "['NoNewPrivs:\\t1\\n', 'Seccomp:\\t2\\n']",
    ]


def test_only_listed_programs_can_be_executed(confined: OsBackend) -> None:
    """With a list of programs, other programs can be neither executed nor read."""
    listed = {"programs": ["/usr/bin/python3", "/usr/bin/true"]}
    ended = run_with_try(
        confined,
        "def run(path):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        tried(os.execv, path, [path]); os._exit(99)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "print(run('/usr/bin/true'), run('/usr/bin/env'), tried(open, '/usr/bin/env'))\n",
        confine=listed,
    )
    assert ended.stdout == "0 99 no EACCES\n", ended.stderr


def test_changes_and_left_files_come_back_together(confined: OsBackend) -> None:
    """A run hands over both the changes to the host's folders and the files left in private folders."""
    mount = Mount(tree=1, sub="", at="/data/w", write=True, changes=True)
    empty = Entry(Record.FOLDER, b"", mode=0o755).encoded() + Entry(Record.END, b"").encoded()
    ended = run_with_try(
        confined,
        "open('/data/w/new', 'w').write('new\\n'); open('mine', 'w').write('left')\n",
        files={"": (0o755, "tree", empty)},
        mounts=[mount],
        left=Left(5, 100),
    )
    assert ended.code == 0, ended.stderr
    assert b"new\n" in ended.output[Stream.CHANGES]
    assert b"left" in ended.output[Stream.LEFT]


def test_the_hosts_compiler_works(confined: OsBackend) -> None:
    """The host's C compiler works inside."""
    if not Path("/usr/bin/gcc").exists():
        pytest.skip("there is no gcc")
    source = b'#include <stdio.h>\nint main(void) { puts("compiled"); }\n'
    ended = run_on(
        confined,
        Program(
            argv=["/bin/sh", "-c", "gcc -o /opt/x07/it /x07/in/it.c && /opt/x07/it"],
            files={"/x07/in/it.c": (0o444, "file", source)},
        ),
    )
    assert ended.stdout == "compiled\n", ended.stderr


@pytest.mark.root
def test_a_cgroup_of_version_2_limits_cpu_time(confined: OsBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cgroup version 2, each program has a group that counts and limits its CPU time."""
    root = next((path for path in VERSION_2 if (path / "cgroup.controllers").exists()), None)
    if root is None or os.geteuid() != 0:
        pytest.skip("only root can make a group, where there is a hierarchy of version 2")
    monkeypatch.setattr(resources, "_ROOT", root)
    source = "import os; print(open('/proc/self/cgroup').read(), flush=True)\nos.fork()\nwhile True: pass"
    ended = run_on(confined, python(source, limits={"cpu_ms": 500}))
    assert "/program\n" in ended.stdout
    assert ended.exited.cpu_exceeded
    assert ended.code == -signal.SIGKILL
    assert not [path for path in (root / "x07-sandbox").iterdir() if path.is_dir()]
