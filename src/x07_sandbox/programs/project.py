"""Access to a project folder, which may be hostile.

File names are opened only inside it, and opening never blocks. Documents are written into it atomically, without
following links.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from x07_sandbox.errors import UsageError
from x07_sandbox.host.linux import fd_path, path_flag
from x07_sandbox.host.paths import closing_fd, is_file, real_path


class ProjectFolder:
    """The project at *root*. File names are relative to *root*. A link is followed only if its target is inside *root*.

    base: the real path of *root*. what: the first part of errors. The methods' argument *shown* is the name in errors.
    """

    def __init__(self, root: Path, what: str = "") -> None:
        self.root = root
        self.base = os.path.realpath(root)
        self._below = f"{self.base.rstrip('/')}/"
        self._what = what or f"cannot use the project {root}"

    @contextlib.contextmanager
    def look(self, name: str, shown: str = "") -> Iterator[tuple[int, os.stat_result]]:
        """Yield an O_PATH descriptor of *name*, and its stat. Raises UsageError if it is missing or outside *root*."""
        shown = shown or name
        with self._readable(shown):
            fd = os.open(f"{self.base}/{name}", path_flag() | os.O_CLOEXEC)
        with closing_fd(fd):
            with self._readable(shown):
                # The path of the descriptor, since the name may change meanwhile.
                place = os.readlink(fd_path(fd))  # noqa: PTH115 - called very often
                info = os.fstat(fd)
            if place != self.base and not place.startswith(self._below):
                raise self.refused(f"{shown} leads out of the project, to {place}", "Copy it into the project")
            yield fd, info

    def open(self, name: str, shown: str = "") -> int:
        """Return an owned descriptor of a regular file, open for reading. Raises UsageError if it cannot be opened."""
        with self.look(name, shown) as (fd, info):
            if not stat.S_ISREG(info.st_mode):
                raise self.refused(f"{shown or name} is not a regular file", "Replace it by a file, or remove it")
            with self._readable(shown or name):
                # O_NONBLOCK: another process may hold a lease on the file.
                return os.open(fd_path(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def has_file(self, name: str) -> bool:
        """Return whether *name* is a regular file of the project."""
        try:
            with self.look(name) as (_, info):
                return stat.S_ISREG(info.st_mode)
        except UsageError:
            return False

    def content(self, name: str, most: int, shown: str = "") -> tuple[bytes, os.stat_result]:
        """Return the first *most* + 1 bytes of a regular file, and its stat. Raises UsageError if it cannot be read."""
        fd = self.open(name, shown)
        with self._readable(shown or name), os.fdopen(fd, "rb") as file:
            return file.read(most + 1), os.fstat(fd)

    def read(self, name: str, shown: str, most: int) -> bytes:
        """Return the content of a regular file. Raises UsageError if it is unreadable or has more than *most* bytes."""
        data, _ = self.content(name, most, shown)
        if len(data) > most:
            raise self.refused(f"{shown} has more than {most} bytes", "Use a smaller file")
        return data

    def refused(self, why: str, fix: str) -> UsageError:
        """Return the error that rejects this project."""
        return UsageError(self._what, why, fix)

    @contextlib.contextmanager
    def _readable(self, shown: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as exc:  # ValueError: NUL or a surrogate in the name
            why = f"{shown} cannot be read ({getattr(exc, 'strerror', None) or exc})"
            raise self.refused(why, "Make it readable, or remove it") from exc


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
    fd = os.open(root, path_flag() | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=fd)
            child = os.open(name, path_flag() | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
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
