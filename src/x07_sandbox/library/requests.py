"""Make a request from the values of options, and carry it out; shared by `x07 run` and `run_program`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from x07_sandbox.library.upkeep import sweep_before_start
from x07_sandbox.sessions.request import RunRequest
from x07_sandbox.sessions.run import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from x07_sandbox.errors import SandboxError
    from x07_sandbox.options import Option
    from x07_sandbox.sessions.request import RunCaller
    from x07_sandbox.sessions.result import Result


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
