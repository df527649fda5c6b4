"""Access to a hostile project folder: file names are opened only inside it, and opening never blocks."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from x07_sandbox.errors import UsageError
from x07_sandbox.host.linux import fd_path
from x07_sandbox.host.paths import closing_fd


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
            fd = os.open(f"{self.base}/{name}", os.O_PATH | os.O_CLOEXEC)
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
