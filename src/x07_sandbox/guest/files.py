"""The input files of a job."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, Any, Final

from x07_sandbox.channel.egress import CA_FILE
from x07_sandbox.channel.frames import Stream
from x07_sandbox.guest.confine import CWD
from x07_sandbox.guest.environment import IN_MEMORY_BYTES, Environment
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.system import write_all
from x07_sandbox.guest.unpack import ArchiveError, unpack

if TYPE_CHECKING:
    from x07_sandbox.guest.trees import Tree

_UNPACKED_MAX: Final = 4 << 30
_FOLDER: Final = "/x07/in/"
SYSTEM_CA: Final = "/etc/ssl/certs/ca-certificates.crt"


class IncomingFiles:
    """The input files of a job. Trees are unpacked while they arrive, archives once they are complete.

    trees: each tree, by the number of its stream. work: the tree of the working folder, or None. on_disk: whether files
    are on disk, not in memory. ca: the file to mount at SYSTEM_CA, or "".
    """

    def __init__(self, entries: list[dict[str, Any]], environment: Environment) -> None:
        self.on_disk = sum(entry["bytes"] for entry in entries if entry["kind"] != "tree") > IN_MEMORY_BYTES
        self.trees: dict[int, Tree] = {}
        self.work: Tree | None = None
        self.ca = ""
        self._mounts = environment.platform.namespaces
        self._folder = environment.folder(on_disk=self.on_disk)
        self._entries = {Stream.FIRST_FILE + index: entry for index, entry in enumerate(entries)}
        self._open: dict[int, int] = {}
        self._archives: dict[int, io.BytesIO] = {}
        self._left: dict[int, int] = {}
        for stream, entry in self._entries.items():
            self._left[stream] = entry["bytes"]
            if entry["kind"] == "tree":
                in_work = entry["path"] == CWD
                tree = environment.platform.work_tree() if in_work else environment.platform.tree(stream)
                self.trees[stream] = tree
                self.work = tree if in_work else self.work
                continue
            if entry["kind"] == "archive" and not self.on_disk:
                self._archives[stream] = io.BytesIO()
                continue
            archive = f"{environment.platform.scratch}/{stream}.cpio" if entry["kind"] == "archive" else None
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._open[stream] = os.open(archive or self._path(entry), flags, entry["mode"])
            if archive:
                os.unlink(archive)

    def _path(self, entry: dict[str, Any]) -> str:
        name = entry["path"].removeprefix(_FOLDER)
        if not name or "/" in name or name.startswith("."):
            raise JobError("files", 0, f"invalid path: {entry['path']}")
        return f"{self._folder}/{name}"

    def write(self, stream: int, data: bytes) -> None:
        """Append to the file of *stream*. Raises JobError, OSError."""
        left = self._left.get(stream, 0) - len(data)
        if left < 0:
            raise JobError("files", 0, f"stream {stream} is unknown, or longer than announced")
        self._left[stream] = left
        if stream in self.trees:
            self.trees[stream].write(data)
        elif stream in self._archives:
            self._archives[stream].write(data)
        else:
            write_all(self._open[stream], data)

    def close(self, stream: int) -> None:
        """Close a complete file; unpack it if it is an archive. Raises JobError, OSError."""
        if self._left.pop(stream, 1) != 0:
            raise JobError("files", 0, f"stream {stream} is unknown or incomplete")
        if stream in self.trees:
            self.trees[stream].finish()
            return
        fd = self._open.pop(stream, None)
        entry = self._entries[stream]
        if entry["kind"] == "archive":
            target = self._path(entry)
            os.mkdir(target, 0o755)
            try:
                with self._archives.pop(stream) if fd is None else os.fdopen(fd, "rb") as archive:
                    archive.seek(0)
                    unpack(archive, target, most_bytes=_UNPACKED_MAX)
            except ArchiveError as exc:
                raise JobError("unpack", 0, str(exc)) from exc
        elif fd is not None:
            if entry["path"] == CA_FILE:
                self._add_system_certificates(fd, self._path(entry))
            os.close(fd)

    def _add_system_certificates(self, fd: int, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(SYSTEM_CA, "rb") as file:
            write_all(fd, file.read())
            self.ca = path if self._mounts else ""

    def complete(self) -> bool:
        """Return whether all files have arrived."""
        return not self._left
