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
    """Return the request that *given* options describe, which have a value other than None. fields: of the request."""
    parts: dict[str, dict[str, Any]] = {"": {}, "limits": {}, "overrides": {}}
    for row, value in given:
        part, _, field = row.sets.rpartition(".")
        parts[part][field] = value
    asked = parts[""]
    if limits := parts["limits"]:
        from x07_sandbox.policy.changes import LimitChanges  # few requests change the policy

        asked["limits"] = LimitChanges(**limits)
    if any((overrides := parts["overrides"]).values()):
        from x07_sandbox.policy.changes import Overrides

        asked["overrides"] = Overrides(**overrides)
    return RunRequest(**(asked | fields))


def carry_out(
    request: RunRequest, caller: RunCaller, say: Callable[[str], None] = lambda _text: None
) -> tuple[Result, SandboxError | None]:
    """Remove jobs of killed x07 processes, then carry out one run. Return its result, and the error that caused it.

    say: called with a message about removed jobs.
    """
    sweep_before_start(say)
    return attempt(request, caller)
