"""The output files that the user names: each is written completely, or not at all."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import closing_fd, private_dir, real_path, state_dir
from x07_sandbox.host.waiting import write_all
from x07_sandbox.policy.outcomes import REFUSED_EXIT
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.sessions.folder import unnamed_file
from x07_sandbox.sessions.request import Program, ProjectPolicy, RunRequest
from x07_sandbox.sessions.result import Result
from x07_sandbox.sessions.transfers import OutFile


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

    def copy(fd: int) -> None:
        position = 0
        while position < artifact.size and (count := os.sendfile(fd, artifact.fd, position, artifact.size - position)):
            position += count

    write_atomically(path, copy, mode=0o777)


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
