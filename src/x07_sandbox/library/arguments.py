"""Checks of the arguments of a call from Python. Each error names the argument."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# Modules that run programs are imported on the first run, so that importing this one is cheap.
from x07_sandbox.errors import ArgumentError, UsageError
from x07_sandbox.host.settings import LIFETIME_MAX_S

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from x07_sandbox.options import Option
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.sessions.request import Loader

_SECONDS_BOUND: Final = 1e9  # far above every limit, so that no conversion overflows
_RUN: Final = "x07_sandbox.run_program"
SANDBOX: Final = "x07_sandbox.Sandbox"
_WHAT: Final = {
    _RUN: "cannot run a program",
    "x07_sandbox.load_policy": "cannot load a policy",
    "x07_sandbox.Pool": "cannot start a pool",
    SANDBOX: "cannot open a sandbox",
}


def check_names(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError, worded like Python's own, for an option that *function* does not have."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_one_program(given: Mapping[str, Any]) -> None:
    """Raise UsageError unless a call names one program."""
    if sum((given.get("program") is not None, given.get("source") is not None, bool(given.get("command")))) != 1:
        why = "exactly one of program, source and command is required"
        raise ArgumentError(_WHAT[_RUN], why, "Pass exactly one of them")


def checked_options(given: Mapping[str, Any], function: str = _RUN) -> Iterator[tuple[Option, Any]]:
    """Yield the options of a call, with their values in the form for `make_request`. Raises UsageError.

    given: the keywords whose values are not the default.
    """
    from x07_sandbox.options import BY_KEYWORD

    if "read_only" in given and "workdir" not in given:
        raise ArgumentError(_WHAT[function], "read_only requires workdir", "Pass workdir too")
    for name, value in given.items():
        row = BY_KEYWORD[name]
        yield row, _checked(row, value, function)


def _checked(row: Option, value: Any, function: str) -> Any:  # noqa: ANN401 - of many types
    """Return the value of an option in the form for `make_request`. Raises UsageError for a wrong value."""
    name = row.keyword
    if row.kind in {"words", "list"} and isinstance(value, list | tuple):
        value = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in value]
    _check_type(row, value, function)
    match row.kind:
        case "file" | "folder":
            value = Path(_path_text(name, value, "a path", function))
        case "policy":
            value = policy_argument(name, value, function)
        case "words" | "list" | "patterns":
            value = tuple(value)
        case "contents":
            named = {os.fspath(key) if isinstance(key, os.PathLike) else key: value[key] for key in value}
            value = {key: _content(name, key, content, function) for key, content in named.items()}
        case "source":
            value = _encoded(value)
        case "size" | "seconds" | "number":
            value = _number(row, value, function)
        case "choice" if value not in row.choices:
            fix = f"Use one of {', '.join(row.choices)}"
            raise ArgumentError(_WHAT[function], f"{name} is {value!r}", fix)
    return value


def _check_type(row: Option, value: Any, function: str) -> None:  # noqa: ANN401 - as above
    """Raise UsageError for a value of a wrong type."""
    from x07_sandbox.options import FORMS

    form = FORMS[row.kind]
    if form.types is None:
        return
    texts = row.kind in {"words", "list", "patterns"}
    unlike = (texts and isinstance(value, str | bytes)) or (form.types is not bool and isinstance(value, bool))
    if unlike or not isinstance(value, form.types):
        raise bad_argument(row.keyword, f"is {type(value).__name__}, not {form.expected}", function)
    if texts and row.kind != "words" and not all(isinstance(word, str) for word in value):  # the run checks words
        raise bad_argument(row.keyword, "is not a list of str", function)


def _content(name: str, key: object, content: object, function: str) -> bytes:
    """Return the content of one of several files. Raises UsageError."""
    if not isinstance(key, str):
        raise bad_argument(name, f"has the name {key!r}, which is not str", function)
    if not isinstance(content, str | bytes):
        raise bad_argument(f"{name}[{key!r}]", f"is {type(content).__name__}, not str or bytes", function)
    return _encoded(content)


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def _number(row: Option, value: Any, function: str) -> int:  # noqa: ANN401 - as above
    """Return the value of a numeric option: bytes, milliseconds or a number. Raises UsageError."""
    from x07_sandbox.options import milliseconds, parse_size

    number = parse_size(value) if isinstance(value, str) else value
    if number is None:
        why = f"is {value!r}, which is not a size: use bytes, or a text such as '512M'"
        raise bad_argument(row.keyword, why, function)
    fault = row.range_fault(number)
    if row.kind == "seconds":
        if not 0 < number < _SECONDS_BOUND:  # rejects NaN
            fault = f"must be above 0 and at most {row.most:g}"
        elif number < row.least:
            fault = ""  # it is rounded up
    if fault:
        raise bad_argument(row.keyword, f"is {value!r}, but {fault}", function)
    return milliseconds(number) if row.kind == "seconds" else number


def loaders_for(path: Path | None) -> tuple[Loader, ...]:
    """Return the loader of X07 programs if *path* may be an X07 program. Runs of other programs need not import it."""
    from x07_sandbox.host.paths import is_folder

    if path is None or not (path.name.endswith("x07.json") or is_folder(path)):
        return ()
    from x07_sandbox.x07.programs import load_x07

    return (load_x07,)


def policy_argument(name: str, value: object, function: str = _RUN) -> str | Policy | None:
    """Check and return the argument *name* of *function*: a Policy, or the path or name of one. Raises UsageError."""
    from x07_sandbox.policy.model import Policy

    if value is None or isinstance(value, Policy):
        return value
    return _path_text(name, value, "a path or a Policy", function)


def _path_text(name: str, value: object, expected: str, function: str) -> str:
    """Return the argument *name*, which must be a path, as text. Raises UsageError. expected: words for the error."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise bad_argument(name, f"is {type(value).__name__}, not {expected}", function)
    if "\0" in text:
        raise bad_argument(name, "contains a zero byte", function)
    if not text:  # it does not mean the current folder
        raise bad_argument(name, "is empty", function)
    return text


def bad_argument(name: str, why: str, function: str = _RUN) -> UsageError:
    """Return the error for the wrong argument *name*. why: the text that follows *name* in the message."""
    return ArgumentError(_WHAT[function], f"{name} {why}", f"See help({function})")


def check_snapshot_name(name: object) -> None:
    """Raise ArgumentError for a name that no snapshot can have."""
    from x07_sandbox.sessions.sandbox import NAME, NAME_RULE

    if name != "" and not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ArgumentError("cannot take a snapshot", f"its name is {name!r}", NAME_RULE.capitalize())


def checked_seconds(name: str, value: Any, error: UsageError | None = None) -> float:  # noqa: ANN401 - it is checked
    """Return a number of seconds. Raises UsageError, or *error*."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
        raise error or bad_argument(name, f"is {value!r}, not a number of seconds above 0", SANDBOX)
    return min(float(value), float(LIFETIME_MAX_S))
