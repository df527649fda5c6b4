"""The front: a child of the pool's process that carries out command lines with everything imported.

    python -I -m x07_sandbox.cli.front READY_FD

The client is `x07_front_client`. The front forks a worker for each connection, and reads nothing itself. It has one
thread and no machines or locks. It ends when its standard input does, and its workers finish their commands.

Client and worker each have a memory file with a random name. The kernel shows that name only to a process that may
inspect its owner (ptrace(2): access mode checks), so not to one with fewer capabilities, in another user namespace, or
confined by Landlock or another security module. The messages in turn (numbers have four bytes, most significant first):
    worker  one byte
    client  the name of the worker's file
    worker  the name of the client's file
    client  the length of the rest; strings that end with NUL: PROTOCOL, the path of Python, the command's module, the
            error handler of standard output, the numbers of the client's descriptors, the number of arguments,
            arguments, variables; with these descriptors and one of the current folder
    worker  one byte: the command can be carried out with the rights of the client
    client  one byte: the command shall start
    worker  one byte: it starts
    worker  one byte: the exit code

If a connection ends before the command starts, the client carries it out itself. Later, the worker is killed if the
client is, and the client if the worker is.

Each side knows which process the other is. The kernel names the sender of a message. The message contains a name that
was made only after the receiver had opened a pidfd of that process, and the process still lives once its rights have
been read, so no other process had its pid in between. Each compares what /proc shows of the other's rights (`_rights`
here) with its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, NoReturn

from x07_sandbox.backends.lease import FRONT, pool_dir
from x07_sandbox.cli import main as command_line
from x07_sandbox.cli.x07_front_client import FILE, PROTOCOL
from x07_sandbox.errors import HostError, SandboxError
from x07_sandbox.host.linux import of_process, open_pidfd, peer_of
from x07_sandbox.host.sockets import is_own, listening, received
from x07_sandbox.host.waiting import Event, input_poll, wait_readable
from x07_sandbox.policy.outcomes import SIGNAL_BASE

_ENTRIES: Final = MappingProxyType({b"main": "x07_sandbox.cli.main", b"os_runner": "x07_sandbox.cli.os_runner"})
# What these import is what most commands need.
_USED: Final = (
    *("cli.main", "cli.run", "cli.sandbox", "cli.os_runner", "cli.outputs", "cli.messages", "cli.json_output"),
    *("backends.qemu.backend", "backends.qemu.hot", "backends.process", "backends.lease", "backends.registry"),
    *("library.held", "library.listing", "sessions.sandbox", "sessions.host_files", "sessions.saved_changes"),
    *("programs.project", "jail.seccomp", "images.store"),
)
_WORKERS_MAX: Final = 512
_ANSWER_S: Final = 5.0
_NO_FDS_S: Final = 0.2
_REQUEST_MAX: Final = 16 << 20
_FDS_MAX: Final = 253  # of a message: unix(7)
_FD_MAX: Final = 512  # numbers of a client's descriptors are below
_RIGHTS: Final = (
    *(b"Uid:", b"Gid:", b"Groups:", b"CapInh:", b"CapPrm:", b"CapEff:", b"CapBnd:", b"CapAmb:"),
    *(b"NoNewPrivs:", b"Seccomp:", b"Seccomp_filters:"),
)
_FILTERS: Final = (b"Seccomp:", b"Seccomp_filters:")
_LIMITS: Final = range(16)  # asm-generic/resource.h: RLIM_NLIMITS
_PEERPIDFD: Final = 77  # asm-generic/socket.h: SO_PEERPIDFD, since Linux 6.5
_JOIN_SESSION_KEYRING: Final = 1  # keyctl(2)
_KEYCTL: Final = {"x86_64": 250, "aarch64": 219}


_State = tuple[int, int, int, int]


class _Ours(NamedTuple):
    """What a client is compared with: the state of each loaded file, and `_rights`."""

    files: list[tuple[str, _State]]
    rights: list[object]


class _DeclinedError(Exception):
    """The client has to carry the command out itself."""


class _Request(NamedTuple):
    """fds: the descriptors that were received, by their numbers in the client."""

    entry: str
    errors: str
    args: list[str]
    variables: dict[bytes, bytes]
    fds: dict[int, int]
    folder_fd: int


# the front


def serve(listener: socket.socket, end_fd: int) -> None:
    """Fork a worker for each connection, until *end_fd* is readable."""
    ours = _Ours(_loaded_files(), _rights(os.getpid()))
    ended, workers = Event(), 0
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended.set_by_signals()
    listener.settimeout(0)
    poll = input_poll(end_fd, ended.fd, listener.fileno())
    gc.freeze()  # workers share what is imported
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if end_fd in ready:
            return
        ended.clear()
        with contextlib.suppress(ChildProcessError):
            while workers and os.waitpid(-1, os.WNOHANG)[0]:
                workers -= 1
        if listener.fileno() not in ready:
            continue
        try:
            connection, _ = listener.accept()
            with connection:
                if workers >= _WORKERS_MAX or not is_own(connection):
                    continue
                if os.fork() == 0:
                    signal.set_wakeup_fd(-1)
                    ended.close()
                    listener.close()
                    _work(connection, ours)
                workers += 1
        except BlockingIOError:  # the client is gone
            pass
        except OSError:  # out of descriptors or processes until a worker ends
            wait_readable(end_fd, _NO_FDS_S)


def _loaded_files() -> list[tuple[str, _State]]:
    """Return path and state of each imported file of ours, and of msgspec."""
    names = [module.__file__ for name, module in sys.modules.items() if name.startswith(("x07_sandbox", "msgspec"))]
    return [(name, _state(name)) for name in names if name is not None]


def _state(path: str) -> _State:
    info = os.stat(path)  # noqa: PTH116 - hundreds of them for each command
    return info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_size


def _work(connection: socket.socket, ours: _Ours) -> NoReturn:
    """Carry out the command of a client. This process has no other purpose, and ends."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Out of the way of the client's descriptors.
        connection = socket.socket(fileno=fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, _FD_MAX))
        connection.settimeout(_ANSWER_S)
        request = _accepted(connection, ours)
        _become(request)
        _commit(connection)
    except (_DeclinedError, SandboxError, OSError, ValueError, LookupError):
        os._exit(0)  # which closes the connection
    except BaseException:  # noqa: BLE001 - a bug
        traceback.print_exc()
        os._exit(1)
    _carry_out(request, connection)


