"""The input files of a session."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from x07_sandbox.channel.egress import CA_FILE
from x07_sandbox.guest.confine import CWD
from x07_sandbox.guest.environment import IN_MEMORY_BYTES, Environment
from x07_sandbox.guest.system import JobError, write_all
from x07_sandbox.guest.trees import ProgramTree, Tree

if TYPE_CHECKING:
    from x07_sandbox.channel.messages import InputFile

_FOLDER: Final = "/x07/in/"
SYSTEM_CA: Final = "/etc/ssl/certs/ca-certificates.crt"


class IncomingFiles:
    """The input files of a session. Trees are unpacked while they arrive.

    trees: each tree of host files, by the number of its file. work: the tree of the working folder, or None.
    on_disk: whether the other files are on disk, not in memory. ca: the file to mount at SYSTEM_CA, or "".
    """

    def __init__(self, files: list[InputFile], environment: Environment) -> None:
        in_folder = [file.kind == "file" or file.path.startswith(_FOLDER) for file in files]
        self.on_disk = sum(file.size for file, own in zip(files, in_folder, strict=True) if own) > IN_MEMORY_BYTES
        self.trees: dict[int, Tree] = {}
        self.work: Tree | None = None
        self.ca = ""
        self._mounts = environment.platform.namespaces
        self._folder = environment.folder(on_disk=self.on_disk)
        self._files = files
        self._open: dict[int, int | Tree | ProgramTree] = {}  # descriptors and trees
        self._left = {number: file.size for number, file in enumerate(files)}
        for number, file in enumerate(files):
            if file.kind == "file":
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._open[number] = os.open(self._path(file), flags, file.mode)
            elif in_folder[number]:
                os.mkdir(self._path(file), 0o755)
                self._open[number] = ProgramTree(self._path(file))
            else:
                in_work = file.path == CWD
                tree = environment.platform.work_tree() if in_work else environment.platform.tree(number)
                self._open[number] = self.trees[number] = tree
                self.work = tree if in_work else self.work

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
        target = self._open[number]
        if isinstance(target, int):
            write_all(target, data)
        else:
            target.write(data)

    def close(self, number: int) -> None:
        """Close a complete file. Raises JobError, OSError."""
        if self._left.pop(number, 1) != 0:
            raise JobError("files", 0, f"file {number} is unknown or incomplete")
        target, file = self._open.pop(number), self._files[number]
        if not isinstance(target, int):
            target.finish()
            return
        if file.path == CA_FILE:
            self._add_system_certificates(target, self._path(file))
        os.close(target)

    def _add_system_certificates(self, fd: int, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(SYSTEM_CA, "rb") as system:
            write_all(fd, system.read())
            self.ca = path if self._mounts else ""

    def complete(self) -> bool:
        """Return whether all files have arrived."""
        return not self._left
