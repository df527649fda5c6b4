"""PID 1 of the program's namespaces: builds its world, starts it, reaps, and reports its true wait status.

The program itself is never PID 1, because the kernel spares a namespace's PID 1 from signals that it sends itself.
Reports go over a pipe that the program never has: one byte of kind, then a fixed or counted rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import marshal
import os
import struct
from typing import NoReturn

from x07_sandbox.guest import confine, interpreter

READY = b"R"  # the program's process waits for its orders
STARTED = b"S"
EXITED = b"X"  # then u32: the wait status as waitpid(2) gives it
EXITED_SIZE = 5
FAILED = b"F"  # then JSON to the end of the pipe

_STATUS = struct.Struct(">I")


def run_init(
    world: confine.World, usual: confine.Orders | None, fds: tuple[int, int, int], orders_fd: int, report_fd: int
) -> NoReturn:
    """Be the init of a program whose orders come later; fds become its standard streams. Never returns.

    usual: orders that are likely; what they say is done beforehand.
    """
    try:
        os.setsid()
        _only_descriptors(*fds, orders_fd, report_fd, world.netns_fd, world.procs_fd)
        confine.apply(confine.WORLD, world)
        status = _supervise(world, usual, fds, orders_fd, report_fd)
        os.write(report_fd, EXITED + _STATUS.pack(status))
    except confine.StepError as exc:
        _report_failure(report_fd, exc.stage, exc.errno, str(exc.args[2]))
    except OSError as exc:
        _report_failure(report_fd, "start", exc.errno or 0, str(exc))
    finally:
        # The end of PID 1 ends, by the kernel's own hand, whatever the program has left running.
        os._exit(0)


def _supervise(
    world: confine.World, usual: confine.Orders | None, fds: tuple[int, int, int], orders_fd: int, report_fd: int
) -> int:
    """Start the program and return its wait status. Raises StepError if it could not become the program."""
    told_r, told_w = os.pipe2(os.O_CLOEXEC)
    start_r, start_w = os.pipe2(os.O_CLOEXEC)
    program = os.fork()
    if program == 0:
        for fd in (report_fd, orders_fd, start_w, told_r):
            os.close(fd)
        _become(world, fds, start_r, told_w)
    for fd in {*fds, world.procs_fd, told_w, start_r}:
        os.close(fd)
    told = os.read(told_r, 1)
    if told == READY:
        if usual is not None:
            confine.apply(confine.JOB, usual)
        if world.interpreter:
            confine.forget_interpreter()
        os.write(report_fd, READY)
        data = _read_all(orders_fd)
        orders = confine.Orders(**json.loads(data))
        confine.apply(confine.JOB, orders, usual)
        become = world.interpreter and interpreter.can_become(orders.argv, orders.env)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            _write_all(start_w, marshal.dumps((become, orders.argv, orders.env, orders.cwd)))
        os.close(start_w)
        told = b""
    told += _read_all(told_r)
    if told:
        raise _told(told)
    os.write(report_fd, STARTED)
    while True:
        pid, status = os.wait()
        if pid == program:
            return status


def _become(world: confine.World, fds: tuple[int, int, int], start_fd: int, told_fd: int) -> NoReturn:
    """Give up all rights, wait for the orders, turn this process into the program.

    told_fd: gets READY, then a failure, which a success closes.
    """
    try:
        try:
            os.setsid()
            high = [os.dup(fd) for fd in fds]  # so that no dup2 below can overwrite one that is still needed
            for target, fd in enumerate(high):
                os.dup2(fd, target)
            confine.apply(confine.RIGHTS, world)
            os.umask(0o022)
            if world.interpreter:
                # By way of high numbers, so that neither is put where the other one is.
                start_fd, told_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (start_fd, told_fd))
                os.dup2(start_fd, interpreter.START_FD)
                os.dup2(told_fd, interpreter.TOLD_FD)
                os.execve(interpreter.PYTHON, interpreter.argv(), interpreter.env())
            os.write(told_fd, READY)
            _, argv, env, cwd = marshal.loads(_read_all(start_fd))  # noqa: S302 - it is our init that speaks
            os.chdir(cwd)
            # Not os.execvpe: it imports a module on its way, which a policy that allows no descriptor forbids.
            os.execve(argv[0], argv, env)
        except confine.StepError as exc:
            told = f"{exc.errno} {exc.stage}: {exc.args[2]}"
        except OSError as exc:
            told = f"{exc.errno or 0} {exc}"
        os.write(told_fd, told.encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)


def _told(text: bytes) -> confine.StepError:
    """What the program's process says when it could not become the program: a number, and words."""
    number, _, message = text.decode("utf-8", "replace").partition(" ")
    return confine.StepError("exec", int(number) if number.isdigit() else 0, message)


def _only_descriptors(*keep: int) -> None:
    """Close every descriptor but those: the agent's channel above all."""
    null = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1, 2):
        if target not in keep:
            os.dup2(null, target)
    kept = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself


def _report_failure(report_fd: int, stage: str, number: int, message: str) -> None:
    text = json.dumps({"stage": stage[:64], "errno": number, "message": message[:1000]})
    os.write(report_fd, FAILED + text.encode())


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, 4096):
        chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
