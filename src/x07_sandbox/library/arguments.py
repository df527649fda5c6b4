"""Checks of the arguments of a call from Python. Each error names the argument."""

from __future__ import annotations

import collections.abc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# Modules that run programs are imported on the first run, so that importing this one is cheap.
from x07_sandbox.errors import UsageError
from x07_sandbox.host.settings import BUILD_S_MAX

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from x07_sandbox.policy.limits import LimitChanges
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.policy.overrides import Overrides
    from x07_sandbox.runs.request import Loader, RunRequest

_SECONDS_BOUND: Final = 1e9  # far above every limit, so that no conversion overflows
FILES_BYTES: Final = 64 << 20
_CHANGES: Final = ("apply", "all-or-nothing", "keep", "discard")
_FILES_BYTES_MAX: Final = 1 << 30
_RUN: Final = "x07_sandbox.run_program"
_WHAT: Final = {
    _RUN: "cannot run a program",
    "x07_sandbox.load_policy": "cannot load a policy",
    "x07_sandbox.Pool": "cannot start a pool",
}

_LIMITS: Final = {  # the argument for each field of LimitChanges
    "mem_bytes": "memory",
    "cpu_ms": "cpu_s",
    "wall_ms": "timeout_s",
    "procs": "procs",
    "fds": "fds",
    "file_bytes": "max_file_size",
}


