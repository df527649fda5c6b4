"""Files that a command writes on the host because the user named them: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.errors import RefusedError, SandboxError, UsageError
from x07_sandbox.host import settings
from x07_sandbox.host.paths import private_dir, real_path, state_dir
from x07_sandbox.host.poll import wait_writable
from x07_sandbox.plan.outcomes import REFUSED_EXIT
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.runs.folder import unnamed_file
from x07_sandbox.runs.request import ProjectPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from x07_sandbox.runs.program import Program
    from x07_sandbox.runs.request import RunRequest
    from x07_sandbox.runs.result import Result
    from x07_sandbox.runs.streams import OutFile


class UnwritableError(UsageError):
    """A file that may not be written, before there is a run. path: that file."""

    path: Path


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path | None], *, why: str = "the run reads it"
) -> None:
    """Refuse files that cannot be written, or that something else of the run needs, before there is a run.

    outputs: by the flag that names them. inputs: files that the run reads; why: what else is said of them. An output
    is replaced as a whole, so of its place only the folder matters. Raises UnwritableError for the first of them.
    """
    taken = {real_path(path): why for path in inputs if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if reason := _against(path, taken):
            error = UnwritableError(f"cannot write {path} ({name})", reason, "Name another place")
            error.path = path
            raise error
        taken[real_path(path)] = "it is named twice"


def _against(path: Path, taken: Mapping[Path, str]) -> str:
    """Why *path* may not be written, or an empty text. taken: places that something else needs, and why."""
    try:
        other = path.name in {"", "..", "."} or not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        other = False
    except OSError as exc:
        return exc.strerror or str(exc)
    if other:
        return "something that is no file lies there"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        return f"{path.parent} is no folder that you can write"
    return taken.get(real_path(path), "")


def is_refused(exc: Exception, path: Path) -> bool:
    """Whether the error is that *path* may not be written."""
    return isinstance(exc, UnwritableError) and real_path(exc.path) == real_path(path)


def files_read(request: RunRequest, program: Program) -> list[Path]:
    """What a run reads besides what the command line names: of the program's project, and from standard input."""
    found = list(program.read)
    if isinstance(request.policy, ProjectPolicy):
        found.append(request.policy.path)
    if request.stdin_fd is not None and stat.S_ISREG(os.fstat(request.stdin_fd).st_mode):
        found.append(Path(os.readlink(f"/proc/self/fd/{request.stdin_fd}")))  # noqa: PTH115 - of a descriptor
    return found


def write_atomically(path: Path, fill: Callable[[int], None], *, mode: int = 0o666, code: str = "") -> None:
    """Have *fill* write into a new file that then becomes *path*.

    mode: as for open(2), so that the user's umask holds. code: stands before the error. Raises RefusedError.
    """
    temporary = path.with_name(f".x07-{os.urandom(8).hex()}")  # no longer than any name may be
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            fill(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        why = exc.strerror or str(exc)
        raise RefusedError(f"{code}cannot write {path}", why, "Name another place, or free space there") from exc


def write_all(fd: int, data: bytes) -> None:
    """All of *data*, past Python's buffers; waits where others have made *fd* non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            wait_writable(fd)


def write_bytes(path: Path, data: bytes, *, code: str = "") -> None:
    """*data* as the whole of a file. Raises RefusedError, as write_atomically."""
    write_atomically(path, lambda fd: write_all(fd, data), code=code)


def write_executable(path: Path, artifact: OutFile) -> None:
    """A copy of what was built, as an executable. Raises RefusedError."""

    def copy(fd: int) -> None:
        position = 0
        while position < artifact.size and (count := os.sendfile(fd, artifact.fd, position, artifact.size - position)):
            position += count

    write_atomically(path, copy, mode=0o777)


def artifact_file(stack: contextlib.ExitStack) -> OutFile:
    """A file without a name for what a run builds, until *stack* ends. Raises HostError, RefusedError."""
    return unnamed_file(private_dir(state_dir()), OUTPUT, settings.ARTIFACT_MAX_BYTES, stack)


@contextlib.contextmanager
def collect_error(write_errors: list[str]) -> Iterator[None]:
    """Have an error of writing be a line of that list: there is a run to tell of, whatever becomes of its files."""
    try:
        yield
    except (SandboxError, OSError) as exc:
        write_errors.append(str(exc))


def with_write_errors(result: Result, write_errors: list[str]) -> Result:
    """The result of a run of whose files these lines tell that they were not written."""
    if not write_errors:
        return result
    return replace(result, x07_exit_code=REFUSED_EXIT, warnings=[*result.warnings, *write_errors])
