"""Names that are two in the machine and would be one on the host, in a folder that takes no notice of case.

Such a folder (casefold of ext4, vfat, a share) gives what lies under one spelling for every other: of two files that
differ in case only the second would take the place of the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import posixpath
import struct
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from x07_sandbox.files.changes import Refused, printable
from x07_sandbox.files.inode import ident_of, listed
from x07_sandbox.files.protected import folded
from x07_sandbox.host import beneath

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from x07_sandbox.files.changes import Change

_GET_FLAGS: Final = 0x80086601  # FS_IOC_GETFLAGS of a 64-bit kernel (linux/fs.h)
_CASEFOLD: Final = 0x40000000


def knows_no_case(root: str) -> bool:
    """Whether that folder, or the one in which it is to be made, takes names for one that differ in case only.

    Told by its flag, or by what lies in it. Where neither tells, applying finds a conflict, and is undone.
    """
    for path in (root, posixpath.dirname(root)):
        try:
            fd = beneath.open_root(path)
        except FileNotFoundError:
            continue
        except OSError:  # a single file: nothing can collide
            break
        try:
            return _is_casefold(fd) or folds(listed(fd), functools.partial(ident_of, fd))
        except OSError:
            break
        finally:
            os.close(fd)
    return False


def _is_casefold(fd: int) -> bool:
    with contextlib.suppress(OSError):  # most file systems have other flags or none
        (flags,) = struct.unpack("=I", fcntl.ioctl(fd, _GET_FLAGS, bytes(4)))
        return bool(flags & _CASEFOLD)
    return False


def folds(names: Collection[str], ident: Callable[[str], object]) -> bool:
    """Whether one of *names*, all of a folder, is found under another spelling. ident: what lies under a name."""
    known = set(names)
    for name in names:
        other = name.swapcase()
        if other not in known and name.isascii():
            return ident(other) is not None and ident(other) == ident(name)
    return False


def collisions(changes: Iterable[Change], there: Iterable[str]) -> Iterator[Refused]:
    """What is new of *changes* and would be one with another name of its folder. there: names that are or are to be."""
    new = [change.name for change in changes if change.before is None]
    spelled: dict[str, set[str]] = defaultdict(set)
    for name in {*there, *new}:
        spelled[_folded_last(name)].add(name)
    for name in new:
        if others := spelled[_folded_last(name)] - {name}:
            why = f"its folder would take it for {printable(min(others))}: names that differ in case only are one there"
            yield Refused(name=name, rule="kind", why=why)


def _folded_last(name: str) -> str:
    folder, _, part = name.rpartition("/")
    return posixpath.join(folder, folded(part))
