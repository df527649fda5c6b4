"""The files that flags name, each written completely or not at all, and the JSON document of `x07 run`.

The document is the result of a run, or an error that ended the command, in the same form.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from x07_sandbox.cli.console import write_stdout
from x07_sandbox.errors import Cancelled, RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.linux import copy_range
from x07_sandbox.host.paths import closing_fd, private_dir, real_path, state_dir
from x07_sandbox.host.waiting import write_all
from x07_sandbox.policy.outcomes import REFUSED_EXIT
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.records.runs import NET_LOG, all_runs
from x07_sandbox.reports.result import render_result
from x07_sandbox.sessions.request import Program, ProjectPolicy, RunRequest
from x07_sandbox.sessions.result import Result
from x07_sandbox.sessions.transfers import OutFile, unnamed_file

if TYPE_CHECKING:
    from x07_sandbox.files.changes import ChangeSet

# The first bytes of an earlier report; projects and policies have other versions.
_REPORT: Final = re.compile(rb'\{\s*"schema_version":\s*"x07(\.sandbox\.|\.run\.report@|-os-runner\.report@)')
_HEAD_BYTES: Final = 100


class UnwritableError(UsageError):
    """An output file was rejected before the run. path: the path of the file."""

    path: Path


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path | None], *, why: str = "the run reads it"
) -> None:
    """Raise UnwritableError for the first output file that cannot be written or has another use in this run.

    outputs: the paths by flag. inputs: files that must not be overwritten. why: the reason to give for *inputs*. An
    output file is replaced as a whole, so only its folder has to be writable.
    """
    taken = {real_path(path): why for path in inputs if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if reason := _rejection(path, taken):
            error = UnwritableError(f"cannot write {path} ({name})", reason, "Name another file")
            error.path = path
            raise error
        taken[real_path(path)] = "two flags name it"


def _rejection(path: Path, taken: Mapping[Path, str]) -> str:
    """Return why *path* may not be written, or an empty string. taken: for each path in use, the reason to give."""
    try:
        other = path.name in {"", "..", "."} or not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        other = False
    except OSError as exc:
        return exc.strerror or str(exc)
    if other:
        return "it exists and is not a regular file"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        return f"{path.parent} is not a folder that you can write"
    return taken.get(real_path(path), "")


def files_read(request: RunRequest, program: Program | None, stdin_fd: int | None = None) -> list[Path]:
    """Return the files that a run reads besides those named on the command line: project files, standard input.

    stdin_fd: standard input of a run without a program.
    """
    found = [] if program is None else list(program.read)
    if isinstance(request.policy, ProjectPolicy):
        found.append(request.policy.path)
    fd = stdin_fd if program is None else program.input_fd
    if request.input is None and fd is not None and stat.S_ISREG(os.fstat(fd).st_mode):
        found.append(Path(os.readlink(f"/proc/self/fd/{fd}")))  # noqa: PTH115 - of a descriptor
    return found


def write_atomically(path: Path, fill: Callable[[int], None], *, mode: int = 0o666, code: str = "") -> None:
    """Call *fill* with the descriptor of a new file, then rename the file to *path*. Raises RefusedError.

    mode: the permissions, as for open(2). code: the prefix of the error's text.
    """
    temporary = path.with_name(f".x07-{os.urandom(8).hex()}")  # no longer than the longest name
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with closing_fd(fd):
            fill(fd)
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        why = exc.strerror or str(exc)
        fix = "Name another file, or free space there"
        raise RefusedError(f"{code}cannot write {path}", why, fix, code="output-not-written") from exc


def write_bytes(path: Path, data: bytes, *, code: str = "") -> None:
    """Replace the content of the file *path* by *data*. code: see `write_atomically`. Raises RefusedError."""
    write_atomically(path, lambda fd: write_all(fd, data), code=code)


def write_executable(path: Path, artifact: OutFile) -> None:
    """Write a copy of the built program as an executable file. Raises RefusedError."""
    write_atomically(path, lambda fd: copy_range(artifact.fd, fd, artifact.size), mode=0o777)


def artifact_file(stack: contextlib.ExitStack) -> OutFile:
    """Return an unnamed file for the program that a run builds. *stack* closes it. Raises HostError, RefusedError."""
    return unnamed_file(private_dir(state_dir()), OUTPUT, settings.ARTIFACT_MAX_BYTES, stack)


@contextlib.contextmanager
def collect_error(write_errors: list[str]) -> Iterator[None]:
    """Append a write error to *write_errors* instead of raising it, because the run's result must still be reported."""
    try:
        yield
    except (SandboxError, OSError) as exc:
        write_errors.append(str(exc))


def with_write_errors(result: Result, write_errors: list[str]) -> Result:
    """Return the result with *write_errors* as warnings and, if there are any, with exit code 125."""
    if not write_errors:
        return result
    return replace(result, x07_exit_code=REFUSED_EXIT, warnings=[*result.warnings, *write_errors])


