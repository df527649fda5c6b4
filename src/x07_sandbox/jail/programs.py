"""Running a program of this host on hostile data, such as git on objects that a guest sent, in the jail of the VMM.

Inside, the program sees its own libraries, read-only, and the folders that it gets. It has no network and no variables,
can start no process, and its time, memory and file sizes are limited.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, NamedTuple

from x07_sandbox.errors import HostError, printable
from x07_sandbox.host.arch import host_arch
from x07_sandbox.host.linux import memory_file
from x07_sandbox.host.processes import FdGroup, Launch, launch
from x07_sandbox.host.settings import GIB
from x07_sandbox.jail.bwrap import SETPRIV, Jail, jail_argv, may_nest
from x07_sandbox.jail.forms import jail_form, namespace_flags, needed_files
from x07_sandbox.jail.resources import lease_uid
from x07_sandbox.jail.seccomp import vmm_filter
from x07_sandbox.policy.outcomes import SIGNAL_BASE

_PRLIMIT: Final = "/usr/bin/prlimit"
_MEMORY: Final = 2 * GIB  # of address space; files that are mapped count
_FILES: Final = 256
_SAID_BYTES: Final = 1000
_SAID_LINES: Final = 3


class Folder(NamedTuple):
    """A folder for the program. fd: its descriptor. at: its path inside."""

    fd: int
    at: str
    write: bool = False


class Done(NamedTuple):
    """The end of a program. status: its exit status, or 128 plus a signal. said: the last lines of its errors."""

    status: int
    said: str

    @property
    def too_large(self) -> bool:
        """Whether it wrote more than it may."""
        return self.status == SIGNAL_BASE + signal.SIGXFSZ

    @property
    def timed_out(self) -> bool:
        """Whether it took longer than it may."""
        return self.status in {SIGNAL_BASE + signal.SIGALRM, SIGNAL_BASE + signal.SIGXCPU}


def run_jailed(
    argv: Sequence[str],
    folders: Sequence[Folder],
    *,
    stdin: bytes | int = b"",
    stdout_fd: int,
    most_bytes: int,
    timeout_s: int,
) -> Done:
    """Run *argv*, whose first word is an absolute path, and wait for its end.

    stdin: bytes, or a descriptor. stdout_fd: of a file. most_bytes: the limit of each file that the program writes.
    timeout_s: of time; CPU time has the same limit. Raises HostError if it cannot be started.
    """
    what = f"cannot run {argv[0]}"
    form = jail_form()
    if not form.namespaces:
        raise HostError(what, f"it needs a jail with namespaces; {form.why}", f"Allow them: {namespace_flags()}")
    with ExitStack() as stack:
        given = FdGroup()
        stack.callback(given.close)
        uid, lock_fd = stack.enter_context(lease_uid()) if os.geteuid() == 0 else (None, None)
        filter_fd, errors_fd = (given.add(memory_file(data)) for data in (vmm_filter(host_arch()), b""))
        stdin_fd = given.add(memory_file(stdin)) if isinstance(stdin, bytes) else stdin
        jail = Jail(
            files=tuple(dict.fromkeys([*needed_files(argv[0]), *(needed_files(SETPRIV) if uid is not None else ())])),
            fd_files=tuple((folder.fd, folder.at) for folder in folders if not folder.write),
            fd_writable=tuple((folder.fd, folder.at) for folder in folders if folder.write),
            devices=("/dev/null", "/dev/urandom"),
            uid=uid,
            mark=secrets.token_hex(8),
            deadline_s=timeout_s,
            runner_pid=os.getpid(),
            filter_fd=filter_fd,
            nest=may_nest(),
            lock_fd=lock_fd,
        )
        limits = {"cpu": timeout_s, "as": _MEMORY, "fsize": most_bytes, "nofile": _FILES, "core": 0}
        words = [_PRLIMIT, *(f"--{name}={most}" for name, most in limits.items()), "--"]
        passed = (filter_fd, *(folder.fd for folder in folders), *(() if lock_fd is None else (lock_fd,)))
        try:
            child = launch(
                Launch(
                    argv=[*words, *jail_argv(jail, list(argv), named=form.named)],
                    pass_fds=passed,
                    stderr_fd=errors_fd,
                    stdio_fd=stdin_fd,
                    stdout_fd=stdout_fd,
                )
            )
        except OSError as exc:
            raise HostError(what, f"{_PRLIMIT} cannot be started ({exc.strerror})", "Run x07 doctor") from exc
        return Done(_ended(child), _last_lines(errors_fd))


def _ended(child: subprocess.Popen[bytes]) -> int:
    """Wait for the supervisor of the jail, and return its exit status. An exception ends the jail."""
    try:
        status = child.wait()
    except BaseException:
        child.terminate()  # the supervisor then ends the jail
        child.wait()
        raise
    return status if status >= 0 else SIGNAL_BASE - status


def _last_lines(fd: int) -> str:
    size = os.fstat(fd).st_size
    text = os.pread(fd, _SAID_BYTES, max(0, size - _SAID_BYTES)).decode("utf-8", "replace")
    return printable("; ".join(text.strip().splitlines()[-_SAID_LINES:]))
