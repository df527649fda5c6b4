"""Files that a program has left in its private folders: counted, and sent to the host where that wants them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from x07_sandbox.channel.trees import Entry, Kind
from x07_sandbox.guest.trees import content, is_modified, walk

if TYPE_CHECKING:
    from x07_sandbox.guest.trees import Tree

T = TypeVar("T")
LOOKED_AT_MAX: Final = 100_000  # entries; what lies beyond is neither counted nor sent


class Left(NamedTuple):
    """What was left. files, size: of all that was counted, in bytes. sent: (folder's number, path, name, state)."""

    files: int
    size: int
    sent: list[tuple[int, bytes, bytes, os.stat_result]]


def left_files(
    folders: Sequence[str], given: Tree | None, most_files: int, most_bytes: int, roots: Collection[bytes] = ()
) -> Left:
    """Look for files in *folders*, of which the first is the working folder.

    given: what lay there from the start, which counts only where it was changed. Names at the top of the working folder
    that begin with a dot are what programs keep in their home folder, and do not count. Regular files are sent while
    they fit in most_files and most_bytes. roots: names in the working folder under which folders of the host lie.
    """
    count = size = sent_size = looked_at = 0
    sent: list[tuple[int, bytes, bytes, os.stat_result]] = []
    for number, folder in enumerate(folders):
        entries = walk(os.fsencode(folder), hidden=number > 0, skipped=() if number else roots)
        while (entry := _next(entries)) is not None:
            path, name, info = entry
            looked_at += 1
            if looked_at > LOOKED_AT_MAX:
                return Left(count, size, sent)
            if stat.S_ISDIR(info.st_mode) or (number == 0 and given is not None and not is_modified(given, name, info)):
                continue
            regular = stat.S_ISREG(info.st_mode)
            count += 1
            size += info.st_size if regular else 0
            if regular and len(sent) < most_files and sent_size + info.st_size <= most_bytes:
                sent_size += info.st_size
                sent.append((number, path, name, info))
    return Left(count, size, sent)


def _next(entries: Iterator[T]) -> T | None:
    """The next of them; None at the end, and where a folder is closed to us: not every agent is root."""
    try:
        return next(entries, None)
    except OSError:
        return None


def stream_of(left: Left) -> Iterator[bytes]:
    """What is sent of them, as a stream of trees (channel/trees), one for each folder. Raises OSError."""
    folder = -1
    for number, path, name, info in left.sent:
        if number != folder:
            folder = number
            yield Entry(Kind.ROOT, b"%d" % number).encoded()
        pieces = content(path, name, info)
        if (head := _next(pieces)) is not None:  # else it cannot be opened
            yield head
            yield from pieces
    yield Entry(Kind.END, b"").encoded()