def write_files(options: argparse.Namespace, result: Result, artifact: OutFile | None) -> tuple[Result, list[str]]:
    """Write the files that flags name. Return the result, with a warning for each failure, and these warnings."""
    write_errors: list[str] = []
    if artifact is not None and artifact.complete:
        with collect_error(write_errors):
            write_executable(options.compiled_out, artifact)
    write_records(options, result, write_errors)
    if options.report_out is not None:
        with collect_error(write_errors):
            report = render_result(with_write_errors(result, write_errors), full=options.json == "full")
            write_bytes(options.report_out, report)
    return with_write_errors(result, write_errors), write_errors


def write_records(options: argparse.Namespace, result: Result, write_errors: list[str]) -> None:
    """Write the patch and the log of connections if flags name files for them; append failures to *write_errors*."""
    for path, write in ((options.diff, write_diff), (options.net_log, _write_net_log)):
        if path is not None:
            with collect_error(write_errors):
                write(path, result)


def _write_net_log(path: Path, result: Result) -> None:
    log = all_runs() / result.run / NET_LOG
    write_bytes(path, log.read_bytes() if log.is_file() else b"")


def write_diff(path: Path, result: Result) -> None:
    """Write a run's changes as a patch, and as JSON with digests to FILE.json. Raises OSError, SandboxError."""
    from x07_sandbox.files.changes import ChangeSet  # few runs write them
    from x07_sandbox.sessions.patches import patch_chunks
    from x07_sandbox.sessions.saved_changes import SavedChanges, find_saved

    kept = SavedChanges(run=result.run, folder=path.parent, changes=ChangeSet(run=result.run, roots=()))
    if result.changes.state not in {"none", "discarded"}:
        kept = find_saved(result.run)

    def fill(fd: int) -> None:
        for chunk in patch_chunks(kept):
            write_all(fd, chunk)

    write_atomically(path, fill)
    write_bytes(path.with_name(f"{path.name}.json"), changes_json(kept.changes))


def changes_json(changes: ChangeSet) -> bytes:
    """Return all changes as JSON. A text KEY that is not valid UTF-8 is escaped, and KEY_base64 has its bytes."""
    import json

    from x07_sandbox.files.changes import in_json

    def with_bytes(value: object) -> object:
        if isinstance(value, dict):
            texts = {key: in_json(inner)[1] for key, inner in value.items() if isinstance(inner, str)}
            exact = {f"{key}_base64": raw for key, raw in texts.items() if raw}
            return {key: with_bytes(inner) for key, inner in value.items() if key != "at"} | exact
        if isinstance(value, (list, tuple)):
            return [with_bytes(inner) for inner in value]
        return in_json(value)[0] if isinstance(value, str) else value

    return json.dumps(with_bytes(msgspec.to_builtins(changes)), indent=2).encode("ascii") + b"\n"


def print_result(result: Result, *, full: bool = False) -> int:
    """Print a run as one JSON object; return its exit code."""
    write_stdout(render_result(result, full=full))
    return result.x07_exit_code


def print_failure(exc: Exception, code: int | None = None) -> int:
    """Print an error that ended the command as one JSON object. Return the exit code, which is *code* if given."""
    return print_result(_failed(exc, code))


def write_failure(options: argparse.Namespace, exc: Exception, code: int | None = None) -> None:
    """Write an error that ended the command to the file of --report-out, so that no earlier report stays there.

    The program's files may be unknown when the error occurs, and must not be overwritten. So the error is written only
    if the file is new, empty or an earlier report, and no other flag names the file. A failure to write is ignored.
    """
    path: Path | None = options.report_out
    if path is None or options.dry_run or (isinstance(exc, UnwritableError) and exc.path == path):
        return
    others = [value for name, value in vars(options).items() if name != "report_out"]
    others += [name for value in others if isinstance(value, list) for name in value]
    named = [Path(one) for one in (*others, f"{options.diff}.json") if isinstance(one, str | Path)]
    with contextlib.suppress(OSError, SandboxError, ValueError):
        check_outputs({"--report-out": path}, named)
        if not path.exists() or _is_report(path):
            write_bytes(path, render_result(_failed(exc, code), full=options.json == "full"))


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or _REPORT.match(head) is not None


def _failed(exc: Exception, code: int | None) -> Result:
    """Return the result that the error carries, or a result for a run that never started. code: the new exit code."""
    if isinstance(exc, SandboxError) and exc.result is not None:
        result: Result = with_write_errors(exc.result, [str(exc)])
    else:
        from x07_sandbox.sessions.run import failure  # other commands than runs write files too

        result = failure(exc, exc.signal if isinstance(exc, Cancelled) else None)
    return result if code is None else replace(result, x07_exit_code=code)
