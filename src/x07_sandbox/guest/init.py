"""Init of the program's namespaces: it builds what programs see, starts them, reaps processes and reports.

No program is PID 1, because the kernel ignores signals that PID 1 sends to itself, such as that of abort(3). No program
can reach the socket or the pipe to the agent.

Messages to init go over a socket, which carries descriptors. Those from init go over a pipe, since a fresh clone has
executed the kernel's code for pipes anyway. A message is a length and a tuple encoded with marshal, which is safe
because both ends are our own code. To init:

    settings, VALUES      apply settings; answered with ready
    command, KEY, PROGRAM, LIMITS, SERVICE, TERMINAL, PYTHON
                          start one more process, which waits for its start message; with its descriptors
    last, KEY             kill all other processes once that command has ended; None for no command. Initially, it is
                          the first process, which waits from the start
    signal, KEY, NUMBER   send a signal to a command; SIGKILL goes to its descendants too
    end                   kill all processes; answered with ready

From init:

    ready
    failed, STAGE, ERRNO, MESSAGE
    exited, KEY, WAIT_STATUS, IS_LAST
                          a command has ended; with IS_LAST, all other processes have been killed
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import resource
import select
import signal
import socket
import struct
import termios
from typing import Any, Final, NamedTuple, NoReturn

from x07_sandbox import kernel
from x07_sandbox.guest import cgroup, confine, execution, interpreter, services, waiting
from x07_sandbox.guest.system import children_of, close_descriptors_except, read_all, write_all

CONFINED = b"R"  # status of the waiting process
_FDS_MAX = 4096  # above the number of each descriptor of init and of the waiting process
FIRST = 0  # the key of the process that waits from the start; later ones have the ids of their commands

SETTINGS: Final = "settings"
COMMAND: Final = "command"
LAST: Final = "last"
SIGNAL: Final = "signal"
END: Final = "end"
READY: Final = "ready"
FAILED: Final = "failed"
EXITED: Final = "exited"

_LENGTH: Final = struct.Struct("=I")
_FD: Final = struct.Struct("=i")
_SENT_FDS_MAX: Final = 16


def send(fd: int, message: tuple[Any, ...]) -> None:
    """Send a message. Raises OSError."""
    data = marshal.dumps(message)
    write_all(fd, _LENGTH.pack(len(data)) + data)


def send_fds(sock: socket.socket, message: tuple[Any, ...], fds: tuple[int, ...]) -> None:
    """Send a message with descriptors. Raises OSError."""
    data = marshal.dumps(message)
    data = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(sock, [data], fds)
    write_all(sock.fileno(), data[sent:])


def receive(fd: int, head: bytes = b"") -> tuple[Any, ...] | None:
    """Wait for a message, and return it; None if the other side has ended.

    head: the bytes of it that were read already.
    """
    head += _read(fd, _LENGTH.size - len(head))
    if len(head) < _LENGTH.size:
        return None
    message: tuple[Any, ...] = marshal.loads(_read(fd, _LENGTH.unpack(head)[0]))  # noqa: S302 - from our own process
    return message


def receive_fds(sock: socket.socket) -> tuple[tuple[Any, ...] | None, list[int]]:
    """Wait for a message and its descriptors. The message is None if the other side has ended."""
    # Not socket.recv_fds, which ignores its flags and so MSG_CMSG_CLOEXEC.
    room = socket.CMSG_SPACE(_SENT_FDS_MAX * _FD.size)
    head, rights, _, _ = sock.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
    fds = [number for _, _, data in rights for (number,) in _FD.iter_unpack(data)]
    return receive(sock.fileno(), head) if head else None, fds


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := os.read(fd, size - len(data))):
        data += more
    return data


class Pipes(NamedTuple):
    """The pipe ends of a command's process. The agent has the other ends.

    streams: its standard streams. start_fd: the start message. status_fd: CONFINED from the waiting process, then a
    failure message; execve closes it.
    """

    streams: tuple[int, int, int]
    start_fd: int
    status_fd: int

    def all(self) -> tuple[int, ...]:
        """Return all descriptors."""
        return (*self.streams, self.start_fd, self.status_fd)


def run_init(
    world: confine.World, pipes: Pipes, agent: socket.socket, report_fd: int, confinement: confine.Steps
) -> NoReturn:
    """Run as init. agent, report_fd: for messages from and to the agent. Never returns."""
    try:
        os.setsid()
        kept = agent.fileno(), report_fd, world.netns_fd, world.user_fd, *world.procs_fds
        close_descriptors_except(*pipes.all(), *kept)
        confine.apply(confinement.world, world)
        confine.own_signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # for `serve`; programs start with no signal blocked
        ours, theirs = socket.socketpair() if world.preload else (None, None)
        program = os.fork()
        if program == 0:
            agent.close()
            os.close(report_fd)
            if theirs is not None:
                os.dup2(theirs.fileno(), waiting.FORK_FD)
            _become(world, pipes, confinement, CONFINED)
        for fd in {*pipes.all(), *world.procs_fds}:
            os.close(fd)
        if theirs is not None:
            theirs.close()
        _Init(world, agent, report_fd, confinement, program, ours).serve()
    except confine.StepError as exc:
        send(report_fd, (FAILED, *exc.args))
    except OSError as exc:
        send(report_fd, (FAILED, "start", exc.errno or 0, str(exc)))
    finally:
        # When PID 1 ends, the kernel kills all processes of the namespace.
        os._exit(0)


class Start(NamedTuple):
    """How a later process starts. limits: (RLIMIT number, value). terminal: whether standard input is its terminal.

    python: whether it may be a copy of the waiting interpreter, with the modules that this one has imported.
    """

    limits: tuple[tuple[int, int], ...] = ()
    service: str = ""
    terminal: bool = False
    python: bool = False


_COPY_S: Final = 10.0  # for the interpreter to copy itself; under emulation that takes a tenth of a second
_FIRST_START = Start()


class _Init:
    """The loop of init, which serves the agent and reaps children.

    A signalfd reports that children have ended. A signal handler would be more code that a fresh clone runs for the
    first time.
    """

    def __init__(
        self,
        world: confine.World,
        agent: socket.socket,
        report_fd: int,
        confinement: confine.Steps,
        program: int,
        interpreter: socket.socket | None,
    ) -> None:
        self._interpreter = interpreter  # the waiting one, for requests to make copies of it
        self._world = world
        self._agent = agent
        self._report_fd = report_fd
        self._confinement = confinement
        self._settings: confine.JobSettings | None = None
        self._programs = {program: FIRST}  # keys by process id
        self._last: int | None = FIRST

    def serve(self) -> None:
        """Serve the agent until it ends. Raises StepError, OSError."""
        agent, ended = self._agent.fileno(), kernel.signal_fd(signal.SIGCHLD)
        poll = select.poll()
        poll.register(agent, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if agent in ready:  # first: the message may be LAST, about the command whose end `ended` reports
                if not self._take():
                    return
            else:
                os.read(ended, kernel.SIGNAL_BYTES)
                self._reap()

    def _take(self) -> bool:
        """Take a message of the agent. Return False if the agent has ended."""
        message, fds = receive_fds(self._agent)
        if message is None:
            return False
        kind, *words = message
        if kind == SETTINGS:
            self._apply(confine.JobSettings(*words[0]))
        elif kind == COMMAND:
            self._start(words, fds)
        elif kind == LAST:
            self._last = words[0]
        elif kind == SIGNAL:
            self._signal(*words)
        elif kind == END:
            self._kill_rest()
            send(self._report_fd, (READY,))
        return True

    def _apply(self, settings: confine.JobSettings) -> None:
        confine.apply(self._confinement.job, settings, self._settings)
        if self._settings is None:
            if self._world.preload is not None:
                confine.forget_interpreter()
            own_user = self._world.namespaces and self._world.program_uid < 0
            # later processes join the first one's user namespace, since they may not create one
            for program in self._programs if own_user else ():
                self._world = self._world._replace(user_fd=os.open(f"/proc/{program}/ns/user", os.O_RDONLY))
        self._settings = settings
        send(self._report_fd, (READY,))

    def _start(self, words: list[Any], fds: list[int]) -> None:
        """Start a process for one more command, which waits for its start message."""
        key, program, *how = words
        *streams, start_fd, status_fd = fds[:5]
        pipes = Pipes((streams[0], streams[1], streams[2]), start_fd, status_fd)
        world = self._world._replace(procs_fds=tuple(fds[5:]), preload=None)
        if program:
            with contextlib.suppress(OSError):  # executing it will fail for the same reason
                execution.allow_program(program)
        started = Start(*how)
        try:
            pid = (self._copied(fds, started) if started.python else 0) or os.fork()
        except OSError as exc:  # the limit on tasks, where it holds for this process too
            os.write(status_fd, b"0\n%d %s" % (exc.errno or 0, str(exc).encode()))
        else:
            if pid == 0:
                self._agent.close()
                os.close(self._report_fd)
                _become(world, pipes, self._confinement, b"", started)
            self._programs[pid] = key
        for fd in fds:
            os.close(fd)

    def _copied(self, fds: list[int], started: Start) -> int:
        """Have the waiting interpreter make a copy of itself, and return its pid; 0 if that failed.

        Programs have the user of that interpreter, so they can stop, kill or change it. So its answer is checked, and
        after a failure it is not asked again.
        """
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is None:
            return 0
        try:
            interpreter.settimeout(_COPY_S)
            rights = b"".join(map(_FD.pack, fds[:5]))
            interpreter.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            pid = int(interpreter.recv(32))
            if pid in self._programs or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return 0
            for which, value in started.limits:
                resource.prlimit(pid, which, (value, value))
            for fd in fds[5:]:
                os.write(fd, b"%d" % pid)
        except (OSError, ValueError):  # it was killed or stopped, or the answer is no child of ours
            return 0
        self._interpreter = interpreter
        return pid

    def _signal(self, key: int, number: int) -> None:
        """Send a signal to a command that has not been reaped. SIGKILL goes to all processes of its tree."""
        for pid in [pid for pid, held in self._programs.items() if held == key]:
            tree = cgroup.stopped_tree(pid) if number == signal.SIGKILL else {pid}
            for one in tree:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, number)

    def _reap(self) -> None:
        """Reap all children that have ended, and report the commands among them."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._ended(*ended)
        except ChildProcessError:
            pass

    def _ended(self, pid: int, status: int) -> None:
        key = self._programs.pop(pid, None)
        if key is None:
            return
        if is_last := key == self._last:
            self._kill_rest()
        send(self._report_fd, (EXITED, key, status, is_last))

    def _kill_rest(self) -> None:
        """Kill and reap all other processes."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if self._world.namespaces:
                # All of this namespace but us. None can fork with that signal pending, and orphans become our children.
                os.kill(-1, signal.SIGKILL)
            while True:
                if not self._world.namespaces:
                    for child in children_of(os.getpid()):  # their ids stay valid until we reap them
                        os.kill(child, signal.SIGKILL)
                pid, status = os.wait()
                self._ended(pid, status)


def _become(
    world: confine.World, pipes: Pipes, confinement: confine.Steps, ready: bytes, how: Start = _FIRST_START
) -> NoReturn:
    """Drop all rights, wait for the start message, and execute the program or run a service of the agent."""
    start_fd, status_fd = pipes.start_fd, pipes.status_fd
    try:
        try:
            os.setsid()
            high = [os.dup(fd) for fd in pipes.streams]  # copies that no dup2 below overwrites
            for target, fd in enumerate(high):
                os.dup2(fd, target)
            if how.terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for which, value in how.limits:
                resource.setrlimit(which, (value, value))
            confine.apply(confinement.rights, world)
            os.umask(0o022)
            if world.preload is not None:
                # Move both out of the way first, so that neither dup2 overwrites the other.
                start_fd, status_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (start_fd, status_fd))
                os.dup2(start_fd, waiting.START_FD)
                os.dup2(status_fd, waiting.STATUS_FD)
                os.execve(interpreter.PYTHON, interpreter.ARGV, interpreter.ENV)
            os.write(status_fd, ready or b"%d\n" % os.getpid())
            start = marshal.loads(read_all(start_fd))  # noqa: S302 - from our agent
            _, argv, env, cwd, filter_code, rules_fd, token = start
            os.chdir(cwd)
            if filter_code or rules_fd >= 0:
                execution.restrict_self(filter_code, rules_fd)
            if how.service:
                os.closerange(3, _FDS_MAX)  # no link of a program may lead to them
                services.run(how.service, argv)
            try:
                kernel.execute(argv, env, token)
            except OSError as exc:
                status = f"{exc.errno or 0} {exc}"  # only execve reports its errno
        except confine.StepError as exc:
            status = f"0 {exc.args[0]}: {exc.args[2]}"
        except (OSError, ValueError) as exc:
            status = f"0 {exc}"
        os.write(status_fd, status.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)
