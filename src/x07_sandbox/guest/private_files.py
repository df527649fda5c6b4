"""Files that a program left in its private folders: counting them, and sending them to the host."""

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
LOOKED_AT_MAX: Final = 100_000  # entries; further ones are neither counted nor sent


class Left(NamedTuple):
    """The counted files, their size in bytes, and the files to send as (folder number, path, name, state)."""

    files: int
    size: int
    sent: list[tuple[int, bytes, bytes, os.stat_result]]


def left_files(
    folders: Sequence[str], given: Tree | None, most_files: int, most_bytes: int, roots: Collection[bytes] = ()
) -> Left:
    """Count files in *folders*, the first of which is the working folder.

    given: the input tree of the working folder; its files count only if they were modified. Top-level dot files of the
    working folder, which is also the home folder, do not count. roots: mount points in the working folder, skipped.
    Regular files are sent while they fit into most_files and most_bytes.
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
    """Return the next item, None at the end or if it cannot be read: not every agent is root."""
    try:
        return next(entries, None)
    except OSError:
        return None


def stream_of(left: Left) -> Iterator[bytes]:
    """Yield the files to send as tree records (channel/trees), one tree per folder. Raises OSError."""
    folder = -1
    for number, path, name, info in left.sent:
        if number != folder:
            folder = number
            yield Entry(Kind.ROOT, b"%d" % number).encoded()
        pieces = content(path, name, info)
        if (head := _next(pieces)) is not None:
            yield head
            yield from pieces
    yield Entry(Kind.END, b"").encoded()
