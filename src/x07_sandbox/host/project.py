"""A folder that somebody else filled: what its own files name is opened only inside it, and never waited for."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from x07_sandbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class ProjectFolder:
    """The project at *root*. Names are relative to it; a link counts as what it leads to, if that lies in it too.

    base: the real path of *root*. what: how errors begin.
    """

    def __init__(self, root: Path, what: str = "") -> None:
        self.root = root
        self.base = os.path.realpath(root)
        self._below = f"{self.base.rstrip('/')}/"
        self._what = what or f"cannot take the project {root}"

    @contextlib.contextmanager
    def look(self, name: str, shown: str = "") -> Iterator[tuple[int, os.stat_result]]:
        """What *name* leads to: an O_PATH descriptor, which opens no device and waits for nobody, and its state.

        shown: the name in errors, with what it is for. Raises UsageError where there is nothing, or outside.
        """
        shown = shown or name
        with self._readable(shown):
            fd = os.open(f"{self.base}/{name}", os.O_PATH | os.O_CLOEXEC)
        try:
            with self._readable(shown):
                # The place of what is open, not of the name: between two looks a name may change.
                place = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - tens of thousands of times
                info = os.fstat(fd)
            if place != self.base and not place.startswith(self._below):
                raise self.refused(f"{shown} leads out of it, to {place}", "Copy it into the project")
            yield fd, info
        finally:
            os.close(fd)

    def open(self, name: str, shown: str = "") -> int:
        """An owned descriptor for reading of a regular file. Raises UsageError."""
        with self.look(name, shown) as (fd, info):
            if not stat.S_ISREG(info.st_mode):
                raise self.refused(f"{shown or name} is no regular file", "Put a file there, or leave it out")
            with self._readable(shown or name):
                # Not blocked by a lease that another process holds on the file.
                return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def has_file(self, name: str) -> bool:
        """Whether *name* is a regular file of it."""
        try:
            with self.look(name) as (_, info):
                return stat.S_ISREG(info.st_mode)
        except UsageError:
            return False

    def content(self, name: str, most: int) -> tuple[bytes, os.stat_result]:
        """A regular file's first *most* + 1 bytes, to show if there are more, and its state. Raises UsageError."""
        fd = self.open(name)
        with self._readable(name), os.fdopen(fd, "rb") as file:
            return file.read(most + 1), os.fstat(fd)

    def read(self, name: str, shown: str, most: int) -> bytes:
        """A regular file of at most *most* bytes. Raises UsageError."""
        fd = self.open(name, shown)
        with self._readable(shown), os.fdopen(fd, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise self.refused(f"{shown} has more than {most} bytes", "Put a smaller file there")
        return data

    def refused(self, why: str, fix: str) -> UsageError:
        """The error that says why this project is not taken."""
        return UsageError(self._what, why, fix)

    @contextlib.contextmanager
    def _readable(self, shown: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as exc:  # ValueError: a zero byte, or half a surrogate, in the name
            why = f"{shown}: {getattr(exc, 'strerror', None) or exc}"
            raise self.refused(why, "Make it readable, or leave it out") from exc
