"""What every verb but `run` prints with --json when it could not do what it was asked, `x07.sandbox.failure@0.1.0`.

`x07 run` has a result for that, with the outcome `refused` or `cancelled`.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.policy.problems import PolicyError, Problem

SCHEMA: Final = "x07.sandbox.failure@0.1.0"


class Error(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What could not be done, why, and what to do."""

    what: str
    why: str
    fix: str


class FailureReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. problems: of the policy, where it is that which is wrong."""

    schema_version: Literal["x07.sandbox.failure@0.1.0"] = SCHEMA
    ok: Literal[False] = False
    error: Error
    problems: tuple[Problem, ...] = ()


def failure_report(exc: Exception) -> FailureReport:
    """An error as that document."""
    if not isinstance(exc, SandboxError):
        bug = Error(what="a bug in x07-sandbox", why=f"{type(exc).__name__}: {exc}", fix="Report it")
        return FailureReport(error=bug)
    problems = exc.problems if isinstance(exc, PolicyError) else ()
    return FailureReport(error=Error(what=exc.what, why=exc.why, fix=exc.fix), problems=problems)
