"""What a call from Python gives, checked: a value that cannot be used is an error that names its argument."""

from __future__ import annotations

import collections.abc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

# What carries runs out is imported when there is one: importing this costs next to nothing.
from x07_sandbox.errors import UsageError
from x07_sandbox.host.settings import BUILD_S_MAX

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from x07_sandbox.policy.limits import LimitChanges
    from x07_sandbox.policy.model import Policy
    from x07_sandbox.policy.overrides import Overrides
    from x07_sandbox.runs.request import Loader, RunRequest

_SECONDS_BOUND: Final = 1e9  # far beyond every limit; what is above could not be converted
FILES_BYTES: Final = 64 << 20
_FILES_BYTES_MAX: Final = 1 << 30
_RUN: Final = "x07_sandbox.run_program"
_WHAT: Final = {
    _RUN: "cannot run a program",
    "x07_sandbox.load_policy": "cannot load a policy",
    "x07_sandbox.Pool": "cannot keep a pool",
}


def check_names(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Refuse options that *function* does not know, in Python's own words. Raises TypeError."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def input_file(data: bytes | None, stack: contextlib.ExitStack) -> int:
    """The input, nothing for None, as a file in memory; *stack* closes it. Raises UsageError."""
    from x07_sandbox.runs.streams import memory_file

    if not isinstance(data, bytes | bytearray | memoryview | None):
        raise wrong("input", f"is {type(data).__name__}, not bytes")
    return memory_file(bytes(data or b""), stack)


def make_request(  # noqa: PLR0913 - what a run may be given, each by its name
    program: str | os.PathLike[str] | None,
    args: Sequence[str],
    *,
    source: str | bytes | None = None,
    toolchain: str | None = None,
    command: Sequence[str] = (),
    workdir: str | os.PathLike[str] | None = None,
    read_only: bool = False,
    files: Mapping[str, bytes] | None = None,
    max_files_bytes: int = FILES_BYTES,
    policy: str | os.PathLike[str] | Policy | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    memory: str | int | None = None,
    cpu_s: float | None = None,
    procs: int | None = None,
    fds: int | None = None,
    build_timeout_s: float | None = None,
    scale_limits: bool | None = None,
    image: str | None = None,
    max_output_bytes: int | None = None,
    changes: Literal["apply", "all-or-nothing", "keep", "discard"] = "apply",
    out: str | os.PathLike[str] | None = None,
    allow_hidden: bool = False,
    allow_symlinks: bool = False,
    live: tuple[int | None, int | None] = (None, None),
    **as_it_is: Any,  # noqa: ANN401 - RunRequest knows them
) -> RunRequest:
    """The request of a call. as_it_is: what goes into the request unchecked, by name. Raises UsageError."""
    given = {name: value for name, value in locals().items() if name in _KINDS}
    _check_types(given)
    from x07_sandbox.runs.request import RunRequest

    _check_values(program, source, command, changes, build_timeout_s)
    if read_only and workdir is None:
        raise UsageError("cannot run a program", "read_only is about the folder of workdir", "Give workdir too")
    if not 0 <= max_files_bytes <= _FILES_BYTES_MAX:
        raise wrong("max_files_bytes", f"is {max_files_bytes}, and must be from 0 to {_FILES_BYTES_MAX}")
    path = None if program is None else Path(_path_text("program", program))
    return RunRequest(
        program=path,
        source=source.encode("utf-8", "surrogateescape") if isinstance(source, str) else source,
        toolchain=toolchain,
        command=tuple(command),
        workdir=None if workdir is None else Path(_path_text("workdir", workdir)),
        workdir_read=read_only,
        files=dict(files or {}),
        max_files_bytes=max_files_bytes,
        args=tuple(args),
        policy=policy_given("policy", policy),
        limits=_limits(memory, procs, fds, cpu_s=cpu_s, timeout_s=timeout_s),
        build_wall_ms=_milliseconds(build_timeout_s),
        scale_limits=scale_limits,
        image=image,
        env=dict(env or {}),
        live_stdout=live[0],
        live_stderr=live[1],
        max_output_bytes=max_output_bytes,
        changes=changes,
        out=None if out is None else Path(_path_text("out", out)),
        overrides=_overrides(hidden=allow_hidden, symlinks=allow_symlinks),
        loaders=_loaders(path),
        **as_it_is,
    )


def _overrides(**include: bool) -> Overrides | None:
    """What the call changes of the policy. Raises UsageError."""
    for word, value in include.items():
        if not isinstance(value, bool):
            raise wrong(f"allow_{word}", f"is {type(value).__name__}, not a bool")
    if not any(include.values()):
        return None
    from x07_sandbox.policy.overrides import Overrides

    return Overrides(include=tuple(word for word, value in include.items() if value))


def _loaders(path: Path | None) -> tuple[Loader, ...]:
    """X07's, for what its name allows to be X07's: loading it costs what other programs need not pay."""
    from x07_sandbox.host.paths import is_folder

    if path is None or not (path.name.endswith("x07.json") or is_folder(path)):
        return ()
    from x07_sandbox.x07.programs import load_x07

    return (load_x07,)


def policy_given(name: str, value: object, function: str = _RUN) -> str | Policy | None:
    """A policy as read_policy takes it; name: of the argument of *function*. Raises UsageError."""
    from x07_sandbox.policy.model import Policy

    if value is None or isinstance(value, Policy):
        return value
    return _path_text(name, value, "a path or a Policy", function)


_MAPPING: Any = collections.abc.Mapping | None
_KINDS: Final[dict[str, tuple[Any, str]]] = {
    "source": (str | bytes | None, "a text or bytes"),
    "toolchain": (str | None, "a text"),
    "command": (collections.abc.Sequence, "a list of texts"),
    "max_files_bytes": (int, "a whole number"),
    "files": (_MAPPING, "a mapping of names to bytes"),
    "args": (collections.abc.Sequence, "a list of texts"),
    "env": (_MAPPING, "a mapping of texts to texts"),
    "timeout_s": (float | int | None, "a number"),
    "memory": (str | int | None, "a size, as '1G', or a number of bytes"),
    "cpu_s": (float | int | None, "a number"),
    "procs": (int | None, "a whole number"),
    "fds": (int | None, "a whole number"),
    "build_timeout_s": (float | int | None, "a number"),
    "scale_limits": (bool | None, "True, False or None"),
    "image": (str | None, "a text"),
    "max_output_bytes": (int | None, "a whole number"),
    "changes": (str, "a text"),
}


def _check_types(given: Mapping[str, Any]) -> None:
    """Raises UsageError for a value of another type, and for a text that is none."""
    for name, (kinds, shown) in _KINDS.items():
        value = given[name]
        one_text = name in {"args", "command"} and isinstance(value, str | bytes)
        if not isinstance(value, kinds) or (isinstance(value, bool) and name != "scale_limits") or one_text:
            raise wrong(name, f"is {type(value).__name__}, not {shown}")
        _check_text(name, value)
    args, files, env = enumerate(given["args"], start=1), given["files"] or {}, given["env"] or {}
    command = enumerate(given["command"])
    for name, pairs in (("command", command), ("args", args), ("files", files.items()), ("env", env.items())):
        for key, inner in pairs:
            _check_text(name, key)
            _check_text(f"{name}[{key!r}]", inner)
    for key, content in files.items():
        if not isinstance(key, str):
            raise wrong("files", f"has the name {key!r}, which is no text")
        if not isinstance(content, bytes):
            raise wrong(f"files[{key!r}]", f"is {type(content).__name__}, not bytes")


def _check_values(
    program: object, source: object, command: Sequence[str], changes: str, build_timeout_s: float | None
) -> None:
    """What no type can say. Raises UsageError."""
    if (program is not None) + (source is not None) + bool(command) != 1:
        why = "exactly one of program, source and command is needed"
        raise UsageError("cannot run a program", why, "Give one of them")
    if not all(isinstance(word, str) for word in command):
        raise wrong("command", "is no list of texts")
    if changes not in {"apply", "all-or-nothing", "keep", "discard"}:
        raise UsageError(
            "cannot run a program", f"changes is {changes!r}", "Use apply, all-or-nothing, keep or discard"
        )
    if build_timeout_s is not None and not 0 < build_timeout_s <= BUILD_S_MAX:
        why = f"build_timeout_s is {build_timeout_s!r}, and must be above 0 and at most {BUILD_S_MAX}"
        raise UsageError("cannot run a program", why, "Give another time limit")


def _limits(
    memory: str | int | None, procs: int | None, fds: int | None, *, cpu_s: float | None, timeout_s: float | None
) -> LimitChanges | None:
    """The limits of a call; None where it sets none. Raises UsageError."""
    if memory is None and procs is None and fds is None and cpu_s is None and timeout_s is None:
        return None
    from x07_sandbox.policy.limits import NAMES, LimitChanges, parse_size, range_fault

    size = parse_size(memory) if isinstance(memory, str) else memory
    if memory is not None and size is None:
        raise wrong("memory", f"is {memory!r}, which is no size: write '512M', '1G' or a number of bytes")
    given = {"memory": memory, "cpu_s": cpu_s, "timeout_s": timeout_s, "procs": procs, "fds": fds}
    for name in ("cpu_s", "timeout_s"):
        value = given[name]
        if isinstance(value, int | float) and not 0 < value < _SECONDS_BOUND:  # NaN is not
            raise wrong(name, f"is {value!r}, and must be above 0 and at most 600")
    changes = LimitChanges(
        mem_bytes=size,
        cpu_ms=_milliseconds(cpu_s),
        wall_ms=_milliseconds(timeout_s),
        procs=procs,
        fds=fds,
        by_keyword=True,
    )
    for field, number in changes.given().items():
        if fault := range_fault(field, number):
            keyword = NAMES[field].keyword
            raise wrong(keyword, f"is {given[keyword]!r}, and {fault}")
    return changes


def _milliseconds(value_s: float | None) -> int | None:
    return None if value_s is None else max(1, round(value_s * 1000))


def _path_text(name: str, value: object, expected: str = "a path", function: str = _RUN) -> str:
    """A path as text. Raises UsageError."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise wrong(name, f"is {type(value).__name__}, not {expected}", function)
    _check_text(name, text, function)
    if "\0" in text:
        raise wrong(name, "holds a zero byte", function)
    if not text:  # as of a variable that is not set: it does not mean the current folder
        raise wrong(name, "is empty", function)
    return text


def _check_text(name: str, value: object, function: str = _RUN) -> None:
    """Refuse a text that no file, name or argument could hold. Raises UsageError."""
    try:
        if isinstance(value, str):
            value.encode("utf-8", "surrogateescape")  # bytes that are no UTF-8, as os.fsdecode has them, are let be
    except UnicodeEncodeError as exc:
        raise wrong(name, "holds half of a surrogate pair, which is no Unicode", function) from exc


def wrong(name: str, why: str, function: str = _RUN) -> UsageError:
    """The error for an argument that cannot be used. why: goes on from its name."""
    return UsageError(_WHAT[function], f"{name} {why}", f"See help({function})")
