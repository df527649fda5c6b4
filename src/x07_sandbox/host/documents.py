"""Documents that people keep in a project: where it begins, and writing there whole or not at all, through no link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import is_file, real_path

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "x07.json"

Status = Literal["created", "unchanged", "overwritten", "exists_different"]


def project_root(project: Path | None) -> Path:
    """The folder of the file *project*; without one the nearest folder above that holds x07.json, else this folder.

    Raises UsageError if *project* is no file, or the current folder is gone.
    """
    if project is not None:
        if not is_file(project):
            why = "it is no file that you can read"
            raise UsageError(f"cannot use the project {project}", why, f"Name the project's {MANIFEST}")
        return real_path(project.parent)
    here = real_path(Path())
    return next((folder for folder in (here, *here.parents) if is_file(folder / MANIFEST)), here)


def write_document(
    root: Path, parts: tuple[str, ...], data: bytes, *, overwrite: bool, fix: str = "Choose another place"
) -> Status:
    """Put *data* below *root* as the file that *parts* lead to, atomically; folders on the way are made.

    A link below *root* is refused: a project may come from anybody, and must not lead us out of it. A file with another
    content is left alone unless *overwrite*. fix: what to do where it cannot be written. Raises UsageError.
    """
    path = root.joinpath(*parts)
    *folders, name = parts
    try:
        with _folder(root, folders) as folder:
            return _put(folder, name, data, overwrite=overwrite)
    except OSError as exc:
        why = exc.strerror or str(exc)
        if exc.errno in {errno.ELOOP, errno.ENOTDIR}:  # what the kernel says of a link that is not to be followed
            why = f"there is a link or no folder on the way, and no link is followed ({why})"
        raise UsageError(f"cannot write {path}", why, fix) from exc


@contextlib.contextmanager
def _folder(root: Path, folders: list[str]) -> Iterator[int]:
    """The folder below *root*, made if it is not there. Raises OSError."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=fd)
            child = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = child
        yield fd
    finally:
        os.close(fd)


def _put(folder: int, name: str, data: bytes, *, overwrite: bool) -> Status:
    found = _present(folder, name, len(data) + 1)
    mode = None
    status: Status = "created"
    if found is not None:
        content, mode = found
        if content == data:
            return "unchanged"
        if not overwrite:
            return "exists_different"
        status = "overwritten"
    temporary = f".x07-{os.urandom(8).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            if mode is not None:
                os.fchmod(fd, mode)
            file.write(data)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return status


def _present(folder: int, name: str, most: int) -> tuple[bytes, int] | None:
    """The first *most* bytes of a file and its mode; None if there is none. Raises OSError, for a folder too."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("there is something that is no regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most), stat.S_IMODE(mode)
    finally:
        os.close(fd)
