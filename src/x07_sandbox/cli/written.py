"""Files that a run writes on the host because the user named them: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from msgspec.structs import replace

from x07_sandbox.errors import HostError
from x07_sandbox.host import settings
from x07_sandbox.programs.toolchains import OUTPUT
from x07_sandbox.reports.document import render_json
from x07_sandbox.runs.streams import OutFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from x07_sandbox.runs.request import RunRequest
    from x07_sandbox.runs.result import Result


@contextlib.contextmanager
def compiled_out(path: Path, request: RunRequest) -> Iterator[RunRequest]:
    """The request whose artifact becomes the file *path* (mode 0755), if one is built. Raises HostError."""
    with _file_to_be(path, 0o755) as (fd, finish):
        artifact = OutFile(path=OUTPUT, fd=fd, max_bytes=settings.ARTIFACT_MAX_BYTES)
        yield replace(request, artifact=artifact)
        if artifact.complete:
            finish()


def write_report(path: Path, result: Result) -> None:
    """The result as JSON. Raises HostError."""
    with _file_to_be(path, 0o644) as (fd, finish):
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                file.write(render_json(result))
        except OSError as exc:
            raise _unwritable(path, exc) from exc
        finish()


class _Finish:
    def __init__(self, temporary: Path, path: Path) -> None:
        self.temporary = temporary
        self.path = path

    def __call__(self) -> None:
        """Put it in its place."""
        try:
            self.temporary.replace(self.path)
        except OSError as exc:
            raise _unwritable(self.path, exc) from exc


@contextlib.contextmanager
def _file_to_be(path: Path, mode: int) -> Iterator[tuple[int, _Finish]]:
    """A new file beside *path*, and what puts it there; without that call it is gone again."""
    if path.is_dir():
        raise HostError(f"cannot write {path}", "it is a folder", "Name a file")
    temporary = path.with_name(f".{path.name[:64]}.{os.urandom(8).hex()}")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    try:
        yield fd, _Finish(temporary, path)
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, exc: OSError) -> HostError:
    return HostError(f"cannot write {path}", exc.strerror or str(exc), "Name a file in a folder that you can write")
