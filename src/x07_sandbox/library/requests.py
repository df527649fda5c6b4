"""Make a request from the values of options, and carry it out; shared by `x07 run` and `run_program`."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.errors import SandboxError
from x07_sandbox.host.clocks import unix_ms
from x07_sandbox.host.paths import state_dir
from x07_sandbox.records.active import JOB_NAME, unfinished_jobs
from x07_sandbox.sessions.request import RunRequest
from x07_sandbox.sessions.run import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from x07_sandbox.options import Option
    from x07_sandbox.sessions.request import RunCaller
    from x07_sandbox.sessions.result import Result


# The sweep before each run. If there is nothing to remove, it costs one folder listing and a few stat(2).
_BUDGET_S: Final = 0.2
_NEWEST: Final = 512  # bounds the cost of a start
_RECENT_MS: Final = 3_600_000
_SHARE: Final = 20  # sweeps take at most 1/20 of the time of a process with many jobs

_not_before = 0.0  # on the monotonic clock


def make_request(given: Iterable[tuple[Option, Any]], **fields: Any) -> RunRequest:  # noqa: ANN401 - of many types
    """Return the request that *given* options describe. Values of None are ignored. fields: fields of the request."""
    limits: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    parts = {"limits": limits, "overrides": overrides}
    asked: dict[str, Any] = {}
    for row, value in given:
        if value is not None:
            part, _, field = row.sets.rpartition(".")
            parts.get(part, asked)[field] = _stored(row, value)
    if limits:
        from x07_sandbox.policy.limits import LimitChanges  # few requests change the policy

        asked["limits"] = LimitChanges(**limits)
    if any(overrides.values()):
        from x07_sandbox.policy.overrides import Overrides

        asked["overrides"] = Overrides(**overrides)
    return RunRequest(**(asked | fields))


def _stored(row: Option, value: Any) -> Any:  # noqa: ANN401 - as above
    """Return the value in the form of RunRequest: a tuple for a list, and milliseconds for seconds."""
    if row.kind == "seconds":
        return max(1, round(value * 1000))
    return tuple(value) if isinstance(value, list) else value


def carry_out(
    request: RunRequest, caller: RunCaller, say: Callable[[str], None] = lambda _text: None
) -> tuple[Result, SandboxError | None]:
    """Remove jobs of killed x07 processes, then carry out one run. Return its result, and the error that caused it.

    say: called with a message about removed jobs.
    """
    sweep_before_start(say)
    return attempt(request, caller)


def sweep_before_start(say: Callable[[str], None] = lambda _text: None) -> None:
    """Remove jobs of dead x07 processes, within 0.2 s. Errors are ignored. say: called with a line after a removal."""
    global _not_before  # noqa: PLW0603 - one time per process
    started_at = time.monotonic()
    if started_at < _not_before:
        return
    with contextlib.suppress(SandboxError, OSError):
        if any(not _surely_lives(name) for name in unfinished_jobs(state_dir(), _NEWEST)):
            from x07_sandbox.housekeeping.sweep import sweep

            report = sweep(dry_run=False, progress=say, budget_s=_BUDGET_S)
            if count := len(report.removed):
                say(f"removed {count} job{'' if count == 1 else 's'} of dead x07 processes")
    now = time.monotonic()
    _not_before = now + _SHARE * (now - started_at)


def _surely_lives(name: str) -> bool:
    """Whether a job is young and the pid in its name is in use. Then the job's record need not be read."""
    match = JOB_NAME.fullmatch(name)
    return match is not None and unix_ms() - int(match[2]) < _RECENT_MS and os.path.exists(f"/proc/{int(match[3])}")  # noqa: PTH110
