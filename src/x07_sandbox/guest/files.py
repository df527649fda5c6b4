"""The files of a job, written as they come."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Final

from x07_sandbox.channel.frames import Stream
from x07_sandbox.guest import confine
from x07_sandbox.guest.errors import JobError
from x07_sandbox.guest.unpack import ArchiveError, unpack

_UNPACKED_MAX: Final = 4 << 30


class IncomingFiles:
    """The files of START, written as they come; an archive is unpacked when it is whole."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = {Stream.FIRST_FILE + index: entry for index, entry in enumerate(entries)}
        self.open: dict[int, BinaryIO] = {}
        for stream, entry in self.entries.items():
            self.open[stream] = open(self._path(stream, entry), "xb")  # noqa: SIM115 - closed at its end of stream

    def _path(self, stream: int, entry: dict[str, Any]) -> str:
        if entry["kind"] == "archive":
            return f"{confine.SCRATCH}/{stream}.cpio"
        name = entry["path"].removeprefix("/x07/in/")
        if not name or "/" in name or name.startswith("."):
            raise JobError("files", 0, f"no such place: {entry['path']}")
        return f"{confine.SCRATCH}/in/{name}"

    def write(self, stream: int, data: bytes) -> None:
        """Append to the file of *stream*."""
        if stream not in self.open:
            raise JobError("files", 0, f"stream {stream} is not in the job")
        self.open[stream].write(data)

    def close(self, stream: int) -> None:
        """The file is whole: close it, unpack it if it is an archive."""
        file = self.open.pop(stream, None)
        if file is None:
            raise JobError("files", 0, f"stream {stream} is not in the job, or has ended")
        file.close()
        entry = self.entries[stream]
        if entry["kind"] != "archive":
            os.chmod(file.name, entry["mode"])
            return
        target = f"{confine.SCRATCH}/in/{entry['path'].removeprefix('/x07/in/')}"
        os.mkdir(target, 0o755)
        try:
            with open(file.name, "rb") as archive:
                unpack(archive, target, most_bytes=_UNPACKED_MAX)
        except ArchiveError as exc:
            raise JobError("unpack", 0, str(exc)) from exc
        os.unlink(file.name)

    def complete(self) -> bool:
        """Whether all files have come."""
        return not self.open