# the worker, before the command starts


def _accepted(connection: socket.socket, ours: _Ours) -> _Request:
    """Return the request of a client with our rights. Raises _DeclinedError, OSError, ValueError, LookupError."""
    pid, pidfd = _peer(connection)
    name = FILE + os.urandom(16).hex()
    own_fd = os.memfd_create(name)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    connection.send(b".")
    data, fds, sender = received(connection, len(name), _FDS_MAX)
    if (data, fds, sender) != (name.encode(), [], pid):
        raise _DeclinedError
    os.close(own_fd)
    connection.send(_file_of(pid).encode())
    request = _request(connection)
    if any(_state(path) != state for path, state in ours.files):
        raise _DeclinedError
    if _rights(pid) != ours.rights or _lines(pid, _FILTERS) != _lines(1, _FILTERS):
        raise _DeclinedError
    _take_over(pid)
    _join_group(pid)
    if wait_readable(pidfd, 0):
        raise _DeclinedError
    os.close(pidfd)
    return request


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the pid of the process that has connected, and a pidfd: of that process, if the kernel knows it."""
    pid, _ = peer_of(connection)
    try:
        return pid, connection.getsockopt(socket.SOL_SOCKET, _PEERPIDFD)
    except OSError as exc:
        if exc.errno != errno.ENOPROTOOPT:  # the process has ended
            raise
    return pid, open_pidfd(pid)


def _file_of(pid: int) -> str:
    """Return the name of the memory file of a process. Raises OSError if this process may not inspect that one."""
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]  # noqa: PTH115 - no paths
    for link in links:
        if (name := link.removeprefix("/memfd:").partition(" ")[0]).startswith(FILE):
            return name
    raise _DeclinedError


def _request(connection: socket.socket) -> _Request:
    """Receive a request. Raises _DeclinedError, OSError, ValueError, LookupError."""
    data, fds, _ = received(connection, 1 << 16, _FDS_MAX)
    size = int.from_bytes(data[:4], "big")
    found = bytearray(data[4:])
    deadline = time.monotonic() + _ANSWER_S
    while len(found) < size <= _REQUEST_MAX and time.monotonic() < deadline and (data := connection.recv(1 << 20)):
        found += data
    protocol, python, entry, errors, numbers, count, *words = bytes(found).split(b"\0")[:-1]
    targets = [int(number) for number in numbers.split()]
    if len(found) != size or protocol != PROTOCOL or python != os.fsencode(sys.executable):
        raise _DeclinedError
    if len(fds) != len(targets) + 1 or not {*targets} <= {*range(_FD_MAX)}:
        raise _DeclinedError
    args, variables = words[: int(count)], words[int(count) :]
    pairs = (variable.partition(b"=") for variable in variables)
    environment = {name: value for name, _, value in pairs}
    *streams, folder_fd = fds
    given = dict(zip(targets, streams, strict=True))
    return _Request(
        _ENTRIES[entry], errors.decode("ascii"), list(map(os.fsdecode, args)), environment, given, folder_fd
    )


def _rights(pid: int) -> list[object]:
    """Return what a process may do and where, as far as the kernel shows it. Raises OSError, HostError."""
    place = Path(f"/proc/{pid}")
    top = (place / "root").stat()
    found: list[object] = [_lines(pid, _RIGHTS), top.st_dev, top.st_ino, os.sched_getscheduler(pid)]
    found += [(path.name, path.readlink()) for path in sorted((place / "ns").iterdir())]
    found += [of_process(pid, name) for name in ("personality", "oom_score_adj", "loginuid")]
    try:
        found.append(of_process(pid, "attr/current"))
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # the kernel's answer if no security module has labels
            raise
    return found


def _lines(pid: int, names: Sequence[bytes]) -> list[bytes]:
    status = of_process(pid, "status")
    if status is None:
        raise _DeclinedError
    return [line for line in status.splitlines() if line.startswith(tuple(names))]


def _take_over(pid: int) -> None:
    """Get the limits, priority, processors, signal dispositions and umask of the client. Raises OSError, ValueError."""
    for which in _LIMITS:
        limit = resource.prlimit(pid, which)
        if limit != resource.getrlimit(which):
            resource.setrlimit(which, limit)
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, pid))
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    status = (of_process(pid, "status") or b"").decode("ascii", "replace")
    fields = dict(re.findall(r"^(SigIgn|SigBlk|Umask):\t([0-9a-f]+)$", status, re.MULTILINE))
    ignores, blocks = int(fields["SigIgn"], 16), int(fields["SigBlk"], 16)
    os.umask(int(fields["Umask"], 8))
    for number in signal.valid_signals():
        ignored = bool(ignores >> (number - 1) & 1)
        if ignored != (signal.getsignal(number) is signal.SIG_IGN):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL  # as in Python
            signal.signal(number, signal.SIG_IGN if ignored else default)
    blocked = {number for number in signal.valid_signals() if blocks >> (number - 1) & 1}
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _join_group(pid: int) -> None:
    """Move into the control group of a process, with its limits. Raises _DeclinedError if that is not possible."""
    theirs, place = of_process(pid, "cgroup"), "/sys/fs/cgroup"
    if theirs == of_process(os.getpid(), "cgroup"):
        return
    if theirs is None or not theirs.startswith(b"0::/") or theirs.count(b"\n") != 1:
        raise _DeclinedError
    Path(f"{place}{os.fsdecode(theirs[3:-1])}/cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    if theirs != of_process(os.getpid(), "cgroup"):
        raise _DeclinedError


def _become(request: _Request) -> None:
    """Get the folder, descriptors, variables and standard streams of the client. Raises OSError."""
    os.fchdir(request.folder_fd)
    os.close(request.folder_fd)
    high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FD_MAX) for number, fd in request.fds.items()}
    for fd in {0, 1, 2, *request.fds.values()}:
        os.close(fd)
    for number, fd in high.items():
        os.dup2(fd, number)
        os.close(fd)
    os.environb.clear()
    os.environb.update(request.variables)
    time.tzset()
    sys.argv = [sys.argv[0], *request.args]
    modes = {"stdin": ("r", "strict"), "stdout": ("w", request.errors), "stderr": ("w", "backslashreplace")}
    for number, (name, (mode, errors)) in enumerate(modes.items()):
        stream = None  # as in Python itself
        if number in request.fds:
            live = number == 2 or os.isatty(number)  # noqa: PLR2004 - standard error
            stream = open(number, mode, 1 if live else -1, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _commit(connection: socket.socket) -> None:
    """Ask the client whether to start, and be killed from now on when it ends. Raises _DeclinedError, OSError."""
    connection.send(b".")
    if connection.recv(1) != b".":
        raise _DeclinedError
    # The client sends nothing more, so the next event is its end. No thread has to wait for it.
    fd = connection.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | fcntl.FASYNC)
    if wait_readable(fd, 0):
        raise _DeclinedError
    connection.send(b".")


# the worker, with the command


def _carry_out(request: _Request, connection: socket.socket) -> NoReturn:
    """Carry out the command, send its exit code, and end."""

    def tell(code: int) -> None:
        with contextlib.suppress(OSError):
            connection.send(bytes([code & 0xFF]))

    command_line.on_exit = tell
    try:
        importlib.import_module(request.entry).entry()
    except KeyboardInterrupt:  # before the command handles it
        command_line.exit_with(SIGNAL_BASE + signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
    command_line.exit_with(1)


def _leave_keyring() -> None:
    """Get a new session keyring, since nothing shows that of a client: see keyctl(2). Commands find no keys there."""
    import ctypes

    if (number := _KEYCTL.get(os.uname().machine)) is None or os.sysconf("SC_LONG_BIT") < 64:  # noqa: PLR2004 - bits
        raise HostError(
            "cannot start the front", "its session keyring cannot be replaced here", "Run commands without it"
        )
    ctypes.CDLL(None).syscall(number, _JOIN_SESSION_KEYRING, None)  # fails only where there are no keyrings


def main(words: list[str]) -> int:
    """Serve until standard input ends. READY_FD gets a byte once clients can connect. Raises HostError."""
    ready_fd = int(words[0])
    os.chdir("/")
    _leave_keyring()
    for name in _USED:
        importlib.import_module(f"x07_sandbox.{name}")
    (pool_dir() / FRONT).unlink(missing_ok=True)
    with listening(pool_dir(), FRONT) as listener:
        os.write(ready_fd, b".")
        os.close(ready_fd)
        serve(listener, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
