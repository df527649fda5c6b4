"""A process that was started before its command is known, so that the command need not wait for its start."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from x07_sandbox.channel.messages import ID_MAX, CommandLimits, Exec
from x07_sandbox.guest.errors import JobError

if TYPE_CHECKING:
    from x07_sandbox.guest.environment import Environment, Process


class Spare:
    """The process for the next command, which most often is a plain one with the limits of the last one.

    While it waits it is one of the programs' tasks. It has their user, so they can stop or kill it.
    add: starts a process for a command, which waits for its start message.
    """

    def __init__(self, environment: Environment, add: Callable[[Exec], Process]) -> None:
        self._environment = environment
        self._add = add
        self._process: Process | None = None
        self._limits: CommandLimits | None = None
        self._count = 0

    def __bool__(self) -> bool:
        """Whether a process waits."""
        return self._process is not None

    def prepare(self, limits: CommandLimits) -> None:
        """Start a process, unless commands have no control groups of their own here, or one waits already."""
        if self._process is None and self._environment.own_groups:
            self._count += 1
            self._limits = limits
            with contextlib.suppress(OSError, JobError):  # the next command then gets a process of its own
                self._process = self._add(Exec(ID_MAX + self._count, [], {}, "/", limits))

    def take(self, order: Exec) -> Process | None:
        """Return the process that waits, or None. If it does not fit *order*, end it, since it counts as a task."""
        process = self._process
        if process is None:
            return None
        if not order.is_plain or self._limits != order.limits:
            self.drop()
            return None
        self._process = None
        self._environment.signal(process, signal.SIGCONT)
        return process._replace(cpu_before_us=process.group.cpu_us(self._environment.init))

    def ended(self, key: int) -> None:
        """Note that init has reaped the process *key*: a program may have killed ours."""
        if self._process is not None and self._process.key == key:
            self.drop()

    def drop(self) -> None:
        """End the process, if one waits."""
        process, self._process = self._process, None
        if process is not None:
            self._environment.signal(process)
            for fd in (process.stdin_fd, process.stdout_fd, process.stderr_fd, process.start_fd, process.status_fd):
                os.close(fd)
            process.group.remove()
