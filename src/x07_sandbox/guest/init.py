"""Init of the program's namespaces: it builds what the program sees, starts the program, reaps processes and reports.

The program is not PID 1, which the kernel protects from its own signals. The program cannot access the report pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import marshal
import os
import signal
import struct
from typing import NamedTuple, NoReturn

from x07_sandbox.guest import confine, interpreter, restrict
from x07_sandbox.guest.system import children_of, close_descriptors_except, read_all

READY = b"R"  # the program's process waits for its start; or init has applied the settings
EXITED = b"X"  # then u32: the wait status of waitpid(2)
EXITED_SIZE = 5
FAILED = b"F"  # then JSON

_STATUS = struct.Struct(">I")


class Pipes(NamedTuple):
    """The pipe ends of init and of the program's process. The agent has the other ends.

    streams: the program's standard streams. start_fd: the start message. status_fd: READY, then a failure message;
    execve closes it. settings_fd: job settings for init. report_fd: init's reports.
    """

    streams: tuple[int, int, int]
    start_fd: int
    status_fd: int
    settings_fd: int
    report_fd: int

    def of_program(self) -> tuple[int, ...]:
        """Return the descriptors of the program's process."""
        return (*self.streams, self.start_fd, self.status_fd)


def run_init(world: confine.World, pipes: Pipes, confinement: confine.Confinement) -> NoReturn:
    """Run as init. Never returns."""
    try:
        os.setsid()
        own = pipes.settings_fd, pipes.report_fd, world.netns_fd
        close_descriptors_except(*pipes.of_program(), *own, *world.procs_fds)
        confine.apply(confinement.world, world)
        program = os.fork()
        if program == 0:
            for fd in (pipes.report_fd, pipes.settings_fd):
                os.close(fd)
            _become(world, pipes, confinement)
        for fd in {*pipes.of_program(), *world.procs_fds}:
            os.close(fd)
        if not world.group_kills:
            _kill_on_sigterm(program)
        _apply_settings(world, pipes, confinement)
        status = _wait_for_program(program, namespace=world.namespaces)
        os.write(pipes.report_fd, EXITED + _STATUS.pack(status))
        # Stay: destroying the namespaces takes longer than a small program.
        while True:
            signal.pause()
    except confine.StepError as exc:
        _report_failure(pipes.report_fd, *exc.args)
    except OSError as exc:
        _report_failure(pipes.report_fd, "start", exc.errno or 0, str(exc))
    finally:
        # When PID 1 ends, the kernel kills all processes of the namespace.
        os._exit(0)


def _apply_settings(world: confine.World, pipes: Pipes, confinement: confine.Confinement) -> None:
    """Apply job settings until the pipe ends. Confirm each with READY."""
    before: confine.JobSettings | None = None
    data = b""
    while chunk := os.read(pipes.settings_fd, 65536):
        data += chunk
        try:
            settings = confine.JobSettings(*marshal.loads(data))  # noqa: S302 - from our agent
        except EOFError:  # incomplete
            continue
        data = b""
        confine.apply(confinement.job, settings, before)
        if before is None and world.preload is not None:
            confine.forget_interpreter()
        before = settings
        os.write(pipes.report_fd, READY)
    os.close(pipes.settings_fd)


def _kill_on_sigterm(program: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would raise an exception here

    def kill(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)


def _wait_for_program(program: int, *, namespace: bool) -> int:
    """Wait for the program, then kill and reap the processes that it left. Return the program's wait status.

    namespace: whether this process is PID 1 of a namespace. If not, this process is a subreaper (prctl(2)).
    """
    while True:
        pid, status = os.wait()
        if pid == program:
            break
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        if namespace:
            # All of this namespace but us. None can fork with that signal pending, and orphans become our children.
            os.kill(-1, signal.SIGKILL)
        while True:
            if not namespace:
                for child in children_of(os.getpid()):  # their ids stay valid until we reap them
                    os.kill(child, signal.SIGKILL)
            os.wait()
    return status


def _become(world: confine.World, pipes: Pipes, confinement: confine.Confinement) -> NoReturn:
    """Drop all rights, wait for the start message and execute the program."""
    start_fd, status_fd = pipes.start_fd, pipes.status_fd
    try:
        try:
            os.setsid()
            high = [os.dup(fd) for fd in pipes.streams]  # copies that no dup2 below overwrites
            for target, fd in enumerate(high):
                os.dup2(fd, target)
            confine.apply(confinement.rights, world)
            os.umask(0o022)
            if world.preload is not None:
                # Move both out of the way first, so that neither dup2 overwrites the other.
                start_fd, status_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (start_fd, status_fd))
                os.dup2(start_fd, interpreter.START_FD)
                os.dup2(status_fd, interpreter.STATUS_FD)
                os.execve(interpreter.PYTHON, interpreter.ARGV, interpreter.ENV)
            restrict_self, execute = restrict.exec_functions()
            os.write(status_fd, READY)
            start = marshal.loads(read_all(start_fd))  # noqa: S302 - from our agent
            _, argv, env, cwd, filter_code, rules_fd, token = start
            os.chdir(cwd)
            if filter_code or rules_fd >= 0:
                restrict_self(filter_code, rules_fd)
            try:
                execute(argv, env, token)
            except OSError as exc:
                status = f"{exc.errno or 0} {exc}"  # only execve reports its errno
        except confine.StepError as exc:
            status = f"0 {exc.args[0]}: {exc.args[2]}"
        except (OSError, ValueError) as exc:
            status = f"0 {exc}"
        os.write(status_fd, status.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)


def _report_failure(report_fd: int, stage: str, number: int, message: str) -> None:
    text = json.dumps({"stage": stage[:64], "errno": number, "message": message[:1000]})
    os.write(report_fd, FAILED + text.encode())