def check_names(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError, worded like Python's own, for an option that *function* does not have."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def input_file(data: bytes | None, stack: contextlib.ExitStack) -> int:
    """Return the input as a file in memory, which is empty for None. *stack* closes it. Raises UsageError."""
    from x07_sandbox.runs.streams import memory_file

    if not isinstance(data, bytes | bytearray | memoryview | None):
        raise bad_argument("input", f"is {type(data).__name__}, not bytes")
    return memory_file(bytes(data or b""), stack)


def make_request(
    program: str | os.PathLike[str] | None,
    args: Sequence[str],
    given: Mapping[str, Any],
    **unchecked: Any,  # noqa: ANN401 - fields of RunRequest
) -> RunRequest:
    """Return the request for a call. given: all keyword arguments of `run_program`. Raises UsageError."""
    _check_types({"args": args, **given})
    from x07_sandbox.runs.request import RunRequest

    _check_values(program, given)
    path = None if program is None else Path(_path_text("program", program))
    source, workdir, out, ca = given["source"], given["workdir"], given["out"], given["ca"]
    names = ("toolchain", "max_files_bytes", "scale_limits", "image", "max_output_bytes", "changes")
    return RunRequest(
        program=path,
        source=source.encode("utf-8", "surrogateescape") if isinstance(source, str) else source,
        command=tuple(given["command"]),
        workdir=None if workdir is None else Path(_path_text("workdir", workdir)),
        workdir_read=given["read_only"],
        files=dict(given["files"] or {}),
        args=tuple(args),
        policy=policy_argument("policy", given["policy"]),
        limits=_limits(given),
        build_wall_ms=_milliseconds(given["build_timeout_s"]),
        env=dict(given["env"] or {}),
        ca=None if ca is None else Path(_path_text("ca", ca)),
        out=None if out is None else Path(_path_text("out", out)),
        overrides=_overrides(hidden=given["allow_hidden"], symlinks=given["allow_symlinks"]),
        loaders=_loaders(path),
        **{name: given[name] for name in names},
        **unchecked,
    )


def _overrides(**allowed: bool) -> Overrides | None:
    """Return the changes to the policy, or None if there are none. Raises UsageError."""
    for word, value in allowed.items():
        if not isinstance(value, bool):
            raise bad_argument(f"allow_{word}", f"is {type(value).__name__}, not a bool")
    if not any(allowed.values()):
        return None
    from x07_sandbox.policy.overrides import Overrides

    return Overrides(include=tuple(word for word, value in allowed.items() if value))


def _loaders(path: Path | None) -> tuple[Loader, ...]:
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


_MAPPING: Any = collections.abc.Mapping | None
_KINDS: Final[dict[str, tuple[Any, str]]] = {
    "source": (str | bytes | None, "str or bytes"),
    "toolchain": (str | None, "str"),
    "command": (collections.abc.Sequence, "a list of str"),
    "max_files_bytes": (int, "int"),
    "files": (_MAPPING, "a mapping of str to bytes"),
    "args": (collections.abc.Sequence, "a list of str"),
    "env": (_MAPPING, "a mapping of str to str"),
    "timeout_s": (float | int | None, "a number"),
    "memory": (str | int | None, "a size such as '1G' or a number of bytes"),
    "cpu_s": (float | int | None, "a number"),
    "procs": (int | None, "int"),
    "fds": (int | None, "int"),
    "max_file_size": (str | int | None, "a size such as '1G' or a number of bytes"),
    "build_timeout_s": (float | int | None, "a number"),
    "scale_limits": (bool | None, "True, False or None"),
    "image": (str | None, "str"),
    "max_output_bytes": (int | None, "int"),
    "changes": (str, "str"),
}


def _check_types(given: Mapping[str, Any]) -> None:
    """Raise UsageError for a value of a wrong type."""
    for name, (kinds, expected) in _KINDS.items():
        value = given[name]
        one_text = name in {"args", "command"} and isinstance(value, str | bytes)
        if not isinstance(value, kinds) or (isinstance(value, bool) and name != "scale_limits") or one_text:
            raise bad_argument(name, f"is {type(value).__name__}, not {expected}")
    files = given["files"] or {}
    for key, content in files.items():
        if not isinstance(key, str):
            raise bad_argument("files", f"has the name {key!r}, which is not str")
        if not isinstance(content, bytes):
            raise bad_argument(f"files[{key!r}]", f"is {type(content).__name__}, not bytes")


def _check_values(program: object, given: Mapping[str, Any]) -> None:
    """Raise UsageError for values that have the right type but that a run does not accept."""
    command, build_timeout_s = given["command"], given["build_timeout_s"]
    if (program is not None) + (given["source"] is not None) + bool(command) != 1:
        why = "exactly one of program, source and command is required"
        raise UsageError(_WHAT[_RUN], why, "Pass exactly one of them")
    if not all(isinstance(word, str) for word in command):
        raise bad_argument("command", "is not a list of str")
    if given["changes"] not in _CHANGES:
        raise UsageError(_WHAT[_RUN], f"changes is {given['changes']!r}", f"Use one of {', '.join(_CHANGES)}")
    if build_timeout_s is not None and not 0 < build_timeout_s <= BUILD_S_MAX:
        why = f"build_timeout_s is {build_timeout_s!r}, but must be above 0 and at most {BUILD_S_MAX}"
        raise UsageError(_WHAT[_RUN], why, "Use another time limit")
    if given["read_only"] and given["workdir"] is None:
        raise UsageError(_WHAT[_RUN], "read_only requires workdir", "Pass workdir too")
    if not 0 <= given["max_files_bytes"] <= _FILES_BYTES_MAX:
        raise bad_argument("max_files_bytes", f"must be from 0 to {_FILES_BYTES_MAX}")


def _limits(given: Mapping[str, Any]) -> LimitChanges | None:
    """Return the limits that a call sets, or None if it sets none. Raises UsageError."""
    if all(given[name] is None for name in _LIMITS.values()):
        return None
    from x07_sandbox.policy.limits import LimitChanges, parse_size, range_fault

    sizes = {}
    for name in ("memory", "max_file_size"):
        sizes[name] = parse_size(given[name]) if isinstance(given[name], str) else given[name]
        if given[name] is not None and sizes[name] is None:
            raise bad_argument(name, f"is {given[name]!r}, which is not a size: use bytes, or a text such as '512M'")
    for name in ("cpu_s", "timeout_s"):
        value = given[name]
        if value is not None and not 0 < value < _SECONDS_BOUND:  # rejects NaN
            raise bad_argument(name, f"is {value!r}, but must be above 0 and at most 600")
    times = {name: _milliseconds(given[name]) for name in ("cpu_s", "timeout_s")}
    limits = {field: {**given, **sizes, **times}[name] for field, name in _LIMITS.items()}
    for field, number in limits.items():
        if number is not None and (fault := range_fault(field, number)):
            raise bad_argument(_LIMITS[field], f"is {given[_LIMITS[field]]!r}, but {fault}")
    return LimitChanges(**limits)


def _milliseconds(value_s: float | None) -> int | None:
    return None if value_s is None else max(1, round(value_s * 1000))


def _path_text(name: str, value: object, expected: str = "a path", function: str = _RUN) -> str:
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
    return UsageError(_WHAT[function], f"{name} {why}", f"See help({function})")
