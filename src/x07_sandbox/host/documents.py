"""Look-up of a project's root folder, and atomic writing of documents into it without following links."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from x07_sandbox.errors import UsageError
from x07_sandbox.host.paths import closing_fd, is_file, real_path

MANIFEST = "x07.json"

Status = Literal["created", "unchanged", "overwritten", "exists_different"]


def project_root(project: Path | None) -> Path:
    """Return the folder of the file *project*, else the nearest parent with x07.json, else the current folder.

    Raises UsageError if *project* is not a file or the current folder does not exist.
    """
    if project is not None:
        if not is_file(project):
            raise UsageError(
                f"cannot use the project {project}",
                "it is not a readable file",
                f"Give the path of the project's {MANIFEST}",
            )
        return real_path(project.parent)
    here = real_path(Path())
    return next((folder for folder in (here, *here.parents) if is_file(folder / MANIFEST)), here)


def write_document(
    root: Path, parts: tuple[str, ...], data: bytes, *, overwrite: bool, fix: str = "Choose another place"
) -> Status:
    """Write *data* atomically to the file *parts* below *root*, and create missing folders.

    A link below *root* is an error, because a hostile project could use it to redirect the write outside *root*. An
    existing file with other content is kept unless *overwrite* is true. Raises UsageError with the advice *fix* if the
    file cannot be written.
    """
    path = root.joinpath(*parts)
    *folders, name = parts
    try:
        with _folder(root, folders) as folder:
            return _put(folder, name, data, overwrite=overwrite)
    except OSError as exc:
        why = exc.strerror or str(exc)
        if exc.errno in {errno.ELOOP, errno.ENOTDIR}:
            why = f"it or a parent is a link or not a folder ({why})"
        raise UsageError(f"cannot write {path}", why, fix) from exc


@contextlib.contextmanager
def _folder(root: Path, folders: list[str]) -> Iterator[int]:
    """Yield a descriptor of the folder *folders* (parts of a path) below *root*, created if missing. Raises OSError."""
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
    if found is not None and found[0] == data:
        return "unchanged"
    if found is not None and not overwrite:
        return "exists_different"
    temporary = f".x07-{os.urandom(8).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            if found is not None:
                os.fchmod(fd, found[1])
            file.write(data)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return "created" if found is None else "overwritten"


def _present(folder: int, name: str, most: int) -> tuple[bytes, int] | None:
    """Return the first *most* bytes and the mode of a file, or None if the file is missing. Raises OSError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with closing_fd(fd):
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most), stat.S_IMODE(mode)
