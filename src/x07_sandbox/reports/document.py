"""Documents as JSON text, and the document for an error of any command except `run`."""

import json
import re
from typing import Any, Final, Literal

import msgspec

from x07_sandbox.errors import SandboxError, escaped
from x07_sandbox.policy.problems import PolicyError, Problem

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def render_json(document: msgspec.Struct | dict[str, Any]) -> bytes:
    """Return a document as JSON on several lines, with a line feed at the end."""
    # The output is ASCII, so that control characters in a guest's text are escaped.
    return json.dumps(plain(document), indent=2).encode("ascii") + b"\n"


def plain(document: msgspec.Struct | dict[str, Any]) -> Any:  # noqa: ANN401 - what json takes
    """Return a document as dicts, lists and values. Bytes that are not UTF-8 are escaped, for strict JSON readers."""
    return _escaped(msgspec.to_builtins(document))


def _escaped(value: object) -> object:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    return encodable(value) if isinstance(value, str) else value


def encodable(text: str) -> str:
    r"""Return text with lone surrogates escaped, which cannot be encoded: \xff for a byte that is not UTF-8."""
    return _SURROGATE.sub(lambda found: escaped(found[0]), text)


class Error(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What failed, why, and what to do. code: the kind of error (docs/reference/codes.md)."""

    code: str
    what: str
    why: str
    fix: str


class FailureReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The output of a command with `--json` that failed. problems: errors in the policy, if they are the cause."""

    schema_version: Literal["x07.sandbox.failure@0.1.0"] = "x07.sandbox.failure@0.1.0"
    ok: Literal[False] = False
    error: Error
    problems: tuple[Problem, ...] = ()


def failure_report(exc: Exception) -> FailureReport:
    """Return the document for an error."""
    if not isinstance(exc, SandboxError):
        bug = Error(code="bug", what="a bug in x07-sandbox", why=f"{type(exc).__name__}: {exc}", fix="Report this bug")
        return FailureReport(error=bug)
    problems = exc.problems if isinstance(exc, PolicyError) else ()
    return FailureReport(error=Error(code=exc.code, what=exc.what, why=exc.why, fix=exc.fix), problems=problems)
