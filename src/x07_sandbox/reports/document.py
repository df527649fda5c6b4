"""How every document of ours is written as JSON; and the one that tells of a failure, of every verb but `run`."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from x07_sandbox.errors import SandboxError
from x07_sandbox.policy.problems import PolicyError, Problem


def render_json(document: msgspec.Struct) -> bytes:
    """One JSON object over several lines, and a line end."""
    # ASCII only: everything else, control characters of a guest's text above all, is escaped, also on a terminal.
    return json.dumps(plain(document), indent=2).encode("ascii") + b"\n"


def plain(document: msgspec.Struct) -> Any:  # noqa: ANN401 - what json takes
    """Its content; what is no Unicode in a name is spelt out.

    Not every reader of JSON makes a text of half a surrogate pair, and some then read none of the document.
    """
    return _spelt(msgspec.to_builtins(document))


def _spelt(value: object) -> object:
    if isinstance(value, dict):
        return {key: _spelt(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(inner) for inner in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Error(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What could not be done, why, and what to do."""

    what: str
    why: str
    fix: str


class FailureReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. problems: of the policy, where it is that which is wrong."""

    schema_version: Literal["x07.sandbox.failure@0.1.0"] = "x07.sandbox.failure@0.1.0"
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
