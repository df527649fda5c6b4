"""The input files of a session."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.egress import CA_FILE
from x07_sandbox.guest.confine import CWD
from x07_sandbox.guest.environment import IN_MEMORY_BYTES, Environment
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.system import write_all
from x07_sandbox.guest.unpack import ArchiveError, unpack

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import InputFile
    from x07_sandbox.guest.trees import Tree

_UNPACKED_MAX: Final = 4 << 30
_FOLDER: Final = "/x07/in/"
SYSTEM_CA: Final = "/etc/ssl/certs/ca-certificates.crt"


class IncomingFiles:
    """The input files of a session. Trees are unpacked while they arrive, archives once they are complete.

    trees: each tree, by the number of its file. work: the tree of the working folder, or None. on_disk: whether files
    are on disk, not in memory. ca: the file to mount at SYSTEM_CA, or "".
    """

    def __init__(self, files: list[InputFile], environment: Environment) -> None:
        self.on_disk = sum(file.size for file in files if file.kind != "tree") > IN_MEMORY_BYTES
        self.trees: dict[int, Tree] = {}
        self.work: Tree | None = None
        self.ca = ""
        self._mounts = environment.platform.namespaces
        self._folder = environment.folder(on_disk=self.on_disk)
        self._files = files
        self._open: dict[int, int] = {}
        self._archives: dict[int, io.BytesIO] = {}
        self._left: dict[int, int] = {}
        for number, file in enumerate(files):
            self._left[number] = file.size
            if file.kind == "tree":
                in_work = file.path == CWD
                tree = environment.platform.work_tree() if in_work else environment.platform.tree(number)
                self.trees[number] = tree
                self.work = tree if in_work else self.work
                continue
            if file.kind == "archive" and not self.on_disk:
                self._archives[number] = io.BytesIO()
                continue
            archive = f"{environment.platform.scratch}/{number}.cpio" if file.kind == "archive" else None
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._open[number] = os.open(archive or self._path(file), flags, file.mode)
            if archive:
                os.unlink(archive)

    def _path(self, file: InputFile) -> str:
        name = file.path.removeprefix(_FOLDER)
        if not name or "/" in name or name.startswith("."):
            raise JobError("files", 0, f"invalid path: {file.path}")
        return f"{self._folder}/{name}"

    def write(self, number: int, data: bytes) -> None:
        """Append to file *number*. Raises JobError, OSError."""
        left = self._left.get(number, 0) - len(data)
        if left < 0:
            raise JobError("files", 0, f"file {number} is unknown, or longer than announced")
        self._left[number] = left
        if number in self.trees:
            self.trees[number].write(data)
        elif number in self._archives:
            self._archives[number].write(data)
        else:
            write_all(self._open[number], data)

    def close(self, number: int) -> None:
        """Close a complete file; unpack it if it is an archive. Raises JobError, OSError."""
        if self._left.pop(number, 1) != 0:
            raise JobError("files", 0, f"file {number} is unknown or incomplete")
        if number in self.trees:
            self.trees[number].finish()
            return
        fd = self._open.pop(number, None)
        file = self._files[number]
        if file.kind == "archive":
            target = self._path(file)
            os.mkdir(target, 0o755)
            try:
                with self._archives.pop(number) if fd is None else os.fdopen(fd, "rb") as archive:
                    archive.seek(0)
                    unpack(archive, target, most_bytes=_UNPACKED_MAX)
            except ArchiveError as exc:
                raise JobError("unpack", 0, str(exc)) from exc
        elif fd is not None:
            if file.path == CA_FILE:
                self._add_system_certificates(fd, self._path(file))
            os.close(fd)

    def _add_system_certificates(self, fd: int, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(SYSTEM_CA, "rb") as system:
            write_all(fd, system.read())
            self.ca = path if self._mounts else ""

    def complete(self) -> bool:
        """Return whether all files have arrived."""
        return not self._left
