"""Processes identified by pid, start time and boot, since a pid alone is reused.

A mark is a random text that x07 puts into the arguments of a job's processes, to recognize them later.
"""

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final

import msgspec

from x07_sandbox.errors import HostError
from x07_sandbox.host.linux import of_process, open_pidfd, process_ids, send_signal
from x07_sandbox.host.paths import closing_fd
from x07_sandbox.host.poll import wait_readable

COMMAND_ENVIRONMENT: Final = MappingProxyType({"PATH": "/usr/bin:/bin", "LC_ALL": "C"})


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process of this boot. start_ticks: field 22 of proc(5) stat, in clock ticks since boot.

    Decoding checks both fields.
    """

    pid: Annotated[int, msgspec.Meta(ge=1, le=2**22)]
    start_ticks: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


def identify(pid: int) -> Identity | None:
    """Return the identity of a process, or None if no process has this pid."""
    fields = _stat_fields(pid)
    return None if fields is None else Identity(pid=pid, start_ticks=int(fields[19]))


def output_of(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] = COMMAND_ENVIRONMENT
) -> subprocess.CompletedProcess[bytes]:
    """Run a short command without input, and return its output and status. Raises OSError, TimeoutExpired."""
    no_input = subprocess.DEVNULL
    return subprocess.run(argv, stdin=no_input, capture_output=True, timeout=timeout_s, check=False, env=env, cwd="/")


def own_identity() -> Identity:
    """Return the identity of this process. Raises HostError if /proc does not show it."""
    found = identify(os.getpid())
    if found is None:
        raise HostError("cannot record the job", "/proc does not show this process", "Mount /proc here")
    return found


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the command name, which may contain any characters."""
    data = of_process(pid, "stat")
    return None if data is None else data.decode("utf-8", "replace").rpartition(")")[2].split()


def has_mark(pid: int, mark: str) -> bool:
    """Return whether *mark* is not empty and is in the arguments of a process. Only our launcher sets marks."""
    return bool(mark) and mark.encode() in (of_process(pid, "cmdline") or b"")


def processes_with_mark(mark: str) -> list[Identity]:
    """Return every other visible process that has *mark* in its arguments."""
    found = []
    for pid in process_ids():
        with contextlib.suppress(PermissionError):  # another user's, with hidepid
            if pid != os.getpid() and has_mark(pid, mark) and (identity := identify(pid)) is not None:
                found.append(identity)
    return found


def is_alive(identity: Identity) -> bool:
    """Return whether the process still exists and is not a zombie."""
    fields = _stat_fields(identity.pid)
    return fields is not None and int(fields[19]) == identity.start_ticks and fields[0] not in {"Z", "X"}


def kill_identity(identity: Identity, mark: str, number: int = signal.SIGKILL) -> bool:
    """Send signal *number* through a pidfd if pid, start time and mark match. Return whether the signal was sent."""
    with _pidfd(identity.pid) as pidfd:
        # Checked after the pidfd was opened, so that the pid cannot be reused in between.
        if pidfd is None or not is_alive(identity) or not has_mark(identity.pid, mark):
            return False
        send_signal(pidfd, number)
        return True


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Yield a pidfd, or None if the pid is unused or belongs to a thread."""
    try:
        pidfd = open_pidfd(pid)
    except OSError as exc:
        # EINVAL: older kernels, for a thread.
        if not (isinstance(exc, ProcessLookupError | FileNotFoundError) or exc.errno == errno.EINVAL):
            raise
        yield None
    else:
        with closing_fd(pidfd):
            yield pidfd


def wait_gone(identity: Identity, timeout_s: float) -> bool:
    """Wait at most *timeout_s* until a process has ended. Return whether it has ended."""
    with _pidfd(identity.pid) as pidfd:
        return pidfd is None or not is_alive(identity) or wait_readable(pidfd, timeout_s)
