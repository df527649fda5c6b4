"""PID 1 of the program's namespaces: builds its world, starts it, reaps, and reports its true wait status.

The program is not PID 1 itself, since the kernel spares that from signals that it sends itself. Reports go over a pipe
that the program never has: one byte of kind, then a fixed or counted rest.
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

READY = b"R"  # from the program's process: it waits for its start; from init: the orders are carried out
EXITED = b"X"  # then u32: the wait status as waitpid(2) gives it
EXITED_SIZE = 5
FAILED = b"F"  # then JSON

_STATUS = struct.Struct(">I")


class Ends(NamedTuple):
    """Descriptors of init and of the program's process; the agent has the other ends.

    streams: the program's standard streams. start_fd: what it is to become. status_fd: gets READY, then a failure, or is
    closed by success. settings_fd: where init reads what of the world depends on the job. report_fd: what init says.
    """

    streams: tuple[int, int, int]
    start_fd: int
    status_fd: int
    settings_fd: int
    report_fd: int

    def of_program(self) -> tuple[int, ...]:
        """Those that only the program's process keeps."""
        return (*self.streams, self.start_fd, self.status_fd)


def run_init(world: confine.World, ends: Ends, confinement: confine.Confinement) -> NoReturn:
    """Be the init of a program whose orders come later. Never returns."""
    try:
        os.setsid()
        close_descriptors_except(*ends.of_program(), ends.settings_fd, ends.report_fd, world.netns_fd, *world.procs_fds)
        confine.apply(confinement.world, world)
        program = os.fork()
        if program == 0:
            for fd in (ends.report_fd, ends.settings_fd):
                os.close(fd)
            _become(world, ends, confinement)
        for fd in {*ends.of_program(), *world.procs_fds}:
            os.close(fd)
        if not world.group_kills:
            _end_when_asked(program)
        _obey(world, ends, confinement)
        status = _last_of(program, namespace=world.namespaces)
        os.write(ends.report_fd, EXITED + _STATUS.pack(status))
        # Its end would take the namespaces apart, which takes longer than a small program.
        while True:
            signal.pause()
    except confine.StepError as exc:
        _report_failure(ends.report_fd, *exc.args)
    except OSError as exc:
        _report_failure(ends.report_fd, "start", exc.errno or 0, str(exc))
    finally:
        # The end of PID 1 ends, by the kernel's own hand, whatever of the program is there.
        os._exit(0)


def _obey(world: confine.World, ends: Ends, confinement: confine.Confinement) -> None:
    """Carry out settings, each of which is answered before the next one comes, until their end."""
    before: confine.JobSettings | None = None
    told = b""
    while chunk := os.read(ends.settings_fd, 65536):
        told += chunk
        try:
            settings = confine.JobSettings(*marshal.loads(told))  # noqa: S302 - it is our agent that speaks
        except EOFError:  # not all of it yet
            continue
        told = b""
        confine.apply(confinement.job, settings, before)
        if before is None and world.interpreter:
            confine.forget_interpreter()
        before = settings
        os.write(ends.report_fd, READY)
    os.close(ends.settings_fd)


def _end_when_asked(program: int) -> None:
    """Kill the program when SIGTERM comes: from the agent, or from the program, where both are one user."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would raise an exception in here

    def kill(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)


def _last_of(program: int, *, namespace: bool) -> int:
    """Wait for the program's end, then end whatever it has left running; its wait status.

    namespace: whether this process is the first of a pid namespace; else it is a subreaper (prctl(2)).
    """
    while True:
        pid, status = os.wait()
        if pid == program:
            break
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        if namespace:
            # All of this namespace but us; none can fork with that signal pending, and orphans are our children.
            os.kill(-1, signal.SIGKILL)
        while True:
            if not namespace:
                for child in children_of(os.getpid()):  # ours until we wait for them
                    os.kill(child, signal.SIGKILL)
            os.wait()
    return status


def _become(world: confine.World, ends: Ends, confinement: confine.Confinement) -> NoReturn:
    """Give up all rights, wait for the start, turn this process into the program."""
    start_fd, status_fd = ends.start_fd, ends.status_fd
    try:
        try:
            os.setsid()
            high = [os.dup(fd) for fd in ends.streams]  # so that no dup2 below can overwrite one that is still needed
            for target, fd in enumerate(high):
                os.dup2(fd, target)
            confine.apply(confinement.rights, world)
            os.umask(0o022)
            if world.interpreter:
                # By way of high numbers, so that neither is put where the other one is.
                start_fd, status_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (start_fd, status_fd))
                os.dup2(start_fd, interpreter.START_FD)
                os.dup2(status_fd, interpreter.STATUS_FD)
                os.execve(interpreter.PYTHON, interpreter.ARGV, interpreter.ENV)
            restrict_self, execute = restrict.exec_functions()
            os.write(status_fd, READY)
            # It is our agent that speaks.
            _, argv, env, cwd, filter_code, rules_fd, token = marshal.loads(read_all(start_fd))  # noqa: S302
            os.chdir(cwd)
            if filter_code or rules_fd >= 0:
                restrict_self(filter_code, rules_fd)
            try:
                execute(argv, env, token)
            except OSError as exc:
                told = f"{exc.errno or 0} {exc}"  # a number only here: it is the program that could not be executed
        except confine.StepError as exc:
            told = f"0 {exc.args[0]}: {exc.args[2]}"
        except (OSError, ValueError) as exc:
            told = f"0 {exc}"
        os.write(status_fd, told.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)


def _report_failure(report_fd: int, stage: str, number: int, message: str) -> None:
    text = json.dumps({"stage": stage[:64], "errno": number, "message": message[:1000]})
    os.write(report_fd, FAILED + text.encode())
