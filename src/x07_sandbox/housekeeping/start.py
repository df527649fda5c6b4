"""The small sweep before each run: what dead runners left goes before the next job starts, at next to no cost.

With nothing to do it is one listing of the state folder and one stat(2) for each of the newest jobs.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.paths import state_dir
from x07_sandbox.jobs.active import JOB_NAME, unfinished_jobs

if TYPE_CHECKING:
    from collections.abc import Callable

_BUDGET_S: Final = 0.2
_NEWEST: Final = 512  # so that a start costs no more where many thousands of records lie
_RECENT_MS: Final = 3_600_000
_SHARE: Final = 20  # of a process that starts many jobs it takes at most one part in so many

_not_before = 0.0  # on the monotonic clock


def sweep_before_start(say: Callable[[str], None] = lambda _text: None) -> None:
    """Remove what dead runners left, within a fifth of a second. No error of it keeps a run from starting.

    say: gets one line if anything was removed.
    """
    global _not_before  # noqa: PLW0603 - what it costs this process is known nowhere else
    begun = time.monotonic()
    if begun < _not_before:
        return
    with contextlib.suppress(SandboxError, OSError):
        if any(not _surely_lives(name) for name in unfinished_jobs(state_dir(), _NEWEST)):
            from x07_sandbox.housekeeping.sweep import sweep

            report = sweep(dry_run=False, progress=say, budget_s=_BUDGET_S)
            if count := len(report.removed):
                say(f"removed {count} job{'' if count == 1 else 's'} that dead runners left")
    now = time.monotonic()
    _not_before = now + _SHARE * (now - begun)


def _surely_lives(name: str) -> bool:
    """Whether a job is so young, and a process of its runner's number so alive, that it need not be looked at now.

    A hint that saves most runs the reading of records; `x07 sweep` reads them all.
    """
    match = JOB_NAME.fullmatch(name)
    return match is not None and unix_ms() - int(match[2]) < _RECENT_MS and os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110
