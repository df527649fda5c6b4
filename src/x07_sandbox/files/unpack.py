"""Whole folders as tree streams (channel/trees): packing one of the host's, and unpacking one from a guest."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from x07_sandbox.channel import trees
from x07_sandbox.channel.contents import parts
from x07_sandbox.channel.trees import Entry, Kind, can_hold_names, entry_of, segment_of, walk
from x07_sandbox.errors import BackendError
from x07_sandbox.host.paths import closing_fd

if TYPE_CHECKING:
    from types import TracebackType

ENTRIES_MAX: Final = 1_000_000
BYTES_MAX: Final = 64 << 30
_NAMES_MAX: Final = 256 << 20  # bytes of the names of folders, which are kept in memory
_MODE: Final = 0o777  # no set-id bits come from a guest
_LEFT_OUT_MAX: Final = 100  # names


def pack(folder: Path, out: IO[bytes]) -> None:
    """Write the stream of a folder with all that is in it to *out*. Raises OSError.

    Links are packed as links. Sockets, devices and pipes are left out.
    """

    def enters(name: bytes) -> bool:
        if not can_hold_names(name):  # a folder that the guest can neither create nor send back
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fspath(folder))
        return True

    def failed(name: bytes, exc: OSError) -> None:
        raise OSError(exc.errno, exc.strerror, os.fspath(folder / os.fsdecode(name)))

    with closing_fd(os.open(folder, trees.FOLDER_FLAGS)) as top:
        for found in walk(top, enters=enters, failed=failed):
            if stat.S_ISREG(found.info.st_mode):
                with closing_fd(found.open()) as fd:
                    entry = entry_of(found.name, os.fstat(fd), _MODE)
                    out.write(entry.encoded())
                    out.writelines(map(segment_of, parts(fd, entry.size)))
                continue
            target = found.target() if stat.S_ISLNK(found.info.st_mode) else b""
            entry = entry_of(found.name, found.info, _MODE, target)
            if entry.kind is not Kind.UNSUPPORTED:
                out.write(entry.encoded())
    out.write(Entry(Kind.END, b"").encoded())


class Unpacker(trees.Unpacker):
    """Creates a folder from a guest's stream, as the caller's user. Nothing is written outside the folder.

    left_out: what the guest could not send whole, at most 100 names; more_left_out: how many more. The folder must not
    exist yet. Links are created as links and never followed. Modes lose their set-id bits. If the context ends by an
    exception, what was created stays.
    """

    def __init__(self, folder: Path) -> None:
        self.left_out: list[str] = []
        self.more_left_out = 0
        self._entries = self._bytes = self._names = 0
        folder.mkdir(mode=0o700)
        super().__init__(os.open(folder, trees.FOLDER_FLAGS | os.O_NOFOLLOW), _MODE)

    def write(self, data: bytes) -> None:
        """Take the next bytes of the stream. Raises PeerError, BackendError, OSError."""
        super().write(data)
        if self.ended:
            self.finish()

    def _make(self, entry: Entry) -> None:
        self._entries += 1
        self._bytes += entry.size if entry.kind is Kind.FILE else 0
        self._names += len(entry.name) if entry.kind is Kind.FOLDER else 0
        if self._entries > ENTRIES_MAX or self._bytes > BYTES_MAX or self._names > _NAMES_MAX:
            why = f"it has more than {ENTRIES_MAX} entries or {BYTES_MAX >> 30} GiB"
            raise BackendError("cannot copy the folder", why, "Copy smaller folders")
        super()._make(entry)

    def _refuse(self, entry: Entry) -> None:
        if entry.kind is not Kind.UNSUPPORTED:
            super()._refuse(entry)
        elif stat.S_ISSOCK(entry.mode) or stat.S_ISFIFO(entry.mode):
            return  # nobody misses it
        elif len(self.left_out) < _LEFT_OUT_MAX:
            self.left_out.append(os.fsdecode(entry.name))
        else:
            self.more_left_out += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
