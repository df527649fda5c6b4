"""What x07 removes by itself: before a run, jobs of dead x07 processes; after a run, records that exceed the limits.

Usually nothing is to be removed. So this module has few imports.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.host.paths import cache_dir, state_dir
from x07_sandbox.host.waiting import unix_ms
from x07_sandbox.records.runs import JOB_NAME, RETENTION, runs_dir, unfinished_jobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from x07_sandbox.backends.base import MachineSource
    from x07_sandbox.sessions.request import RunCaller, RunRequest
    from x07_sandbox.sessions.result import Result

# If there is nothing to remove, the sweep costs one folder listing and a few stat(2).
_BUDGET_S: Final = 0.2
_NEWEST: Final = 512  # bounds the cost of a start
_RECENT_MS: Final = 3_600_000
_SHARE: Final = 20  # sweeps take at most 1/20 of the time of a process with many jobs
_EVERY_MS: Final = 3_600_000  # the time between removals of records

_not_before = 0.0  # on the monotonic clock


def carry_out(
    request: RunRequest, caller: RunCaller, say: Callable[[str], None] = lambda _text: None
) -> tuple[Result, SandboxError | None]:
    """Remove jobs of killed x07 processes, then carry out one run. Return its result, and the error that caused it.

    say: called with a message about removed jobs.
    """
    from x07_sandbox.sessions.run import attempt

    sweep_before_start(say)
    return attempt(request, caller)


def pool_machines() -> MachineSource | None:
    """Return the VMs of `x07 pool`, or None if this user has no pool."""
    if not os.path.lexists(cache_dir() / "pool" / "socket"):
        return None
    from x07_sandbox.backends.lease import PoolClient  # few users have one

    return PoolClient()


def sweep_before_start(say: Callable[[str], None] = lambda _text: None) -> None:
    """Remove jobs of dead x07 processes, within 0.2 s. Errors are ignored. say: called with a line after a removal."""
    global _not_before  # noqa: PLW0603 - one time per process
    started_at = time.monotonic()
    if started_at < _not_before:
        return
    with contextlib.suppress(SandboxError, OSError):
        if any(not _surely_lives(name) for name in unfinished_jobs(state_dir(), _NEWEST)):
            from x07_sandbox.backends.registry import find
            from x07_sandbox.records.pruning import Pruner
            from x07_sandbox.records.sweep import sweep_jobs

            pruner = Pruner(say, dry_run=False)
            sweep_jobs(pruner, find, _BUDGET_S)
            if count := len(pruner.removed):
                say(f"removed {count} job{'' if count == 1 else 's'} of dead x07 processes")
    now = time.monotonic()
    _not_before = now + _SHARE * (now - started_at)


def _surely_lives(name: str) -> bool:
    """Whether a job is young and the pid in its name is in use. Then the job's record need not be read."""
    match = JOB_NAME.fullmatch(name)
    return match is not None and unix_ms() - int(match[2]) < _RECENT_MS and os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110


def retain_records(say: Callable[[str], None] = lambda _text: None) -> None:
    """After a run, and at most once an hour, remove records of runs that exceed the limits. Errors are ignored.

    say: called with a line the first time that something is removed.
    """
    with contextlib.suppress(SandboxError, OSError):
        mark = runs_dir(state_dir()) / RETENTION
        if os.path.lexists(mark) and abs(unix_ms() - mark.lstat().st_mtime_ns // 1_000_000) < _EVERY_MS:
            return
        from x07_sandbox.records.pruning import remove_excess

        remove_excess(mark, say)
